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


def test_a_crop_of_the_whole_image_changes_nothing_and_a_flip_mirrors() -> None:
    values = maps()
    unchanged = crop_importance(values, (5, 7), WHOLE.expand(3, 4), torch.tensor([False, True, False]))
    torch.testing.assert_close(unchanged[::2], values[::2])
    torch.testing.assert_close(unchanged[1].view(5, 7), values[1].view(5, 7).flip(1))


def test_a_crop_of_whole_patches_is_that_part_of_the_map() -> None:
    """A box of 2 x 2 of 4 x 4 patches: the centres of its 4 x 4 patches lie a quarter patch from those of the map."""
    values = maps(4, 4, 1)
    cropped = crop_importance(values, (4, 4), torch.tensor([[0.25, 0.5, 0.5, 0.5]]), torch.tensor([False])).view(4, 4)
    full = values.view(4, 4)
    expected = (full[1, 2] * 0.75 + full[1, 3] * 0.25) * 0.75 + (full[2, 2] * 0.75 + full[2, 3] * 0.25) * 0.25
    torch.testing.assert_close(cropped[1, 1], expected)
    torch.testing.assert_close(cropped[1, 3], full[1, 3] * 0.75 + full[2, 3] * 0.25)  # outside it goes on


def test_importance_is_cropped_like_the_image() -> None:
    """A map that is linear in the coordinate gives, after a mirrored crop, the coordinate of each patch in the
    image.
    """
    place = (torch.arange(16) + 0.5) / 16
    box = torch.tensor([[0.25, 0.125, 0.5, 0.75]])
    down = crop_importance(place.repeat_interleave(16)[None], (16, 16), box, torch.tensor([True])).view(16, 16)
    right = crop_importance(place.repeat(16)[None], (16, 16), box, torch.tensor([True])).view(16, 16)
    torch.testing.assert_close(down[:, 3], 0.25 + 0.5 * place)
    torch.testing.assert_close(right[5], (0.125 + 0.75 * place).flip(0))


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
        ours = crop_importance(weights, (14, 14), boxes, flips) * 256
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
