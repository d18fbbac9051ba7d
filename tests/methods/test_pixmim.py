"""PixMIM against the official program's numbers, and the properties that make it PixMIM."""

from __future__ import annotations

import pytest
import torch

from mimscale.convert.formats import openmmlab
from mimscale.errors import UserError
from mimscale.methods.mae import MAE
from mimscale.methods.pixmim import PixMIM
from mimscale.models.patches import patchify, unpatchify
from mimscale.models.targets import low_pass, low_pass_disc
from mimscale.models.token_selection import mask_of, raster_order
from mimscale.optim.param_groups import is_decayed
from mimscale.types import imagenet_statistics
from tests import golden
from tests.golden import batch_of, close, gradient_close, run_config

STUDENT = {"width": 32, "depth": 2, "heads": 2}
SECTION = {"name": "pixmim", "low_pass_radius": 10, "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}


def small(**values: object) -> PixMIM:
    torch.manual_seed(3)
    return PixMIM(run_config({**SECTION, **values}, STUDENT), {})


def inputs(count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(count, 3, 64, 64, generator=generator), torch.rand(count, 16, generator=generator)


def test_golden() -> None:
    g = golden.load("pixmim_dev")
    method = PixMIM(golden.mae_run(g.config, {"name": "pixmim", "low_pass_radius": g.config["radius"]}), {})
    method.load_state_dict(openmmlab.from_official(g.part("state")).weights)
    masks = method.masking.choose(batch_of(g["image"], mask=g["noise"]), {})
    ids_keep = masks.visible
    assert torch.equal(raster_order(masks).ids_restore, g["ids_restore"])
    golden.equal(mask_of(ids_keep, method.student.patches), g["mask"])

    batch = batch_of(g["image"], mask=g["noise"])
    close(method.target_images(batch.images), g["low_freq_image"])
    close(method.target(batch.images), g["target"])
    close(method.encode(batch, ids_keep)[0], g["latent"])
    close(method.predict(batch, {}).pred, g["pred"])
    loss = method(batch, {})["loss"]
    golden.loss_close(loss, g["loss"])
    loss.backward()
    ours = {name: p.grad for name, p in method.named_parameters()}
    stored = openmmlab.from_official(g.part("grad")).weights
    assert len(stored) >= 5
    for name, gradient in stored.items():
        gradient_close(ours[name], gradient)
    golden.every_parameter_has_a_gradient(method)


def test_golden_names() -> None:
    """The filter that the release stores is left out: it follows from the radius."""
    state = golden.load("pixmim_dev").part("state")
    filtered = {**state, "target_generator.low_pass_filter": low_pass_disc((64, 64), 12).expand(3, 64, 64)}
    ours = openmmlab.from_official(filtered)
    assert len(ours.notes) == 1 and "target_generator.low_pass_filter" in ours.notes[0]
    back = openmmlab.to_official(ours.weights).weights
    assert back.keys() == state.keys() and all(torch.equal(back[name], tensor) for name, tensor in state.items())


def test_the_encoder_sees_the_image_and_the_loss_its_low_frequencies() -> None:
    method, (images, noise) = small(), inputs()
    mae = MAE(run_config({**SECTION, "name": "mae", "low_pass_radius": None}, STUDENT), {})
    mae.load_state_dict(method.state_dict())
    batch = batch_of(images, mask=noise)
    assert torch.equal(method.predict(batch, {}).pred, mae.predict(batch, {}).pred)
    assert method(batch, {})["loss"] != mae(batch, {})["loss"]
    assert torch.equal(method.target(images), mae.target(low_pass(images, 10)))


def test_whole_image_is_filtered_before_it_is_cut() -> None:
    """A change of one patch reaches the targets of all, so the filter does not run patch by patch."""
    method, (images, _) = small(norm_pix_loss=False), inputs(1)
    changed = patchify(images, 16).clone()
    changed[:, 0] += 2
    moved = (method.target(unpatchify(changed, (4, 4))) - method.target(images)).abs().amax(dim=-1)
    assert (moved > 1e-4).all()


@pytest.mark.parametrize("norm_pix", [True, False])
def test_reconstruction_of_a_perfect_prediction_is_the_filtered_image(norm_pix: bool) -> None:
    method, (images, noise) = small(norm_pix_loss=norm_pix), inputs()
    images = images * 0.3
    mean, std = imagenet_statistics(images.device)
    expected = (low_pass(images, 10) * std + mean).clamp(0, 1)
    torch.testing.assert_close(method.reconstruct(method.target(images), images), expected, atol=1e-5, rtol=0)
    view = method.view(batch_of(images, mask=noise), {})
    torch.testing.assert_close(view.images, (images * std + mean).clamp(0, 1))


def test_tokens_are_not_decayed() -> None:
    method = small()
    decayed = {n for n, p in method.named_parameters() if is_decayed(n, p, method.no_weight_decay())}
    assert not decayed & {"student.cls_token", "decoder.mask_token"}
    assert {"student.patch_embed.proj.weight", "decoder.embed.weight"} <= decayed


def test_drop_path_comes_from_noise() -> None:
    method, (images, noise) = PixMIM(run_config(SECTION, {**STUDENT, "drop_path": 0.3}), {}), inputs()
    before = torch.get_rng_state()
    kept = method(batch_of(images, mask=noise, drop_path=torch.full((3, 2, 2), 0.99)), {})["loss"]
    dropped = method(batch_of(images, mask=noise, drop_path=torch.zeros(3, 2, 2)), {})["loss"]
    assert kept != dropped and torch.equal(torch.get_rng_state(), before)
    kept.backward()
    golden.every_parameter_has_a_gradient(method)


@pytest.mark.parametrize(
    ("values", "fragment"),
    [
        ({"low_pass_radius": 0.5}, "low_pass_radius = 0.5 passes 0 of 4096 frequencies at 64 px; choose one between"),
        ({"low_pass_radius": 60}, "passes 4096 of 4096"),
        ({"low_pass_radius": 0}, "low_pass_radius"),
        ({"low_pass_radius": None}, "low_pass_radius"),
        ({"masking": {"ratio": 0.0}}, "leaves 16 of 16"),
    ],
)
def test_refusals(values: dict[str, object], fragment: str) -> None:
    with pytest.raises(UserError, match=fragment) as error:
        small(**values)
    assert "\n" not in str(error.value)
