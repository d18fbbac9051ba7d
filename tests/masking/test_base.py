"""What all policies share: counts, units, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mimscale.config.registry import names_in
from mimscale.errors import UserError
from mimscale.masking.base import patches_of
from tests.golden import batch_of
from tests.masking.policies import attention_targets, policy, teacher


@pytest.mark.parametrize(
    ("side", "ratio", "keep"), [(14, 0.7, 58), (14, 0.75, 49), (16, 0.75, 64), (16, 0.7, 76), (4, 0.9, 1)]
)
def test_ratio_of_patches_is_rounded_as_in_mae(side: int, ratio: float, keep: int) -> None:
    masking = policy(16 * side, ratio=ratio)
    assert masking.count.visible == keep and masking.count.masked == side**2 - keep


@pytest.mark.parametrize(
    ("size", "unit", "ratio", "masked"), [(224, 32, 0.6, 30), (192, 32, 0.6, 22), (64, 16, 0.5, 8)]
)
def test_ratio_of_units_is_rounded_as_in_simmim(size: int, unit: int, ratio: float, masked: int) -> None:
    assert policy(size, unit=unit, ratio=ratio).count.masked == masked


def test_patches_of_units() -> None:
    assert patches_of(torch.tensor([[5, 0]]), (2, 3), 2).tolist() == [[16, 17, 22, 23, 0, 1, 6, 7]]
    every = torch.arange(6).expand(2, -1)
    assert patches_of(every, (2, 3), 2).sort(dim=1).values.tolist() == [list(range(24))] * 2
    assert patches_of(every, (2, 3), 1) is every


@pytest.mark.parametrize("unit", [None, 16, 32])
@pytest.mark.parametrize("name", names_in("mimscale.masking"))
def test_every_patch_is_in_one_part_at_most(name: str, unit: int | None) -> None:
    """Of every policy; the masks are a function of batch and targets alone."""
    masking = policy(64, 16, teacher(), policy=name, unit=unit)
    generator = torch.Generator().manual_seed(1)
    noise = {key: torch.rand(3, *n.shape, generator=generator) + 0.01 for key, n in masking.needs.noise.items()}
    targets = attention_targets(torch.rand(3, 16, generator=generator))
    drawn = [masking.choose(batch_of(torch.zeros(3, 3, 64, 64), **noise), targets) for _ in range(2)]
    for part, again in zip(*drawn, strict=True):
        assert part.dtype == torch.int64 and torch.equal(part, again)
    ids = torch.cat(drawn[0], dim=1)
    assert drawn[0].visible.shape[1] >= 1 and all(len(set(row)) == len(row) for row in ids.tolist())
    assert int(ids.min()) >= 0 and int(ids.max()) < 16


@pytest.mark.parametrize(
    ("section", "fragment"),
    [
        ({"ratio": 0.95}, "method.masking.ratio = 0.95 leaves 0 of 16 patches visible; lower it"),
        ({"ratio": 0.9, "unit": 32}, "leaves 0 of 4 units of 32 px visible"),
        ({"unit": 24}, "unit = 24 must be a multiple of student.patch = 16"),
        ({"unit": 48}, "divide data.image_size = 64; 16 always fits"),
        ({"unit": 8}, "unit = 8 must be a multiple of student.patch = 16"),
        ({"unit": 0}, "method.masking.unit = 0"),
        ({"ratio": 1.0}, "method.masking.ratio = 1.0: input should be less than 1"),
        ({"policy": "topp"}, "method.masking.policy = 'topp' is unknown; did you mean 'topk'?"),
        ({"policy": "base"}, "method.masking.policy = 'base' is unknown"),
        ({"rato": 0.5}, "unknown key method.masking.rato; did you mean 'ratio'?"),
        ({"teacher": "t"}, "unknown key method.masking.teacher"),
    ],
)
def test_refusals(section: dict[str, Any], fragment: str) -> None:
    with pytest.raises(UserError, match=fragment) as error:
        policy(64, 16, **section)
    assert "\n" not in str(error.value)
