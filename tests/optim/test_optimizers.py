"""Every optimiser that a recipe can name keeps its promise to engines and checkpoints."""

from __future__ import annotations

import pytest
import torch

from mimscale.config.registry import names_in, section_by_name
from mimscale.optim.optimizers.base import Piece, optimizer_class

PACKAGE = "mimscale.optim.optimizers"
SHAPES = ((3, 5), (7,), (1,), (2, 4))


def steps(name: str, flat: bool, created: bool, count: int = 4) -> tuple[torch.optim.Optimizer, list[torch.Tensor]]:
    """An optimiser and its tensors after some steps. flat: all parameters in one tensor, as ZeRO concatenates them."""
    kind, config = optimizer_class(name), section_by_name(PACKAGE, {"name": name}, "optim.name")
    random = torch.Generator().manual_seed(0)
    values = torch.randn(sum(torch.Size(shape).numel() for shape in SHAPES), generator=random)
    parts = values.split([torch.Size(shape).numel() for shape in SHAPES])
    tensors = [values.clone()] if flat else [p.view(s).clone() for p, s in zip(parts, SHAPES, strict=True)]
    optimizer = kind.TORCH(tensors, lr=0.1, **kind.options(config, fused=False))  # type: ignore[call-arg]
    if flat:
        starts = [sum(torch.Size(shape).numel() for shape in SHAPES[:n]) for n in range(len(SHAPES))]
        pieces = [
            Piece(tensors[0], start, torch.Size(shape).numel(), str(shape), len(shape))
            for start, shape in zip(starts, SHAPES, strict=True)
        ]
        kind.use_pieces(optimizer, pieces, [str(shape) for shape in SHAPES], lambda tensor: tensor)
    if created:
        kind.create_state(optimizer, tensors, 0)
    for _ in range(count):
        gradient = torch.randn(values.shape, generator=random)
        for tensor, part in zip(tensors, gradient.split([t.numel() for t in tensors]), strict=True):
            tensor.grad = part.view(tensor.shape).clone()
        optimizer.step()
    return optimizer, tensors


@pytest.mark.parametrize("name", names_in(PACKAGE))
def test_state_is_what_it_says_and_zeros_are_a_valid_start(name: str) -> None:
    kind = optimizer_class(name)
    optimizer, tensors = steps(name, flat=False, created=False)
    ours, same = steps(name, flat=False, created=True)
    for tensor, other in zip(tensors, same, strict=True):
        assert torch.equal(tensor, other)
        state, created = optimizer.state[tensor], ours.state[other]
        expected = {*kind.STATES, *(("step",) if kind.COUNTS_STEPS else ())}
        assert state.keys() == created.keys() == expected
        assert all(torch.equal(state[key], created[key]) for key in expected)
        assert all(created[key].shape == tensor.shape and created[key].any() for key in kind.STATES)
        assert all(created[key].dtype == torch.float32 for key in expected)


@pytest.mark.parametrize("name", names_in(PACKAGE))
def test_works_on_concatenated_parameters(name: str) -> None:
    _, tensors = steps(name, flat=False, created=True)
    _, (joined,) = steps(name, flat=True, created=True)
    torch.testing.assert_close(joined, torch.cat([tensor.flatten() for tensor in tensors]), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", names_in(PACKAGE))
def test_a_restored_step_is_counted_per_tensor(name: str) -> None:
    kind = optimizer_class(name)
    optimizer, tensors = steps(name, flat=False, created=True, count=0)
    kind.create_state(optimizer, tensors, 7)
    for tensor in tensors:
        tensor.grad = torch.ones_like(tensor)
    optimizer.step()
    if kind.COUNTS_STEPS:
        assert [float(optimizer.state[tensor]["step"]) for tensor in tensors] == [8.0] * len(tensors)
