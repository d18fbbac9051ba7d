"""The fast path `masked_decoder`: the loss and gradients of its plain twin, for less arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mimscale.config.run import method_class
from mimscale.masking.random import Random
from mimscale.methods.base import MaskedMethod
from mimscale.models.targets import normalised_pixels, pixel_statistics, pixel_target
from mimscale.types import Batch, Masks, Targets, TeacherInfo
from tests.golden import batch_of, run_config
from tests.ranks import DECODER

CLIP = TeacherInfo("clip", dim=24, depth=3, grid=(6, 6), image_size=96, has_cls=True)
STAGES = {"widths": [8, 12], "depths": [1, 2]}
METHODS: dict[str, dict[str, Any]] = {
    "mae": {"name": "mae", **DECODER},
    "mae, raw pixels": {"name": "mae", **DECODER, "norm_pix_loss": False, "decoder_depth": 1},
    "pixmim": {"name": "pixmim", **DECODER, "low_pass_radius": 20.0},
    "mff": {"name": "mff", **DECODER, "fusion": {"levels": [0, 2]}},
    "convmae": {"name": "convmae", **DECODER, "stages": STAGES},
    "mrmae": {"name": "mrmae", **DECODER},
    "mrmae, class token": {"name": "mrmae", **DECODER, "stages": {**STAGES, "class_token": True}},
    "simmim": {"name": "simmim"},
    "simmim, a bias per block": {"name": "simmim", "positions": "per_block"},
    "simmim, fused levels": {"name": "simmim", "positions": "absolute", "fusion": {"kind": "mff", "levels": [0, 2]}},
}


class Dropping(Random):
    """The first twelve patches of a permutation are visible, the next eight masked, the last sixteen dropped."""

    def choose(self, batch: Batch, targets: Any) -> Masks:
        order = batch.noise["mask"].argsort(dim=1)
        return Masks(order[:, :12], order[:, 12:20])


class Keeping(Random):
    """Nine patches are visible, all others masked."""

    def choose(self, batch: Batch, targets: Any) -> Masks:
        order = batch.noise["mask"].argsort(dim=1)
        return Masks(order[:, :9], order[:, 9:])


def build(name: str, policy: type[Random], **engine: Any) -> MaskedMethod:
    section = {**METHODS[name], "masking": {"policy": "random", "unit": None}}
    run = run_config(section, {"width": 32, "depth": 3, "heads": 4, "drop_path": 0.3}, 96, engine=engine)
    teachers = {"clip": CLIP} if section["name"] == "mrmae" else {}
    torch.manual_seed(3)
    method: Any = method_class(section["name"])(run, teachers)
    generator = torch.Generator().manual_seed(6)
    for parameter in method.parameters():  # biases and norms too are away from zero and one
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    config: Any = run.method
    method.masking = policy(config.masking, run, teachers)
    return method


def inputs(method: MaskedMethod) -> tuple[Batch, dict[str, Targets]]:
    generator = torch.Generator().manual_seed(4)
    images, mask = torch.randn(3, 3, 96, 96, generator=generator), torch.rand(3, 36, generator=generator)
    noise = torch.rand(3, method.student.depth, 2, generator=generator)
    levels = {level: torch.randn(3, 36, 24, generator=generator) for level in range(3)}
    cls = {level: torch.randn(3, 24, generator=generator) for level in range(3)}
    return batch_of(images, mask=mask, drop_path=noise), {"clip": Targets(levels, cls)}


def step(method: MaskedMethod) -> tuple[Tensor, dict[str, Tensor], int]:
    """Loss, gradients, floating-point operations of forward and backward."""
    batch, targets = inputs(method)
    with FlopCounterMode(display=False) as counter:
        loss = method(batch, targets)["loss"]
        loss.backward()
    return (
        loss.detach(),
        {n: p.grad for n, p in method.named_parameters() if p.grad is not None},
        counter.get_total_flops(),
    )


@pytest.mark.parametrize("policy", [Keeping, Dropping])
@pytest.mark.parametrize("name", METHODS)
def test_equals_its_plain_twin(name: str, policy: type[Random]) -> None:
    fast, plain = build(name, policy), build(name, policy, plain=["masked_decoder"])
    loss, gradients, flops = step(fast)
    plain_loss, plain_gradients, plain_flops = step(plain)
    torch.testing.assert_close(loss, plain_loss, rtol=2e-6, atol=0)
    assert gradients.keys() == plain_gradients.keys()
    for parameter, gradient in plain_gradients.items():
        torch.testing.assert_close(gradients[parameter], gradient, rtol=0, atol=2e-5 * float(gradient.abs().max()))
    assert flops < plain_flops
    batch, targets = inputs(fast)
    ours, theirs = fast.view(batch, targets), plain.view(batch, targets)
    assert ours is not None and theirs is not None and ours.reconstruction is not None
    assert theirs.reconstruction is not None and torch.equal(ours.reconstruction, theirs.reconstruction)


def test_a_run_says_which_twin_it_computes() -> None:
    assert build("mae", Keeping).notes == [
        "masked_decoder: on (27 of 36 patches are read)",
        "fused_residual: on (drop path 0.3)",
    ]
    assert build("simmim", Keeping, plain=["masked_decoder", "fused_residual"]).notes == [
        "masked_decoder: off (as engine.plain says)",
        "fused_residual: off (as engine.plain says)",
    ]


def test_recomputed_blocks_change_no_gradient() -> None:
    kept, recomputed = (build("mae", Keeping, activation_checkpointing=every) for every in (0, 1))
    (loss, gradients, _), (again, other, _) = step(kept), step(recomputed)
    assert torch.equal(loss, again) and all(torch.equal(gradients[name], other[name]) for name in gradients)


def test_the_decoder_saves_what_it_leaves_out() -> None:
    """Output projection, MLP and prediction of nine visible patches and the class token, forward and backward. (torch
    does not count the operations of its attention kernel for CPUs.)
    """
    fast, plain = build("mae", Keeping), build("mae", Keeping, plain="all")
    width, images, pixels = DECODER["decoder_width"], 3, 768
    products = 10 * (9 * width * width) + 9 * width * pixels  # the class token's pixels are predicted by neither
    assert step(plain)[2] - step(fast)[2] == 3 * 2 * images * products


@pytest.mark.parametrize("patch", [4, 16])
def test_target_of_some_patches(patch: int) -> None:
    images = 50 * torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) + 300
    images[0, :, :patch, :patch] = 7.0  # a flat patch
    ids = torch.tensor([[3, 0], [1, 2]])
    rows = torch.arange(2)[:, None]
    assert torch.equal(pixel_target(images, patch, False, ids), pixel_target(images, patch, False)[rows, ids])
    whole = pixel_target(images.double(), patch, True).double()[rows, ids]
    some, plain = pixel_target(images, patch, True, ids), pixel_target(images, patch, True)[rows, ids]
    torch.testing.assert_close(some.double(), whole, rtol=0, atol=1e-4)
    assert (some - whole).abs().max() <= 2 * (plain - whole).abs().max() + 1e-6


def test_normalised_pixels_have_unit_unbiased_variance() -> None:
    pixels = torch.randn(2, 3, 768, generator=torch.Generator().manual_seed(2)) * 4 + 1
    mean, deviation = pixel_statistics(normalised_pixels(pixels))
    torch.testing.assert_close(mean, torch.zeros(2, 3, 1), rtol=0, atol=1e-6)
    torch.testing.assert_close(deviation, torch.ones(2, 3, 1))
