"""Importance from attention, its storage in bytes and its crop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mimscale.masking._amt_importance import (
    crop_importance,
    from_bytes,
    importance_from_attention,
    to_bytes,
)
from mimscale.masking.amt import AMT
from mimscale.methods.mae import MAE
from mimscale.models.beit import Beit
from mimscale.models.config import StudentConfig
from mimscale.models.convvit import ConvStages, ConvViT
from mimscale.models.patches import patchify
from mimscale.models.vit import ViT
from tests import golden

WHOLE = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
STUDENT = StudentConfig(width=32, depth=2, heads=4, patch=8)
CONV = ConvStages(patches=(2, 2, 2), widths=(8, 16), depths=(1, 1))


def maps(rows: int = 5, columns: int = 7, batch: int = 3) -> Tensor:
    return torch.rand(batch, rows * columns, generator=torch.Generator().manual_seed(0))


def by_pixels(
    maps_BL: Tensor, grid: tuple[int, int], patch: int, zoom: int, corner: tuple[int, int], flip: bool
) -> Tensor:
    """The map enlarged to `zoom` times the image's pixels, cut at a corner (in these pixels), mirrored, mean per patch.

    The pixels of a crop of 1 / zoom of each side, resized to the whole image's size, lie where those of the enlarged
    map are.
    """
    height, width = grid[0] * patch, grid[1] * patch
    enlarged = F.interpolate(maps_BL.unflatten(1, grid)[:, None], (zoom * height, zoom * width), mode="bilinear")
    cut = enlarged[:, :, corner[0] : corner[0] + height, corner[1] : corner[1] + width]
    return F.avg_pool2d(cut.flip(3) if flip else cut, patch).flatten(1)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("zoom", "corner"), [(1, (0, 0)), (2, (0, 0)), (2, (7, 12)), (2, (20, 28)), (3, (31, 2))])
def test_a_patch_has_the_mean_of_the_enlarged_map_over_its_pixels(
    zoom: int, corner: tuple[int, int], flip: bool
) -> None:
    grid, patch = (5, 7), 4
    values = maps(*grid)
    box = torch.tensor([[corner[0] / zoom / 20, corner[1] / zoom / 28, 1 / zoom, 1 / zoom]]).expand(3, 4)
    ours = crop_importance(values, grid, patch, box, torch.full((3,), flip))
    golden.close(ours, by_pixels(values, grid, patch, zoom, corner, flip))


def test_any_box_and_mirror_of_each_image() -> None:
    """Against the map at each pixel of the crop, and against the mean over the area of a patch in a fine raster."""
    grid, patch = (6, 6), 14
    values = maps(*grid, batch=4)
    boxes = torch.tensor([[0.1, 0.3, 0.55, 0.4], [0.0, 0.0, 1, 1], [-0.05, 0.02, 1.02, 1], [0.71, 0.25, 0.29, 0.68]])
    flips = torch.tensor([True, False, True, False])
    ours = crop_importance(values, grid, patch, boxes, flips)
    for side, limit in ((patch, 1e-5), (10 * patch, 1e-3)):
        theta = torch.zeros(4, 2, 3)  # from the crop to the image, both from -1 to 1
        theta[:, 0, 0] = boxes[:, 3] * torch.where(flips, -1, 1)
        theta[:, 1, 1] = boxes[:, 2]
        theta[:, 0, 2] = 2 * boxes[:, 1] + boxes[:, 3] - 1
        theta[:, 1, 2] = 2 * boxes[:, 0] + boxes[:, 2] - 1
        places = F.affine_grid(theta, [4, 1, 6 * side, 6 * side], align_corners=False)
        images = values.unflatten(1, grid)[:, None]
        pixels = F.grid_sample(images, places, mode="bilinear", padding_mode="border", align_corners=False)
        torch.testing.assert_close(ours, F.avg_pool2d(pixels, side).flatten(1), atol=limit, rtol=0)
    centres = F.affine_grid(theta, [4, 1, 6, 6], align_corners=False)
    at_centres = F.grid_sample(images, centres, mode="bilinear", padding_mode="border", align_corners=False)
    assert (ours - at_centres.flatten(1)).abs().max() > 0.05  # the centre of a patch alone is another number


def test_importance_is_cropped_like_the_image() -> None:
    """A map that is linear in the coordinate gives, after a mirrored crop, the coordinate of each patch in the
    image.
    """
    place = (torch.arange(16) + 0.5) / 16
    box = torch.tensor([[0.25, 0.125, 0.5, 0.75]])
    down = crop_importance(place.repeat_interleave(16)[None], (16, 16), 8, box, torch.tensor([True])).view(16, 16)
    right = crop_importance(place.repeat(16)[None], (16, 16), 8, box, torch.tensor([True])).view(16, 16)
    torch.testing.assert_close(down[:, 3], 0.25 + 0.5 * place)
    torch.testing.assert_close(right[5], (0.125 + 0.75 * place).flip(0))


def test_golden_weights_of_the_patches_and_what_is_drawn() -> None:
    """Whole images: the release's sums over the pixels, and the patches that it masks and drops."""
    g = golden.load("amt_mae_train_dev")
    c = g.config
    patch = c["patch"]
    masking = {"policy": "amt", "ratio": c["mask_ratio"], "drop_ratio": c["throw_ratio"]}
    policy = MAE(golden.mae_run(c, {"masking": masking}), {}).masking
    assert isinstance(policy, AMT) and policy.patch == patch
    for row, step in enumerate(c["amt_microsteps"]):
        table = g["table/1"][g["sample_ids"][step]].flatten(1)
        ours = crop_importance(table, (14, 14), patch, WHOLE.expand(2, 4), torch.zeros(2, dtype=torch.bool))
        golden.close(ours, g["patch_weights"][row] / patch**2)
        masks = policy.draw(ours, g["exponential_noise"][row])
        assert torch.equal(masks.masked.sort(dim=1).values, g["ids_masked"][row].sort(dim=1).values)
        golden.equal(masks.visible.sort(dim=1).values, g["ids_visible"][row].sort(dim=1).values)


def released_crop(
    importance_BL: Tensor, grid: tuple[int, int], boxes_B4: Tensor, flips_B: Tensor, image_size: int
) -> Tensor:
    """The release's crop: float32 [B, L], sums over the pixels of each patch.

    It divides the box by the image's size in integers, which gives 0, or 1 if the crop touches the far edge. So it
    enlarges the map's first 2 (or 3) rows and columns, whatever the crop.
    """
    patch = image_size // grid[0]
    maps = importance_BL.float().unflatten(1, grid)
    sums = []
    for one, box, flip in zip(maps, boxes_B4.tolist(), flips_B.tolist(), strict=True):
        bottom, right = (2 + int(start + length + 1e-6) for start, length in zip(box[:2], box[2:], strict=True))
        pixels = F.interpolate(one[None, None, :bottom, :right], (image_size, image_size), mode="bilinear").clamp(0, 1)
        pixels = pixels.flip(3) if flip else pixels
        sums.append(patchify(pixels, patch).sum(dim=(2, 3, 4))[0])
    return torch.stack(sums)


def test_the_release_enlarges_a_corner_and_we_do_not() -> None:
    """The reason for our own crop: the official numbers are those of `released_crop`, and far from ours."""
    g = golden.load("amt_crop_dev")
    table = g["H_W_i_j_h_w_flip_seed_sliceH_sliceW"]
    for k, (height, width, i, j, h, w, flip, *_) in enumerate(table.tolist()):
        weights = g[f"{k}/weights_14x14"].reshape(1, -1)
        boxes = torch.tensor([[i / height, j / width, h / height, w / width]])
        flips = torch.tensor([bool(flip)])
        released = released_crop(weights, (14, 14), boxes, flips, 224)
        torch.testing.assert_close(released[0], g[f"{k}/patch_weights_196"], atol=2e-4, rtol=0)
        ours = crop_importance(weights, (14, 14), 16, boxes, flips) * 256
        assert (ours - released).abs().max() > 50  # of 256


def test_min_max_per_head_then_mean() -> None:
    g = golden.load("amt_update_mask_dev")
    golden.close(importance_from_attention(g["cls_attention_last_block"]), g["mask_weights"].flatten(1))


def test_constant_attention_gives_zero() -> None:
    constant = torch.full((1, 2, 4), 0.25)
    assert importance_from_attention(constant).tolist() == [[0.0] * 4]
    assert importance_from_attention(torch.zeros(1, 2, 4)).tolist() == [[0.0] * 4]
    half = torch.cat([constant[:, :1], torch.tensor([[[0.1, 0.2, 0.3, 0.4]]])], dim=1)
    torch.testing.assert_close(importance_from_attention(half), torch.tensor([[0, 1 / 6, 1 / 3, 0.5]]))
    assert importance_from_attention(torch.full((1, 2, 4), float("nan"))).isnan().all()


def test_bytes_keep_a_255th() -> None:
    values = torch.linspace(0, 1, 1001)
    assert (from_bytes(to_bytes(values)) - values).abs().max() <= 0.5 / 255 + 1e-7
    assert to_bytes(torch.tensor([0.0, 1.0])).tolist() == [0, 255]


def explicit(network: ViT | Beit | ConvViT, images: Tensor) -> Tensor:
    """The last block's attention from that block's input, by an explicit softmax; mean of rows without class token."""
    caught: dict[str, tuple] = {}
    block: Any = network.blocks3[-1] if isinstance(network, ConvViT) else network.blocks[-1]
    block.attn.register_forward_pre_hook(lambda module, args: caught.update({"in": args}))
    with torch.no_grad():
        network(images)
        x, *bias = caught["in"]
        weight = block.attn.qkv.weight
        qkv = x @ weight.T
        if isinstance(network, Beit):
            qkv = qkv + torch.cat([block.attn.q_bias, 0 * block.attn.q_bias, block.attn.v_bias])
        else:
            qkv = qkv + block.attn.qkv.bias
        q, k, _ = (part.unflatten(2, (4, 8)).transpose(1, 2) for part in qkv.chunk(3, dim=2))
        scores = q @ k.transpose(2, 3) / 8**0.5
        whole = F.softmax(scores if bias in ([], [None]) else scores + bias[0], dim=-1)
    return whole[:, :, 0, 1:] if network.prefix else whole.mean(dim=2)


@pytest.mark.parametrize("kind", ["vit", "relative", "absolute", "conv", "conv with class token"])
def test_attention_of_the_last_block_of_every_encoder(kind: str) -> None:
    torch.manual_seed(0)
    network: ViT | Beit | ConvViT
    if kind == "vit":
        network = ViT(STUDENT, 32)
    elif kind in ("relative", "absolute"):
        network = Beit(STUDENT, 32, positions="relative" if kind == "relative" else "absolute")
    else:
        network = ConvViT(STUDENT, CONV.model_copy(update={"class_token": kind != "conv"}), 32)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    images = torch.randn(2, 3, 32, 32)
    out = network(images, attention=True)
    assert out.attention is not None and out.attention.shape == (2, 4, 16)
    torch.testing.assert_close(out.attention, explicit(network, images))
    assert torch.equal(out.tokens, network(images).tokens) and network(images).attention is None


def test_golden_attention_of_uncropped_images() -> None:
    """12 heads in one file and 4 in the other: no number of heads is assumed."""
    for name in ("amt_update_mask_dev", "amt_mae_dev"):
        g = golden.load(name)
        network = ViT(
            StudentConfig(width=g.config["embed"], depth=g.config["depth"], heads=g.config["heads"], patch=16),
            g.config["img" if "img" in g.config else "img_size"],
        )
        state = {k: v for k, v in g.part("state").items() if "decoder" not in k and k != "mask_token"}
        network.load_state_dict(state)
        images = g["image"] if "image" in g.tensors else F.interpolate(g["image_quarter"], scale_factor=4)
        with torch.no_grad():
            attention = network(images, attention=True).attention
        known = "attention_last_block_full_image"
        golden.close(attention, g[known][:, :, 0, 1:] if known in g.tensors else g["cls_attention_last_block"])
        golden.close(importance_from_attention(attention), g["mask_weights"].flatten(1))
