"""Patches that a masking policy drops have no effect on the loss of any method."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mimscale.config.run import method_class
from mimscale.masking.random import Random
from mimscale.methods.base import MaskedMethod
from mimscale.models.patches import patchify, unpatchify
from mimscale.types import Batch, Masks, Targets, TeacherInfo
from tests import golden
from tests.golden import batch_of, run_config
from tests.ranks import DECODER

CLIP = TeacherInfo("clip", dim=24, depth=3, grid=(6, 6), image_size=96, has_cls=True)
STAGES = {"widths": [8, 12], "depths": [1, 2]}
METHODS: dict[str, dict[str, Any]] = {
    "mae": DECODER,
    "mff": {**DECODER, "fusion": {"levels": [0, 2]}},
    "convmae": {**DECODER, "stages": STAGES},
    "mrmae": DECODER,
    "simmim": {"positions": "absolute"},
    "maskalign": {"levels": "top2"},
}


class Dropping(Random):
    """In MAE's order: the first twelve patches are visible, the next eight masked, the last sixteen dropped."""

    def choose(self, batch: Batch, targets: Any) -> Masks:
        order = batch.noise["mask"].argsort(dim=1)
        return Masks(order[:, :12], order[:, 12:20])


def build(name: str) -> tuple[MaskedMethod, dict[str, Targets]]:
    torch.manual_seed(3)
    section = {"name": name, "masking": {"policy": "random", "unit": None}, **METHODS[name]}
    run = run_config(section, {"width": 32, "depth": 3, "heads": 4}, 96)
    teachers = {"clip": CLIP} if name in ("mrmae", "maskalign") else {}
    method = method_class(name)(run, teachers)
    method.masking = Dropping(run.method.masking, run, teachers)  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(5)
    levels = {level: torch.randn(3, 36, 24, generator=generator) for level in range(3)}
    cls = {level: torch.randn(3, 24, generator=generator) for level in range(3)}
    return method, {"clip": Targets(levels, cls)} if teachers else {}


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(3, 3, 96, 96, generator=generator), torch.rand(3, 36, generator=generator)


@pytest.mark.parametrize("name", METHODS)
def test_dropped_patches_have_no_effect(name: str) -> None:
    method, targets = build(name)
    images, noise = inputs()
    order = noise.argsort(dim=1)
    loss = method(batch_of(images, mask=noise), targets)["loss"]
    loss.backward()
    golden.every_parameter_has_a_gradient(method)

    def changed(ids: Tensor) -> Tensor:
        shift = torch.zeros(3, 36).scatter(1, ids, 1.0)[:, :, None, None, None]
        scribble = torch.randn(3, 36, 3, 16, 16, generator=torch.Generator().manual_seed(6))
        return method(batch_of(unpatchify(patchify(images, 16) + shift * scribble, (6, 6)), mask=noise), targets)[
            "loss"
        ]

    assert torch.equal(changed(order[:, 20:]), loss)
    assert not torch.equal(changed(order[:, :12]), loss)
    assert torch.equal(changed(order[:, 12:20]), loss) == (name == "maskalign")  # which predicts nothing masked

    swapped = noise.scatter(1, order[:, 20:], noise.gather(1, order[:, 20:].flip(1)))  # dropped in another order
    assert torch.equal(method(batch_of(images, mask=swapped), targets)["loss"], loss)
    view = method.view(batch_of(images, mask=noise), targets)
    assert view is not None and view.mask is not None
    assert torch.equal(view.mask, torch.zeros(3, 36).scatter(1, order[:, 12:20], 1.0))
    assert view.dropped is not None and torch.equal(view.dropped, torch.zeros(3, 36).scatter(1, order[:, 20:], 1.0))
    assert view.reconstruction is None or view.reconstruction.shape == images.shape
