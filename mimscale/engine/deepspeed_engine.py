"""A method on DeepSpeed, at any ZeRO stage and in any precision of ds_configs/."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from mimscale.config.run import RunConfig
from mimscale.distributed.world import World
from mimscale.engine import fast_paths, flat_parameters, global_norm, one_rank
from mimscale.engine.base import method_groups, refuse_other_groups, refuse_other_parameters, refuse_unfit, unchanged
from mimscale.engine.clip_and_skip import ClipAndSkip, guarded
from mimscale.engine.compile import StudentCompiler
from mimscale.engine.cuda_graphs import StudentGraphs
from mimscale.engine.deepspeed_runtime import import_deepspeed
from mimscale.engine.student_fp8 import use_fp8
from mimscale.engine.zero_layout import Layout, LayoutError, keep_weights_in_place
from mimscale.models.vit import Residual
from mimscale.optim.optimizers.base import optimizer_class
from mimscale.types import Batch, Targets


class DeepSpeedEngine:
    """Fulfils `mimscale.engine.base.Engine`. The loop above it holds the policy, DeepSpeed below it the mechanics.

    DeepSpeed may hold the parameters otherwise than the method names them (`flat_parameters`, ZeRO); `Layout`
    translates.
    micro_batch, accumulation: images per rank and forward pass, and forward passes per step; with the number of ranks
    they make the recipe's global batch. ds_config: the parsed and checked JSON that `engine.ds_config` names.
    """

    def __init__(
        self,
        method: Any,
        config: RunConfig,
        world: World,
        *,
        micro_batch: int,
        accumulation: int,
        ds_config: Mapping[str, Any],
    ) -> None:
        refuse_unfit(method)
        self._world = world
        stage = ds_config.get("zero_optimization", {}).get("stage", 0)
        groups = method_groups(method, config.optim)
        self._groups: list[dict[str, Any]] = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        paths = fast_paths.choose(config.engine, stage, world.size)
        places = (flat_parameters.flatten if "flat_parameters" in paths else flat_parameters.natural)(method, groups)
        holders = len(dict.fromkeys(place.holder for place in places))
        self.notes = [paths.line(len(places), holders)]
        kind = optimizer_class(config.optim.name)
        torch_class = kind.TORCH if stage else guarded(kind.TORCH)
        self._optimizer = torch_class(
            [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in groups],
            lr=0.0,  # type: ignore[call-arg]
            **kind.options(config.optim, fused=world.device.type == "cuda" or "fused_update" in paths),
        )
        self._deepspeed = import_deepspeed(world.device)
        zero_optimization = ds_config.get("zero_optimization", {})
        if "flat_parameters" in paths:
            blocks = [module for module in method.modules() if isinstance(module, Residual)]
            if stage == 3:
                for block in blocks:
                    self._deepspeed.utils.set_z3_leaf_module(block, True)
            zero_optimization = fast_paths.fitted(
                zero_optimization, [[p.numel() for p in block.parameters()] for block in blocks]
            )
        self._ds, *_ = self._deepspeed.initialize(
            model=method,
            optimizer=self._optimizer,
            dist_init_required=False,
            config={
                **ds_config,
                **({"zero_optimization": zero_optimization} if zero_optimization else {}),
                "train_batch_size": micro_batch * accumulation * world.size,
                "train_micro_batch_size_per_gpu": micro_batch,
                "gradient_accumulation_steps": accumulation,
                "gradient_clipping": config.optim.clip if stage else 0.0,  # always written: the default is not off
                "zero_allow_untested_optimizer": True,  # it knows a few; ours are tested here, each at every stage
                "steps_per_print": 10**12,
                "timers": {"throughput": {"enabled": False}},  # it would wait for the device twice in every micro-step
            },
        )
        decay = None if config.ema is None else config.ema.decay
        self.layout = Layout(self._ds, kind, places, decay, method.averaged)
        try:
            if stage and "norm_check" in paths:
                global_norm.use_in(self._ds.optimizer, stage)
            if stage in (1, 2) and "fused_update" in paths:
                keep_weights_in_place(self._ds.optimizer)
            if "one_rank" in paths:
                one_rank.use_in(self._ds.optimizer)
        except AttributeError as error:
            raise LayoutError(f"this DeepSpeed release has other parts ({error}); use 0.19.8") from error
        if config.engine.student_fp8:
            self.notes.append(use_fp8(method, world.device))
        self._compiler = StudentCompiler(method, config.engine, world.device, stage, self.notes)
        self._graphs = StudentGraphs(method, config.engine, world.device, stage, accumulation, self.notes)

    # ------------------------------------------------------------------------------------------------------- training

    def forward_backward(
        self, batch: Batch, targets: Mapping[str, Targets], check_loss: Callable[[Tensor], Tensor] = unchanged
    ) -> dict[str, Tensor]:
        for fast_path in (self._compiler, self._graphs):
            fast_path.before_forward(lambda: self._module(batch, targets)["loss"])
        outputs: Mapping[str, Tensor] = self._ds(batch, targets)
        self._ds.backward(check_loss(outputs["loss"]))
        if not self._ds.is_gradient_accumulation_boundary():
            self._ds.step()  # counts the micro-step and nothing else
        return {name: value.detach() for name, value in outputs.items()}

    def step(self, lr: float, clip: float) -> bool:
        assert self._ds.is_gradient_accumulation_boundary(), "step() comes after `accumulation` micro-batches"
        for live, group in zip(self._ds.optimizer.param_groups, self._groups, strict=True):
            live["lr"] = lr * group["lr_scale"]
        if isinstance(self._optimizer, ClipAndSkip):
            self._optimizer.clip = clip
        else:
            self._ds.optimizer.clip_grad = clip
        skipped_before = self.skipped_steps
        self._ds.step()
        skipped = self.skipped_steps > skipped_before
        if self.layout.average is not None and not skipped:
            self.layout.average.update()
        return skipped

    def gradient_norm(self) -> float:
        if isinstance(self._optimizer, ClipAndSkip):
            return self._optimizer.norm
        norm = self._ds.get_global_grad_norm()
        return math.nan if norm is None else float(norm)

    @property
    def loss_scale(self) -> float | None:
        scaler = getattr(self._ds.optimizer, "loss_scaler", None)
        return float(scaler.loss_scale) if scaler is not None and scaler.dynamic else None

    @property
    def skipped_steps(self) -> int:
        return int(self._ds.skipped_steps)

    def parameters(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        wanted = (place for place in self.layout.places if place.name.startswith(prefix))
        for _, group in groupby(wanted, key=lambda place: place.unit):
            places = list(group)
            holders = list(dict.fromkeys(place.holder for place in places))
            with self._deepspeed.zero.GatheredParameters(holders, enabled=self.layout.stage == 3):
                for place in places:
                    yield place.name, place.read()

    # ---------------------------------------------------------------------------------------------------- checkpoints

    @property
    def _module(self) -> nn.Module:
        module: nn.Module = self._ds.module
        return module

    def fragments(self) -> dict[str, Tensor]:
        live = self._fragments(owned_only=True)
        if self._world.rank == 0:
            live |= {f"buffer|{name}|0": buffer.detach().reshape(-1) for name, buffer in self._module.named_buffers()}
        return live

    def _fragments(self, *, owned_only: bool, kinds: tuple[str, ...] | None = None) -> dict[str, Tensor]:
        return {
            f"{kind}|{f.name}|{f.start}": self.layout.view(f, kind).detach()
            for f in self.layout.fragments
            if f.owned or not owned_only
            for kind in self.layout.kinds(f)
            if kinds is None or kind in kinds
        }

    def describe(self) -> dict[str, Any]:
        return {
            "shapes": {**self.layout.shapes(), **{n: list(b.shape) for n, b in self._module.named_buffers()}},
            "groups": self._groups,
            "engine": {**self.layout.engine_state(), "compiled": self._compiler.state()},
        }

    def load(self, reader: Any) -> None:
        refuse_other_groups(reader, self.describe())
        self.layout.create_state(reader.meta["engine"]["optimizer_step"])
        self._fill(reader)

    def load_weights(self, reader: Any) -> None:
        self._fill(reader, kinds=("fp32",))
        if self.layout.average is not None:
            self.layout.average.restart()

    @torch.no_grad()
    def _fill(self, reader: Any, kinds: tuple[str, ...] | None = None) -> None:
        refuse_other_parameters(reader, self.describe())
        reader.fill(self._fragments(owned_only=False, kinds=kinds))
        for name, buffer in self._module.named_buffers():
            reader.into("buffer", name, 0, buffer.data.view(-1))

    @torch.no_grad()
    def finish_load(self, reader: Any, *, counters: bool = True) -> None:
        self.layout.refresh_weights()
        if counters:
            self.layout.load_engine_state(reader.meta["engine"])
            self._compiler.load(reader.meta["engine"])
        self.layout.check()

    def close(self) -> None:
        self._ds.destroy()
