"""A method on a DeepSpeed engine: build it, run micro-steps, step the optimiser, save and load its tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mimscale.config.run import RunConfig
from mimscale.distributed.world import World
from mimscale.engine.deepspeed_runtime import import_deepspeed
from mimscale.engine.zero_layout import MOMENTS, Layout, refuse_unfit
from mimscale.errors import UserError
from mimscale.optim.param_groups import parameter_groups


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that clips, and leaves the weights alone when the gradients are not finite.

    Only for ZeRO stage 0 in fp32, the one place where DeepSpeed does not check. The gradients are all-reduced by then,
    so every rank decides alike. DeepSpeed reads `overflow` after each step and counts the skip. Costs one host sync.
    clip: largest global gradient norm, 0 = off. norm: that of the last step, before clipping.
    """

    overflow = False
    norm = math.nan
    clip = 0.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.norm = float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients])))
        self.overflow = not math.isfinite(self.norm)
        if self.overflow:
            return None
        if 0 < self.clip < self.norm:
            torch._foreach_mul_(gradients, self.clip / (self.norm + 1e-6))
        return super().step(closure)


class DeepSpeedEngine:
    """Thin: the loop above it holds the policy, DeepSpeed below it the mechanics.

    micro_batch, accumulation: solved from the recipe's global batch and the world size. skipped: whether the last step
    left the weights alone, because its gradients were not finite.
    """

    def __init__(
        self,
        method: Any,
        run: RunConfig,
        world: World,
        *,
        micro_batch: int,
        accumulation: int,
        ds_config: Mapping[str, Any],
    ) -> None:
        refuse_unfit(method)
        self.world = world
        values = ds_config
        stage = values.get("zero_optimization", {}).get("stage", 0)
        full_config = {
            **values,
            "train_batch_size": run.schedule.global_batch,
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": run.optim.clip if stage else 0.0,  # always written: DeepSpeed's default is not off
            "steps_per_print": 10**12,
            "timers": {"throughput": {"enabled": False}},  # it would synchronise the device twice in every micro-step
        }
        groups = parameter_groups(
            method,
            weight_decay=run.optim.weight_decay,
            layer_decay=run.optim.layer_decay,
            no_weight_decay=method.no_weight_decay(),
            layer_of=method.layer_of,
        )
        self.groups: list[dict[str, Any]] = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        adamw = GuardedAdamW if stage == 0 else torch.optim.AdamW
        self._optimizer = adamw(
            [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in groups],
            lr=0.0,
            betas=run.optim.betas,
            eps=run.optim.eps,
            fused=world.device.type == "cuda",
        )
        if isinstance(self._optimizer, GuardedAdamW):
            self._optimizer.clip = run.optim.clip
        deepspeed = import_deepspeed(world.device)
        self._ds, *_ = deepspeed.initialize(
            model=method, optimizer=self._optimizer, config=full_config, dist_init_required=False
        )
        self.layout = Layout(self._ds)

    @property
    def module(self) -> nn.Module:
        return self._ds.module

    def set_lr(self, lr: float) -> None:
        """The peak group's rate; groups with layer decay get their share."""
        for live, group in zip(self._ds.optimizer.param_groups, self.groups, strict=True):
            live["lr"] = lr * group["lr_scale"]

    def set_clip(self, norm: float) -> None:
        """Largest global gradient norm of the next step, 0 = none. It is scaled down inside the step."""
        if isinstance(self._optimizer, GuardedAdamW):
            self._optimizer.clip = norm
        else:
            self._ds.optimizer.clip_grad = norm

    def forward_backward(
        self, batch: Any, targets: Any, check_loss: Callable[[Tensor], Tensor] = lambda loss: loss
    ) -> dict[str, Tensor]:
        outputs: Mapping[str, Tensor] = self._ds(batch, targets)
        self._ds.backward(check_loss(outputs["loss"]))
        if not self._ds.is_gradient_accumulation_boundary():
            self._ds.step()
        return {name: value.detach() for name, value in outputs.items()}

    def step(self, lr: float, clip: float) -> bool:
        self.set_lr(lr)
        self.set_clip(clip)
        skipped_before = self.skipped_steps
        self._ds.step()
        return self.skipped_steps > skipped_before

    def parameters(self, prefix: str = "") -> Any:
        raise AttributeError("see the engine's rewrite")

    @property
    def skipped_steps(self) -> int:
        """Optimiser steps whose gradients were not finite and which left the weights alone, since the run began."""
        return int(self._ds.skipped_steps)

    def gradient_norm(self) -> float:
        """Global L2 norm of the last step's gradients, before clipping. Reads from the device."""
        if isinstance(self._optimizer, GuardedAdamW):
            return self._optimizer.norm
        norm = self._ds.get_global_grad_norm()
        return math.nan if norm is None else float(norm)

    @property
    def loss_scale(self) -> float | None:
        """fp16's dynamic scale; None where there is none."""
        scaler = getattr(self._ds.optimizer, "loss_scaler", None)
        return float(scaler.loss_scale) if scaler is not None and scaler.dynamic else None

    # -------------------------------------------------------------------------------- what a checkpoint holds of it

    def fragments(self) -> dict[str, Tensor]:
        """This rank's fragments "kind|name|start", 1-D, where the optimizer has them; rank 0 adds the buffers."""
        live = {
            f"{kind}|{f.name}|{f.start}": self.layout.view(f, kind).detach()
            for f in self.layout.fragments
            if f.owned
            for kind in ("fp32", *MOMENTS)
        }
        if self.world.rank == 0:
            for name, buffer in self.module.named_buffers():
                live[f"buffer|{name}|0"] = buffer.detach().reshape(-1)
        return live

    def tensors(self) -> dict[str, Tensor]:
        """The same as host copies."""
        return {key: tensor.to("cpu", copy=True) for key, tensor in self.fragments().items()}

    def describe(self) -> dict[str, Any]:
        """The manifest's part of the engine: shapes, group hyper-parameters by parameter name, counters, scaler."""
        return {
            "shapes": {**self.layout.shapes(), **{n: list(b.shape) for n, b in self.module.named_buffers()}},
            "groups": self.groups,
            "engine": self.layout.engine_state(),
        }

    @torch.no_grad()
    def load(self, reader: Any) -> None:
        """Fill masters, moments and buffers from a checkpoint (`resilience.checkpoint.Reader`), whatever wrote it.

        Local: no communication. Call `finish_load` on every rank afterwards. Raises UserError where the checkpoint's
        parameters or groups are not this run's.
        """
        if reader.meta["groups"] != self.groups:
            raise UserError(f"{reader.path}: parameter groups (decay, lr scale) differ from this run's; use --fork")
        self.layout.create_state(reader.meta["engine"]["adam_step"])
        self._fill(reader, ("fp32", *MOMENTS))

    @torch.no_grad()
    def load_weights(self, reader: Any) -> None:
        """The same for a new run that starts from another's weights: Adam's state stays empty."""
        self._fill(reader, ("fp32",))

    def _fill(self, reader: Any, kinds: tuple[str, ...]) -> None:
        theirs, ours = reader.meta["shapes"], self.describe()["shapes"]
        if theirs != ours:
            different = sorted(n for n in theirs.keys() | ours.keys() if theirs.get(n) != ours.get(n))
            raise UserError(
                f"{reader.path} holds other parameters than this run ({', '.join(different[:3])}, {len(different)} in "
                f"all); a resume and --fork need the same student and method"
            )
        for fragment in self.layout.fragments:
            for kind in kinds:
                reader.into(kind, fragment.name, fragment.start, self.layout.view(fragment, kind))
        for name, buffer in self.module.named_buffers():
            reader.into("buffer", name, 0, buffer.data.view(-1))

    @torch.no_grad()
    def finish_load(self, reader: Any, *, counters: bool = True) -> None:
        """Collective end of a load: refresh the forward copies, restore counters and scaler, test the map again."""
        self.layout.refresh_weights()
        if counters:
            self.layout.load_engine_state(reader.meta["engine"])
        self.layout.check()

    def close(self) -> None:
        self._ds.destroy()
