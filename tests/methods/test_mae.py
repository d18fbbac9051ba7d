"""MAE against the official program's numbers, and the properties that make it MAE."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mimscale.convert.formats.mae import from_official
from mimscale.errors import UserError
from mimscale.methods.mae import MAE, masked_patch_loss
from mimscale.models.patches import patchify, unflatten_patches, unpatchify
from mimscale.models.token_selection import mask_of, raster_order
from mimscale.models.vit import ViT
from mimscale.types import IMAGENET_MEAN, IMAGENET_STD
from tests import golden
from tests.golden import batch_of, close, gradient_close, run_config

STUDENT = {"width": 32, "depth": 2, "heads": 2}
DECODER = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}


def small(**values: object) -> MAE:
    torch.manual_seed(3)
    return MAE(run_config({"name": "mae", **DECODER, **values}, STUDENT), {})


def inputs(method: MAE, count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    images = torch.randn(count, 3, 64, 64, generator=generator)
    return images, torch.rand(count, method.student.patches, generator=generator)


def block_outputs(modules: torch.nn.ModuleList) -> dict[int, torch.Tensor]:
    """Filled with the output of each block when the model runs."""
    caught: dict[int, torch.Tensor] = {}
    for index, block in enumerate(modules):
        block.register_forward_hook(lambda _, inputs, output, index=index: caught.update({index: output}))
    modules[0].register_forward_hook(lambda _, inputs, output: caught.update({-1: inputs[0]}))
    return caught


@pytest.mark.parametrize("name", ["mae_dev", "maskmr_mae_dev"])
def test_golden(name: str) -> None:
    g = golden.load(name)
    run = golden.mae_run(g.config)
    method = golden.mae_method(run, from_official(g.part("state")).weights)
    first = name == "mae_dev"
    images, noise = (g["image"], g["noise"]) if first else (g["input/images"], g["mask/noise"])
    batch = batch_of(images, mask=noise)

    masks = method.masking.choose(batch, {})
    ids_keep, raster = masks.visible, raster_order(masks)
    stored_mask = g["mask"] if first else g["mask/binary"]
    assert torch.equal(ids_keep, g["ids_keep"] if first else g["mask/ids_keep"])
    golden.equal(raster.ids_restore, g["ids_restore"] if first else g["mask/ids_restore"])
    assert torch.equal(mask_of(ids_keep, method.student.patches), stored_mask)
    if first:
        assert torch.equal(torch.cat(masks, dim=1), g["ids_shuffle"])

    assert isinstance(method.student, ViT)
    encoder, decoder = block_outputs(method.student.blocks), block_outputs(method.decoder.blocks)
    latent = method.student(batch.images, ids_keep, levels=range(run.student.depth))
    pred = method.decoder(latent.tokens, raster)
    close(latent.tokens, g["latent"])
    for level, output in latent.levels.items():
        close(output, g[f"enc_block_out/{level}"] if first else g["enc/hidden_states"][level])
        assert output is encoder[level]
    if first:
        close(encoder[-1], g["encoder_input"])
        close(decoder[-1], g["decoder_input"])
        for level in range(2):
            close(decoder[level], g[f"dec_block_out/{level}"])
        close(unpatchify(unflatten_patches(pred, 16), run.grid), g["pred_unpatchified"])
    close(pred, g["pred"] if first else g["prediction"])
    target = method.target(batch.images)
    close(target, g["target"])
    per_patch = (pred - target).square().mean(-1)
    close(per_patch, g["loss_per_patch"] if first else g["loss/per_patch"])

    loss = method(batch, {})["loss"]
    stored_loss = g["loss"] if first else g["loss/total"][0]
    golden.loss_close(loss, stored_loss)
    loss.backward()
    ours = {n: p.grad for n, p in method.named_parameters() if p.grad is not None}
    stored = from_official(g.part("grad")).weights
    assert len(stored) >= 9
    for parameter, gradient in stored.items():
        gradient_close(ours[parameter], gradient)
    golden.every_parameter_has_a_gradient(method)
    if first:
        norm = torch.stack([gradient.norm() for gradient in ours.values()]).norm()
        torch.testing.assert_close(norm, g["grad_global_norm"], rtol=1e-5, atol=0)


def test_masked_pixels_do_not_reach_the_latent() -> None:
    method = small()
    images, noise = inputs(method)
    ids_keep = method.masking.choose(batch_of(images, mask=noise), {}).visible
    mask = mask_of(ids_keep, method.student.patches)
    changed = patchify(images, 16) + 5 * mask[:, :, None, None, None]
    latent = method.student(images, ids_keep).tokens
    assert torch.equal(method.student(unpatchify(changed, (4, 4)), ids_keep).tokens, latent)
    assert not torch.equal(method.student(images + 1, ids_keep).tokens, latent)


def test_loss_reads_masked_patches_only() -> None:
    pred, target = torch.zeros(2, 4, 3), torch.ones(2, 4, 3)
    mask = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 0]])
    target[0, 1:] = 7
    target[1, 0] = 3
    assert masked_patch_loss(pred, target, mask) == (1 + 9 + 1 + 1) / 4


def test_needs() -> None:
    assert {k: (n.kind, n.shape) for k, n in small().needs.noise.items()} == {"mask": ("uniform", (16,))}
    run = run_config({"name": "mae", **DECODER}, {**STUDENT, "drop_path": 0.1})
    method = MAE(run, {})
    assert method.needs.noise["drop_path"].shape == (2, 2)
    images, noise = inputs(method)
    kept = method(batch_of(images, mask=noise, drop_path=torch.full((3, 2, 2), 0.5)), {})["loss"]
    dropped = method(batch_of(images, mask=noise, drop_path=torch.zeros(3, 2, 2)), {})["loss"]
    assert kept != dropped


@pytest.mark.parametrize("norm_pix", [True, False])
def test_reconstruction_of_a_perfect_prediction_is_the_image(norm_pix: bool) -> None:
    method = small(norm_pix_loss=norm_pix)
    images, noise = inputs(method)
    images = images * 0.3  # so that the pixels lie within 0..1
    std, mean = torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1)
    pixels = images * std + mean
    assert pixels.min() >= 0 and pixels.max() <= 1
    torch.testing.assert_close(method.reconstruct(method.target(images), images), pixels, atol=1e-5, rtol=0)

    view = method.view(batch_of(images, mask=noise), {})
    torch.testing.assert_close(view.images, pixels)
    assert view.reconstruction is not None and view.mask is not None
    assert view.reconstruction.shape == images.shape and not view.reconstruction.requires_grad
    assert torch.equal(view.mask, mask_of(noise.argsort(dim=1)[:, :4], 16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_fp32(dtype: torch.dtype) -> None:
    method = small()
    images, noise = inputs(method, 8)
    batch = batch_of(images, mask=noise)
    full = method(batch, {})["loss"]
    for parameter in method.parameters():
        parameter.data = parameter.data.to(dtype)  # as DeepSpeed does: parameters, not buffers
    half = method(batch, {})["loss"]
    assert half.dtype == torch.float32 and method.student.pos_embed.dtype == torch.float32
    half.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())
    torch.testing.assert_close(half, full, rtol=5e-3, atol=0)


def test_no_global_generator_is_touched() -> None:
    method = MAE(run_config({"name": "mae", **DECODER}, {**STUDENT, "drop_path": 0.5}), {})
    images, noise = inputs(method)
    before = torch.get_rng_state()
    batch = batch_of(images, mask=noise, drop_path=torch.rand(3, 2, 2, generator=torch.Generator().manual_seed(1)))
    first = method(batch, {})["loss"]
    first.backward()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(method(replace(batch), {})["loss"], first)


@pytest.mark.parametrize(
    ("method", "fragment"),
    [
        ({"masking": {"ratio": 0.95}}, "leaves 0 of 16"),
        ({"masking": {"ratio": 0.0}}, "leaves 16 of 16"),
        ({"decoder_heads": 3}, "by 4"),
    ],
)
def test_refusals(method: dict[str, object], fragment: str) -> None:
    with pytest.raises(UserError, match=fragment):
        small(**method)
