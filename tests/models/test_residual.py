"""The fast path `fused_residual`: drop path and residual sum in one kernel, in every kind of Block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mimscale.models import beit, convvit, vit
from tests.operators import Operators


def blocks() -> dict[str, tuple[Any, tuple[int, ...], tuple[Any, ...]]]:
    """Name -> (Block, shape of its input, further arguments)."""
    torch.manual_seed(0)
    return {
        "vit": (vit.Block(32, 4), (4, 6, 32), ()),
        "beit": (beit.Block(32, 4, 4.0, layer=1, layer_scale=0.1), (4, 6, 32), ()),
        "convvit": (convvit.ConvBlock(8), (4, 4, 2, 2, 8), ((2, 2),)),
    }


def step(block: nn.Module, x: Tensor, extra: tuple[Any, ...], fused: bool) -> tuple[Tensor, list[Tensor], Operators]:
    vit.set_fused_residuals(block, fused)
    scales = torch.tensor([[0.0, 1.25], [1.25, 0.0], [1.25, 1.25], [0.0, 0.0]])
    x = x.detach().requires_grad_()
    block.zero_grad()
    with Operators() as operators:
        out = block(x, scales, *extra)
        out.square().sum().backward()
    gradients = [x.grad, *(p.grad for p in block.parameters())]
    return out.detach(), [g.clone() for g in gradients if g is not None], operators


@pytest.mark.parametrize("name", ["vit", "beit", "convvit"])
def test_equals_its_plain_twin(name: str) -> None:
    block, shape, extra = blocks()[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    fused, gradients, operators = step(block, x, extra, True)
    plain, expected, plain_operators = step(block, x, extra, False)
    torch.testing.assert_close(fused, plain, rtol=0, atol=1e-6)
    assert len(gradients) == len(expected) == 1 + len(list(block.parameters()))
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6 * float(theirs.abs().max()) + 1e-7)
    assert operators.names["aten.addcmul.default"] == 2 and plain_operators.names["aten.addcmul.default"] == 0
    assert torch.equal(fused[3], x[3])  # both branches dropped


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_is_rounded_once_in_16_bit(dtype: torch.dtype) -> None:
    residual = vit.Residual()
    x, branch = (torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(s)).to(dtype) for s in (2, 3))
    scales = torch.tensor([[1.25, 0.0], [0.0, 1.25], [1.25, 1.25]])
    exact = x.double() + branch.double() * scales[:, 0].double()[:, None, None]
    assert torch.equal(residual.add_branch(x, branch, scales, 0), exact.to(dtype))
    residual.fused = False
    assert not torch.equal(residual.add_branch(x, branch, scales, 0), exact.to(dtype))
