"""Second implementations of ConvMAE's encoder, MAE's decoder and SimMIM's head, for check.py to compare with.

They are built of timm's and torch's modules and take official names. Nothing of `mimscale.models` is used, so that a
tensor under a wrong name, swapped halves of a table or another epsilon show up as a difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mimscale.convert.names import below

LN_EPS, STAGE_EPS = 1e-6, 1e-5


def convmae_encoder(state: Mapping[str, Tensor], image_B3HW: Tensor, heads: int) -> Tensor:
    """All tokens [B, (1+)L, D] of an unmasked image, after the last norm (an untrained one where there is none)."""

    def conv(name: str, x: Tensor, **options: Any) -> Tensor:
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **options)

    def norm(name: str, x: Tensor) -> Tensor:
        weight = state[f"{name}.weight"]
        return F.layer_norm(x.movedim(1, -1), weight.shape, weight, state[f"{name}.bias"], STAGE_EPS).movedim(-1, 1)

    x, early = image_B3HW, []
    for stage in (1, 2, 3):
        name = f"patch_embed{stage}"
        x = F.gelu(norm(f"{name}.norm", conv(f"{name}.proj", x, stride=state[f"{name}.proj.weight"].shape[-1])))
        for index in range(_depth(state, f"blocks{stage}.") if stage < 3 else 0):
            block = f"blocks{stage}.{index}"
            mixed = conv(f"{block}.conv1", norm(f"{block}.norm1", x))
            mixed = conv(f"{block}.attn", mixed, padding="same", groups=mixed.shape[1])
            x = x + conv(f"{block}.conv2", mixed)
            widened = F.gelu(conv(f"{block}.mlp.fc1", norm(f"{block}.norm2", x)))
            x = x + conv(f"{block}.mlp.fc2", widened)
        fusion = f"stage{stage}_output_decode"
        if f"{fusion}.weight" in state:
            early.append(conv(fusion, x, stride=state[f"{fusion}.weight"].shape[-1]).flatten(2).mT)
    x = F.linear(x.flatten(2).mT, state["patch_embed4.weight"], state["patch_embed4.bias"])
    prefix = int("cls_token" in state)
    if prefix:
        x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], dim=1)
    x = _blocks(state, "blocks3.", heads, x + state["pos_embed"])
    x = x + sum(F.pad(level, (0, 0, prefix, 0)) for level in early)
    return F.layer_norm(x, x.shape[-1:], state.get("norm.weight"), state.get("norm.bias"), LN_EPS)


def mae_decoder(state: Mapping[str, Tensor], latent_BTD: Tensor, ids_restore_BL: Tensor, heads: int) -> Tensor:
    """Predicted pixels [B, L, p*p*3] from the latent of the visible tokens, under MAE's official names."""
    x = F.linear(latent_BTD, state["decoder_embed.weight"], state["decoder_embed.bias"])
    prefix = state["decoder_pos_embed"].shape[1] - ids_restore_BL.shape[1]
    missing = ids_restore_BL.shape[1] - (x.shape[1] - prefix)
    body = torch.cat([x[:, prefix:], state["mask_token"].expand(len(x), missing, -1)], dim=1)
    body = torch.stack([tokens[order] for tokens, order in zip(body, ids_restore_BL, strict=True)])
    x = torch.cat([x[:, :prefix], body], dim=1) + state["decoder_pos_embed"]
    x = _blocks(state, "decoder_blocks.", heads, x)
    x = F.layer_norm(x, x.shape[-1:], state["decoder_norm.weight"], state["decoder_norm.bias"], LN_EPS)
    return F.linear(x, state["decoder_pred.weight"], state["decoder_pred.bias"])[:, prefix:]


def simmim_head(state: Mapping[str, Tensor], tokens_BLD: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """Predicted image [B, 3, H, W], under SimMIM's official names: a 1 x 1 convolution and a pixel shuffle."""
    maps = tokens_BLD.mT.unflatten(2, grid)
    return F.pixel_shuffle(F.conv2d(maps, state["decoder.0.weight"], state["decoder.0.bias"]), patch)


def _depth(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.split(".")[1] for name in state if name.startswith(prefix)})


def _blocks(state: Mapping[str, Tensor], prefix: str, heads: int, x_BTD: Tensor) -> Tensor:
    width = x_BTD.shape[-1]
    for index in range(_depth(state, prefix)):
        weights = below(f"{prefix}{index}.", state)
        ratio = len(weights["mlp.fc1.bias"]) / width
        norm = partial(nn.LayerNorm, eps=LN_EPS)
        block = Block(width, heads, mlp_ratio=ratio, qkv_bias=True, norm_layer=norm).eval()  # type: ignore[arg-type]
        block.load_state_dict(weights)
        x_BTD = block(x_BTD)
    return x_BTD
