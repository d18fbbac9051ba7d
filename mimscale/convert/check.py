"""The checks of a conversion: our network against timm's, or against `reference`, on the same random input."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimscale.convert import reference
from mimscale.convert.difference import Differences, random_input, relative_difference
from mimscale.convert.formats import mae, simmim, timm
from mimscale.convert.names import State
from mimscale.convert.networks import Student
from mimscale.methods.base import Method
from mimscale.models.beit import Beit
from mimscale.models.convvit import ConvViT
from mimscale.models.decoder import MAEDecoder
from mimscale.models.patches import unpatchify
from mimscale.models.pixel_head import PixelHead
from mimscale.models.token_selection import raster_order
from mimscale.models.vit import LN_EPS
from mimscale.types import Masks


@torch.no_grad()
def tokens_of(vit: Student) -> Tensor:
    """All tokens [1, (1+)L, D] of the random image, after the last norm, or an untrained one where there is none."""
    tokens = vit.eval()(random_input(1, 3, *(side * vit.config.patch for side in vit.grid))).tokens
    return tokens if isinstance(vit.norm, nn.LayerNorm) else F.layer_norm(tokens, tokens.shape[-1:], eps=LN_EPS)


@torch.no_grad()
def logits_of(vit: Student, weights: Mapping[str, Tensor]) -> Tensor:
    """What a classifier makes of the random image: [1, classes]. weights: they hold its `head`, and `fc_norm` where it
    classifies the mean of the patches.
    """
    tokens = vit.eval()(random_input(1, 3, *(side * vit.config.patch for side in vit.grid))).tokens
    pooled = tokens[:, 0]
    if "fc_norm.weight" in weights:
        pooled = tokens[:, vit.prefix :].mean(dim=1)
        pooled = F.layer_norm(pooled, pooled.shape[-1:], weights["fc_norm.weight"], weights["fc_norm.bias"], LN_EPS)
    return F.linear(pooled, weights["head.weight"], weights["head.bias"])


@torch.no_grad()
def encoder_difference(vit: Student, encoder: Mapping[str, Tensor]) -> float:
    """Our student against timm's network (ConvMAE's encoder: against `reference`) with the tensors of `encoder`."""
    size = vit.grid[0] * vit.config.patch
    image = random_input(1, 3, size, size)
    if isinstance(vit, ConvViT):
        return relative_difference(tokens_of(vit), reference.convmae_encoder(encoder, image, vit.config.heads))
    network: Any = timm.create_model(vit)
    network.load_state_dict(timm.with_stored_index(vit, timm.with_last_norm(encoder)))
    return relative_difference(tokens_of(vit), network.forward_features(image))


@torch.no_grad()
def timm_differences(vit: Student, weights: Mapping[str, Tensor], folder: Path) -> Differences:
    """Our student against timm's network, which loads the folder as a user's does; a classifier's logits too."""
    import timm as library

    network: Any = library.create_model(f"local-dir:{folder}", pretrained=True).eval()
    size = vit.grid[0] * vit.config.patch
    image = random_input(1, 3, size, size)
    if "head.weight" not in weights:
        return {"encoder": relative_difference(tokens_of(vit), network.forward_features(image))}
    tokens, features = vit.eval()(image).tokens, network.forward_features(image)
    logits = logits_of(vit, weights)
    return {"encoder": relative_difference(tokens, features), "logits": relative_difference(logits, network(image))}


@torch.no_grad()
def method_differences(method: Method, weights: Mapping[str, Tensor]) -> Differences:
    """The encoder and the decoder or head of a method against reference networks with `weights` (our names)."""
    student: Any = method.student
    own: State = {n.removeprefix("student."): t for n, t in weights.items() if n.startswith("student.")}
    own.pop("mask_token", None)
    found = {"encoder": encoder_difference(student, own)}
    width, patches = student.config.width, student.patches
    decoder, head = getattr(method, "decoder", None), getattr(method, "head", None)
    if isinstance(decoder, MAEDecoder):
        visible = max(1, patches // 4)
        latent = random_input(1, decoder.prefix + visible, width)
        order = random_input(1, patches).argsort(dim=1)
        raster = raster_order(Masks(order[:, :visible], order[:, visible:]))
        heads = decoder.blocks[0].attn.heads  # type: ignore[union-attr]
        parts = {n: t for n, t in weights.items() if n.startswith("decoder.")}
        theirs = reference.mae_decoder(mae.to_official(parts).weights, latent, raster.ids_restore, int(heads))  # type: ignore[arg-type]
        found["decoder"] = relative_difference(decoder.eval()(latent, raster), theirs)
    if isinstance(head, PixelHead) and isinstance(student, Beit):
        tokens = random_input(1, patches, width)
        theirs = reference.simmim_head(simmim.to_official(weights).weights, tokens, student.grid, student.config.patch)
        found["head"] = relative_difference(unpatchify(head(tokens), student.grid), theirs)
    return found
