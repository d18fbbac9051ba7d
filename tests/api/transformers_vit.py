"""A ViT in the names of Hugging Face transformers, from their documentation: weights, folder, and forward pass."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

WIDTH, HIDDEN, HEADS, DEPTH, PATCH, SIDE = 32, 48, 4, 2, 8, 32
State = dict[str, Tensor]


def config(**values: Any) -> dict[str, Any]:
    sizes = {"hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_attention_heads": HEADS}
    return {**sizes, "num_hidden_layers": DEPTH, "image_size": SIDE, "patch_size": PATCH, **values}


def vit_state(prefix: str = "") -> State:
    """As ViTModel and ViTMAEModel save it, every number random; prefix: of a model that contains one."""
    shapes = {
        "embeddings.cls_token": (1, 1, WIDTH),
        "embeddings.position_embeddings": (1, 1 + (SIDE // PATCH) ** 2, WIDTH),
        "embeddings.patch_embeddings.projection.weight": (WIDTH, 3, PATCH, PATCH),
        "embeddings.patch_embeddings.projection.bias": (WIDTH,),
        "layernorm.weight": (WIDTH,),
        "layernorm.bias": (WIDTH,),
    }
    linear = {"attention.output.dense": (WIDTH, WIDTH), "intermediate.dense": (HIDDEN, WIDTH)}
    linear |= {"output.dense": (WIDTH, HIDDEN)}
    linear |= {f"attention.attention.{part}": (WIDTH, WIDTH) for part in ("query", "key", "value")}
    for layer in range(DEPTH):
        for name, shape in linear.items():
            shapes[f"encoder.layer.{layer}.{name}.weight"] = shape
            shapes[f"encoder.layer.{layer}.{name}.bias"] = shape[:1]
        for name in ("layernorm_before", "layernorm_after"):
            shapes[f"encoder.layer.{layer}.{name}.weight"] = (WIDTH,)
            shapes[f"encoder.layer.{layer}.{name}.bias"] = (WIDTH,)
    generator = torch.Generator().manual_seed(0)
    return {prefix + name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def vit_tokens(state: State, images: Tensor, eps: float, activation: Callable[[Tensor], Tensor] = F.gelu) -> Tensor:
    """[B, 1 + L, D]: the `last_hidden_state` of ViTModel."""
    projection = "embeddings.patch_embeddings.projection"
    patches = F.conv2d(images, state[f"{projection}.weight"], state[f"{projection}.bias"], stride=PATCH)
    x = torch.cat([state["embeddings.cls_token"].expand(len(images), -1, -1), patches.flatten(2).mT], dim=1)
    return vit_blocks(state, x + state["embeddings.position_embeddings"], eps, activation)


def vit_blocks(state: State, x: Tensor, eps: float, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """Embedded tokens [B, 1 + L, D] through the blocks and the last norm."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], eps)

    for layer in range(DEPTH):
        block = f"encoder.layer.{layer}"
        inner = norm(x, f"{block}.layernorm_before")
        parts = (linear(inner, f"{block}.attention.attention.{part}") for part in ("query", "key", "value"))
        q, k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in parts)
        weights = (q @ k.mT / (WIDTH // HEADS) ** 0.5).softmax(dim=-1)
        x = x + linear((weights @ v).transpose(1, 2).flatten(2), f"{block}.attention.output.dense")
        inner = linear(norm(x, f"{block}.layernorm_after"), f"{block}.intermediate.dense")
        x = x + linear(activation(inner), f"{block}.output.dense")
    return norm(x, "layernorm")


def clip_state(prefix: str = "") -> State:
    """As CLIPVisionModel saves it, with the numbers of `vit_state`."""
    names = {
        "embeddings.position_embeddings": "embeddings.position_embedding.weight",
        "embeddings.cls_token": "embeddings.class_embedding",
        "embeddings.patch_embeddings.projection.weight": "embeddings.patch_embedding.weight",
        "layernorm.": "post_layernorm.",
        "encoder.layer.": "encoder.layers.",
        "attention.attention.query": "self_attn.q_proj",
        "attention.attention.key": "self_attn.k_proj",
        "attention.attention.value": "self_attn.v_proj",
        "attention.output.dense": "self_attn.out_proj",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
        "layernorm_before": "layer_norm1",
        "layernorm_after": "layer_norm2",
    }
    state = {}
    for name, tensor in vit_state().items():
        if name == "embeddings.patch_embeddings.projection.bias":
            continue
        for theirs, clips in names.items():
            name = name.replace(theirs, clips)
        state[prefix + name] = tensor
    state[f"{prefix}embeddings.class_embedding"] = state[f"{prefix}embeddings.class_embedding"].flatten()
    state[f"{prefix}embeddings.position_embedding.weight"] = state[f"{prefix}embeddings.position_embedding.weight"][0]
    for kind, value in (("weight", torch.linspace(0.5, 1.5, WIDTH)), ("bias", torch.linspace(-1, 1, WIDTH))):
        state[f"{prefix}pre_layrnorm.{kind}"] = value
    return state


def save(folder: Path, state: State, **values: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(values))
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    return folder
