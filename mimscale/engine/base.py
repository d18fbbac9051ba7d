"""What the training loop asks of an engine. Two fulfil it: DeepSpeed's, and plain PyTorch's, the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from mimscale.errors import UserError
from mimscale.optim.config import OptimConfig
from mimscale.optim.param_groups import parameter_groups
from mimscale.types import Batch, Targets


def unchanged(loss: Tensor) -> Tensor:
    return loss


class Engine(Protocol):
    """A method and its optimiser, on one device of each rank. Every call is collective.

    Micro-batch and accumulation were solved before (`mimscale.training.micro_batch`): after `accumulation` calls of
    `forward_backward` comes one of `step`.
    """

    def forward_backward(
        self, batch: Batch, targets: Mapping[str, Targets], check_loss: Callable[[Tensor], Tensor] = unchanged
    ) -> dict[str, Tensor]:
        """One micro-batch. Gradients are summed over the micro-batches of a step and averaged over the ranks.

        check_loss: called between forward and backward; what it returns goes backward in place of the loss.
        Returns what the method's `forward` returned, detached 0-dim tensors on the device.
        """

    def step(self, lr: float, clip: float) -> bool:
        """The optimiser's step: all ranks, or none. Returns whether it was skipped.

        A step whose gradients hold inf or NaN anywhere leaves weights, moments and moving average alone.
        lr: peak group's learning rate; groups with layer decay take their share of it. clip: largest global L2 norm of
        the gradients, to which larger ones are scaled down; 0 = off.
        """

    def gradient_norm(self) -> float:
        """Global L2 norm of the last step's gradients before clipping. Reads from the device."""

    @property
    def notes(self) -> list[str]:
        """Lines for the start of a run: which fast paths of the engine run, which plain twins, and why. Grows in the
        first step, where it is measured.
        """

    @property
    def loss_scale(self) -> float | None:
        """fp16's dynamic loss scale; None where there is none."""

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped since the run began, over all launches."""

    def parameters(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """(name, whole value in forward precision) of the method's parameters whose names start with `prefix`.

        One at a time, because ZeRO-3 gathers each; the value is valid until the next. Every rank must take all.
        """

    def fragments(self) -> dict[str, Tensor]:
        """This rank's part of a checkpoint: "kind|name|start" -> live 1-D tensor, see `mimscale.checkpoint.format`."""

    def describe(self) -> dict[str, Any]:
        """The engine's part of a checkpoint's manifest: shapes, parameter groups, counters, loss scale."""

    def load(self, reader: Any) -> None:
        """Continue from a checkpoint (a `CheckpointReader`), whatever engine, ZeRO stage and ranks wrote it.

        Local, so that a failure can be agreed on before `finish_load`. Raises UserError where it does not fit.
        """

    def load_weights(self, reader: Any) -> None:
        """The same for a new run that starts from another's weights: the optimiser's state stays empty. Local."""

    def finish_load(self, reader: Any, *, counters: bool = True) -> None:
        """After `load` or `load_weights` on every rank. counters: take the step counts and the loss scale too."""

    def close(self) -> None:
        """Free what the engine holds. Process groups stay."""


def method_groups(method: Any, optim: OptimConfig) -> list[dict[str, Any]]:
    """The parameter groups of a method, as `mimscale.optim.param_groups.parameter_groups` gives them."""
    return parameter_groups(
        method,
        weight_decay=optim.weight_decay,
        layer_decay=optim.layer_decay,
        no_weight_decay=method.no_weight_decay(),
        layer_of=method.layer_of,
    )


def refuse_unfit(method: nn.Module) -> None:
    """Raises UserError for a parameter that ZeRO or checkpoints cannot carry, which is a mistake in the method."""
    for name, parameter in method.named_parameters():
        if not parameter.requires_grad:
            raise UserError(f"parameter {name} is frozen; make it a buffer, or keep it outside the method")
        if parameter.dim() == 0:
            raise UserError(f"parameter {name} is 0-dimensional, which ZeRO cannot hold; give it shape (1,)")


def refuse_other_parameters(reader: Any, described: Mapping[str, Any]) -> None:
    """Raises UserError where a checkpoint's parameters are not this engine's. described: by `Engine.describe`."""
    theirs, ours = reader.meta["shapes"], described["shapes"]
    if theirs != ours:
        different = sorted(n for n in theirs.keys() | ours.keys() if theirs.get(n) != ours.get(n))
        raise UserError(
            f"{reader.path} holds other parameters than this run ({', '.join(different[:3])}, {len(different)} in "
            f"all); a resume and --fork need the same student and method"
        )


def refuse_other_groups(reader: Any, described: Mapping[str, Any]) -> None:
    """Raises UserError where a checkpoint's weight decay or learning-rate scales are not this engine's."""
    if reader.meta["groups"] != described["groups"]:
        raise UserError(f"{reader.path}: parameter groups (decay, lr scale) differ from this run's; use --fork")
