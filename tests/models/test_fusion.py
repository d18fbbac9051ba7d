"""The fusion of levels: what it computes and what it builds."""

from __future__ import annotations

import pytest
import torch

from mimscale.models.fusion import LevelFusion
from tests.golden import close


def levels(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(2, 5, 8, generator=generator) for _ in range(count)]


def test_starts_as_a_plain_mean() -> None:
    fusion, inputs = LevelFusion(8, 3), levels(3)
    with torch.no_grad():
        for name, parameter in fusion.projections.named_parameters():
            if name.endswith("weight"):
                parameter.copy_(torch.eye(8))
    fused = fusion(inputs)
    close(fused.tokens, torch.stack(inputs).mean(dim=0))
    close(fused.weights, torch.full((3,), 1 / 3))
    assert fused.tokens.requires_grad and not fused.weights.requires_grad


def test_weights_follow_the_logits_and_only_shallow_levels_are_projected() -> None:
    fusion, inputs = LevelFusion(8, 3), levels(3)
    assert fusion.logits is not None
    with torch.no_grad():
        fusion.logits.copy_(torch.tensor([0.0, -1e4, 1.0]).view(3, 1, 1, 1))
    fused = fusion(inputs)
    share = torch.tensor([0.0, 1.0]).softmax(dim=0)
    close(fused.weights, torch.stack([share[0], torch.tensor(0.0), share[1]]))
    close(fused.tokens, share[0] * fusion.projections[0](inputs[0]) + share[1] * inputs[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_levels_are_summed_in_fp32(dtype: torch.dtype) -> None:
    fusion, inputs = LevelFusion(8, 6).to(dtype), [x.to(dtype) for x in levels(6)]
    half = fusion(inputs)
    full = fusion.float()([x.float() for x in inputs])
    assert half.tokens.dtype == dtype and half.weights.dtype == torch.float32
    close(half.weights, full.weights)
    torch.testing.assert_close(half.tokens.float(), full.tokens, atol=2e-2, rtol=1e-2)


def test_a_single_level_is_handed_through() -> None:
    fusion, inputs = LevelFusion(8, 1), levels(1)
    fused = fusion(inputs)
    assert fused.tokens is inputs[0] and fused.weights.tolist() == [1.0]
    assert not list(fusion.parameters())
