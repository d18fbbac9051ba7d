"""Layer index of a parameter, from its name, for layer-wise learning-rate decay in fine-tuning."""

from __future__ import annotations

EMBEDDINGS = ("cls_token", "mask_token", "pos_embed", "patch_embed")


def vit_layer_of(name: str, depth: int) -> int:
    """Plain ViT of `depth` blocks: 0 for tokens, positions and patch embedding, i + 1 for block i, depth + 1 after."""
    if name.startswith(EMBEDDINGS):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else depth + 1


def convvit_layer_of(name: str, depth: int) -> int:
    """ConvMAE's encoder with `depth` attention blocks: both convolution stages are in layer 0, the rest as in a ViT."""
    if name.startswith((*EMBEDDINGS, "blocks1.", "blocks2.")):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks3.") else depth + 1
