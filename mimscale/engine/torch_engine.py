"""A method in plain PyTorch: DistributedDataParallel, no ZeRO. The reference that DeepSpeed's engine is tested against.

It needs no DeepSpeed. Every rank holds all weights and all of the optimiser's state in fp32, and computes in fp32 or,
under autocast, in bf16. Of `engine.ds_config` only the precision is used: ZeRO and its communication are DeepSpeed's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mimscale.config.run import RunConfig
from mimscale.distributed.world import World
from mimscale.engine import fast_paths
from mimscale.engine.base import method_groups, refuse_other_groups, refuse_other_parameters, refuse_unfit, unchanged
from mimscale.engine.compile import StudentCompiler
from mimscale.engine.cuda_graphs import StudentGraphs
from mimscale.engine.student_fp8 import use_fp8
from mimscale.optim.ema import MovingAverage
from mimscale.optim.optimizers.base import optimizer_class
from mimscale.types import Batch, Targets


def open_process_group(world: World, timeout_s: float = 1800.0) -> None:
    """nccl on GPUs, gloo on CPUs. A single rank needs none."""
    if world.size > 1 and not dist.is_initialized():
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        limit = timedelta(seconds=timeout_s)
        dist.init_process_group(backend, rank=world.rank, world_size=world.size, timeout=limit)


class TorchEngine:
    """Fulfils `mimscale.engine.base.Engine`.

    accumulation: forward passes per step. precision: of the forward and backward pass; fp16 is refused before, by
    `mimscale.engine.factory.check_backend`.
    """

    def __init__(
        self, method: Any, config: RunConfig, world: World, *, accumulation: int, precision: Literal["fp32", "bf16"]
    ) -> None:
        refuse_unfit(method)
        self._world, self._accumulation, self._global_batch = world, accumulation, config.schedule.global_batch
        self._module: nn.Module = method.to(world.device)
        self._parameters = dict(self._module.named_parameters())
        groups = method_groups(method, config.optim)
        self._groups: list[dict[str, Any]] = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        paths = fast_paths.choose(config.engine)
        self.notes = [paths.line(len(self._parameters), len(self._parameters))]
        self._kind = optimizer_class(config.optim.name)
        self._optimizer = self._kind.TORCH(
            [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in groups],
            lr=0.0,  # type: ignore[call-arg]
            **self._kind.options(config.optim, fused=world.device.type == "cuda" or "fused_update" in paths),
        )
        self._kind.create_state(self._optimizer, self._parameters.values(), 0)
        self._average, self._averaged = None, method.averaged
        if config.ema is not None:
            averaged = (p for name, p in self._parameters.items() if name.startswith(self._averaged))
            self._average = MovingAverage(config.ema.decay, averaged)
        self._model: Any = self._module
        if world.size > 1:
            self._model = DistributedDataParallel(self._module, broadcast_buffers=False)
        if config.engine.student_fp8:
            self.notes.append(use_fp8(method, world.device))
        self._compiler = StudentCompiler(self._module, config.engine, world.device, 0, self.notes)
        self._graphs = StudentGraphs(self._module, config.engine, world.device, 0, accumulation, self.notes)
        self._autocast = torch.autocast(world.device.type, torch.bfloat16, enabled=precision == "bf16")
        self._micro_step = self._steps = self._skipped = 0
        self._norm = math.nan

    # ------------------------------------------------------------------------------------------------------- training

    def forward_backward(
        self, batch: Batch, targets: Mapping[str, Targets], check_loss: Callable[[Tensor], Tensor] = unchanged
    ) -> dict[str, Tensor]:
        self._compiler.before_forward(lambda: self._loss(batch, targets))
        self._micro_step += 1
        local = self._world.size > 1 and self._micro_step < self._accumulation
        with self._model.no_sync() if local else nullcontext():
            with self._autocast:
                outputs: Mapping[str, Tensor] = self._model(batch, targets)
            (check_loss(outputs["loss"]) / self._accumulation).backward()
        return {name: value.detach() for name, value in outputs.items()}

    def _loss(self, batch: Batch, targets: Mapping[str, Targets]) -> Tensor:
        with self._autocast:
            loss: Tensor = self._module(batch, targets)["loss"]
        return loss

    def step(self, lr: float, clip: float) -> bool:
        assert self._micro_step == self._accumulation, "step() comes after `accumulation` micro-batches"
        for live, group in zip(self._optimizer.param_groups, self._groups, strict=True):
            live["lr"] = lr * group["lr_scale"]
        # the gradients are all-reduced, so their norm and with it the decision is the same on every rank
        self._norm = float(nn.utils.clip_grad_norm_(self._parameters.values(), clip or math.inf))
        skipped = not math.isfinite(self._norm)
        if not skipped:
            self._optimizer.step()
            if self._average is not None:
                self._average.update()
        self._optimizer.zero_grad()
        self._micro_step, self._steps, self._skipped = 0, self._steps + 1, self._skipped + skipped
        return skipped

    def gradient_norm(self) -> float:
        return self._norm

    @property
    def loss_scale(self) -> float | None:
        return None

    @property
    def skipped_steps(self) -> int:
        return self._skipped

    def parameters(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._parameters.items():
            if name.startswith(prefix):
                yield name, parameter.detach()

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def fragments(self) -> dict[str, Tensor]:
        """Each parameter is whole, and written by the rank that its place among the parameters falls to."""
        mine = list(self._parameters)[self._world.rank :: self._world.size]
        buffers = self._buffers() if self._world.rank == 0 else {}
        return {**self._fragments(mine), **buffers}

    def _fragments(self, names: list[str]) -> dict[str, Tensor]:
        live: dict[str, Tensor] = {}
        for name in names:
            parameter = self._parameters[name]
            live[f"fp32|{name}|0"] = parameter.detach().view(-1)
            for kind in self._kind.STATES:
                live[f"{kind}|{name}|0"] = self._optimizer.state[parameter][kind].view(-1)
            if self._average is not None and name.startswith(self._averaged):
                live[f"ema|{name}|0"] = self._average.of(parameter).view(-1)
        return live

    def _buffers(self) -> dict[str, Tensor]:
        return {f"buffer|{name}|0": buffer.detach().view(-1) for name, buffer in self._module.named_buffers()}

    def describe(self) -> dict[str, Any]:
        tensors = {**self._parameters, **dict(self._module.named_buffers())}
        taken = self._steps - self._skipped
        if self._kind.COUNTS_STEPS:
            taken = int(next(iter(self._optimizer.state.values()))["step"])
        samples = self._steps * self._global_batch
        counters = {"global_steps": self._steps, "skipped_steps": self._skipped, "global_samples": samples}
        return {
            "shapes": {name: list(tensor.shape) for name, tensor in tensors.items()},
            "groups": self._groups,
            "engine": {
                "optimizer_step": taken,
                "counters": counters,
                "scaler": None,
                "compiled": self._compiler.state(),
            },
        }

    @torch.no_grad()
    def load(self, reader: Any) -> None:
        described = self.describe()
        refuse_other_groups(reader, described)
        refuse_other_parameters(reader, described)
        step = reader.meta["engine"]["optimizer_step"]
        self._kind.create_state(self._optimizer, self._parameters.values(), step)
        reader.fill({**self._fragments(list(self._parameters)), **self._buffers()})

    @torch.no_grad()
    def load_weights(self, reader: Any) -> None:
        refuse_other_parameters(reader, self.describe())
        weights = {key: t for key, t in self._fragments(list(self._parameters)).items() if key.startswith("fp32|")}
        reader.fill({**weights, **self._buffers()})
        if self._average is not None:
            self._average.restart()

    def finish_load(self, reader: Any, *, counters: bool = True) -> None:
        if counters:
            counted = reader.meta["engine"]["counters"]
            self._steps, self._skipped = counted["global_steps"], counted["skipped_steps"]
            self._compiler.load(reader.meta["engine"])

    def close(self) -> None:
        self._optimizer.zero_grad()
