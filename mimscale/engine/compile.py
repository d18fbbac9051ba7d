"""Compiled blocks: whether the student's forward and backward pass go through torch.compile, in which pieces, and why.

`blocks` compiles SEGMENT consecutive blocks into one graph. A graph costs the host about what a block's eager operators
cost (guards, argument handling, one autograd node with its saved tensors), so that a graph per block saves the host
nothing; one graph for the whole forward pass (`whole`) gives all gradients at the end of its backward pass, where
nothing is left to hide their communication behind. Equal segments share a compiled graph: parameters are its inputs.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mimscale.config.compiler import compiler_fault, options, uncompiled
from mimscale.engine.config import EngineConfig
from mimscale.errors import UserError
from mimscale.models.vit import Residual, SegmentRunner, run_segment

SEGMENT = 4
TRIALS = 5
BACKEND: Any = "inductor"  # of torch.compile

Asked = Literal["auto", "off", "blocks", "whole"]
Chosen = Literal["off", "blocks", "whole", "measure"]


def choose(asked: Asked, device: torch.device, stage: int, fault: str, all_plain: bool = False) -> tuple[Chosen, str]:
    """(what to compile, why). fault: why this machine cannot compile for the device; empty if it can. all_plain: the
    recipe wants the plain twin of every fast path, which `auto` follows.

    "measure": eager and compiled blocks are timed in the first micro-batch, and the faster is taken.
    """
    if asked == "off":
        return "off", "engine.compile = off"
    if stage == 3:
        return "off", "ZeRO-3's hooks run between the blocks' operators and break their graphs"
    if asked == "auto" and all_plain:
        return "off", "engine.plain = all"
    if asked == "auto" and device.type == "cpu":
        return "off", "auto compiles on a GPU only"
    if fault:
        return "off", fault
    if asked == "auto":
        return "measure", "auto takes the faster of eager and compiled blocks, timed in the first micro-batch"
    return asked, f"engine.compile = {asked}"


def check(asked: Asked, stage: int) -> None:
    """Refuse what was asked for by name and cannot be. Raises UserError."""
    if stage == 3 and asked in ("blocks", "whole"):
        raise UserError(
            f"engine.compile = {asked} with ZeRO-3: its hooks run between the operators of a block and break the "
            f"graph (44 breaks in six steps); set engine.compile = auto, or a ZeRO-2 file as engine.ds_config"
        )


class StudentCompiler:
    """Compiles a method's blocks as the recipe asks, and measures first where that is `auto`.

    method: the module whose `forward` the engine calls, on its device. notes: gets a line for each choice.
    """

    def __init__(
        self, method: nn.Module, config: EngineConfig, device: torch.device, stage: int, notes: list[str]
    ) -> None:
        check(config.compile, stage)
        self._method, self._device, self._notes = method, device, notes
        wanted = config.compile not in ("off", "auto") or device.type == "cuda"
        fault = compiler_fault(device) if wanted else ""
        self.chosen, why = choose(config.compile, device, stage, fault, config.plain == "all")
        notes.append(f"compile: {self.chosen} ({why})")
        if self.chosen in ("blocks", "whole"):
            self._apply()

    def before_forward(self, compute_loss: Callable[[], Tensor]) -> None:
        """Called before each forward pass with that pass, in the engine's precision. Measures once. Collective then."""
        if self.chosen != "measure":
            return
        self.chosen = "blocks"
        self._apply()
        eager_s, compiled_s = self._agreed(compute_loss)
        if compiled_s >= eager_s:
            self._remove()
        times = f"forward and backward pass: eager {eager_s * 1e3:.1f} ms, compiled {compiled_s * 1e3:.1f} ms"
        self._notes.append(f"compile: {self.chosen} ({times})")

    def state(self) -> Chosen:
        """For the checkpoint, so that a resume computes as the run did."""
        return self.chosen

    def load(self, engine_state: Mapping[str, Any]) -> None:
        """Take the choice of the run that wrote a checkpoint instead of measuring; off if an older release wrote it."""
        if self.chosen == "measure":
            self.chosen = "blocks" if engine_state.get("compiled") in ("blocks", "whole") else "off"
            self._notes.append(f"compile: {self.chosen} (as in the checkpoint)")
            if self.chosen == "blocks":
                self._apply()

    def _apply(self) -> None:
        import torch._dynamo.config  # not before: it takes a second

        # flat parameters put views into a block and take them away again, also where it is recomputed: nothing is left
        if hasattr(torch._dynamo.config, "skip_fwd_side_effects_in_bwd_under_checkpoint"):
            torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
        chosen = options() if BACKEND == "inductor" else None
        how: dict[str, Any] = {"dynamic": False, "backend": BACKEND, "options": chosen}
        if self.chosen == "whole":
            self._method.compile(**how)
            return
        runner = SegmentRunner(SEGMENT, torch.compile(run_segment, **how))
        for block in self._blocks():
            block.runner = runner

    def _remove(self) -> None:
        self.chosen = "off"
        for block in self._blocks():
            del block.runner

    def _blocks(self) -> list[Any]:
        return [module for module in self._method.modules() if isinstance(module, Residual)]

    def _agreed(self, compute_loss: Callable[[], Tensor]) -> tuple[float, float]:
        """Seconds of an eager and a compiled pass on the slowest rank; inf where a pass fails."""
        parameters = [p for p in self._method.parameters() if p.requires_grad]
        seconds, before = [], [buffer.clone() for buffer in self._method.buffers()]
        for compiled in (False, True):
            with nullcontext() if compiled else uncompiled():
                try:
                    seconds.append(self._time(compute_loss, parameters))
                except Exception as error:  # a compiler fails in many ways; what is eager fails again in the step
                    self._notes.append(f"compile: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
                    seconds.append(math.inf)
        for buffer, value in zip(self._method.buffers(), before, strict=True):  # running statistics count steps only
            buffer.copy_(value)
        slowest = torch.tensor(seconds, dtype=torch.float64, device=self._device)
        if dist.is_initialized():
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
        eager_s, compiled_s = slowest.tolist()
        return eager_s, compiled_s

    def _time(self, compute_loss: Callable[[], Tensor], parameters: list[nn.Parameter]) -> float:
        """Median seconds of forward and backward pass. `autograd.grad` runs no hook of a parameter, so the engine sees
        nothing of it.
        """
        seconds = []
        for trial in range(2 + TRIALS):
            start_s = time.perf_counter()
            torch.autograd.grad(compute_loss(), parameters, allow_unused=True)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            if trial >= 2:
                seconds.append(time.perf_counter() - start_s)
        return statistics.median(seconds)
