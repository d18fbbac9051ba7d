"""LARS (You, Gitman and Ginsburg 2017, arXiv 1708.03888) as MAE's linear probe uses it (its util/lars.py).

The gradient of a parameter with two or more dimensions, with weight decay added, is scaled to `trust_coefficient` times
the norm of the parameter; then comes SGD with momentum, whose buffer is multiplied by the learning rate afterwards.
One-dimensional parameters get neither decay nor scale. timm's Lars does the same without weight decay where the first
kind is in a group with `always_adapt=True` and the second in one with False; by default it is plain SGD then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mimscale.optim.config import OptimConfig
from mimscale.optim.optimizers.base import Optimizer, Piece


class LarsConfig(OptimConfig):
    """momentum: of the update. trust_coefficient: of the ratio of the norms of weights and update."""

    momentum: float = Field(0.9, ge=0, lt=1)
    trust_coefficient: float = Field(1e-3, gt=0, le=1)


class WholeParameterLars(torch.optim.Optimizer):
    """The optimiser of torch's kind. Its tensors are parameters, or what `use_pieces` says."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        trust_coefficient: float = 1e-3,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.momentum, self.trust_coefficient = momentum, trust_coefficient
        self._pieces: dict[Tensor, list[tuple[int, Piece]]] | None = None
        self._count = 0
        self._total: Callable[[Tensor], Tensor] = _unchanged

    def use_pieces(self, pieces: Sequence[Piece], names: Sequence[str], total: Callable[[Tensor], Tensor]) -> None:
        """Where the parameters lie in the tensors; see `Optimizer.use_pieces`."""
        number = {name: index for index, name in enumerate(names)}
        self._pieces, self._count, self._total = {}, len(names), total
        for piece in pieces:
            self._pieces.setdefault(piece.tensor, []).append((number[piece.name], piece))

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        stepped = [(g, p) for g in self.param_groups for p in g["params"] if p.grad is not None]
        pieces, count = self._adapted(stepped)
        if count:
            self._scale(pieces, count)
        for group, tensor in stepped:
            buffer = self.state[tensor].get("momentum_buffer")
            if buffer is None:
                buffer = self.state[tensor]["momentum_buffer"] = torch.zeros_like(tensor)
            buffer.mul_(self.momentum).add_(tensor.grad)
            tensor.add_(buffer, alpha=-group["lr"])

    def _adapted(self, stepped: Sequence[tuple[Any, Tensor]]) -> tuple[list[tuple[int, Tensor, Tensor, float]], int]:
        """(number of the parameter, its values, its gradient, weight decay) of each piece of two or more dimensions,
        and how many numbers there are on all ranks.
        """
        found = []
        if self._pieces is None:
            for number, (group, tensor) in enumerate(stepped):
                if tensor.dim() > 1:
                    assert tensor.grad is not None
                    found.append((number, tensor, tensor.grad, float(group["weight_decay"])))
            return found, len(stepped)
        for group, tensor in stepped:
            for number, piece in self._pieces.get(tensor, ()):
                if piece.dimensions > 1:
                    span = slice(piece.offset, piece.offset + piece.length)
                    assert tensor.grad is not None
                    values, gradient = tensor.view(-1)[span], tensor.grad.view(-1)[span]
                    found.append((number, values, gradient, float(group["weight_decay"])))
        return found, self._count

    def _scale(self, pieces: Sequence[tuple[int, Tensor, Tensor, float]], count: int) -> None:
        """Add the weight decay, then multiply by the trust ratio, both into the gradients. Collective with pieces."""
        # of any tensor, because a rank without pieces takes part in the collective
        device = next((p.device for group in self.param_groups for p in group["params"]), torch.device("cpu"))
        squares = torch.zeros(2, count, dtype=torch.float64, device=device)
        for number, values, gradient, decay in pieces:
            if decay:
                gradient.add_(values, alpha=decay)
            for row, tensor in enumerate((values, gradient)):
                squares[row, number] += torch.linalg.vector_norm(tensor, dtype=torch.float64).square()
        weight, update = self._total(squares).sqrt()
        both = (weight > 0) & (update > 0)
        ratio = torch.where(both, self.trust_coefficient * weight / update.where(both, update.new_ones(())), 1.0)
        for number, _, gradient, _ in pieces:
            gradient.mul_(ratio[number].to(gradient.dtype))


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


class Lars(Optimizer):
    Config: ClassVar = LarsConfig
    TORCH: ClassVar = WholeParameterLars
    STATES: ClassVar = ("momentum_buffer",)
    COUNTS_STEPS: ClassVar = False

    @classmethod
    def options(cls, config: LarsConfig, *, fused: bool) -> dict[str, Any]:
        return {"momentum": config.momentum, "trust_coefficient": config.trust_coefficient}

    @classmethod
    def use_pieces(
        cls,
        optimizer: torch.optim.Optimizer,
        pieces: Sequence[Piece],
        names: Sequence[str],
        total: Callable[[Tensor], Tensor],
    ) -> None:
        assert isinstance(optimizer, WholeParameterLars)
        optimizer.use_pieces(pieces, names, total)
