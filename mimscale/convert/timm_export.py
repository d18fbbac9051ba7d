"""Our student -> what `timm.create_model(name, **options, checkpoint_path=file)` loads, unchanged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mimscale.convert.formats.finetune import HEAD
from mimscale.convert.formats.simmim import INDEX
from mimscale.convert.names import State
from mimscale.convert.student import Student
from mimscale.models.beit import Beit
from mimscale.models.config import STUDENT_SIZES

NAMED_SIZE, NAMED_PATCH = 224, 16  # what timm's names stand for; H is named with patch 14
HUGE_PATCH = 14


def to_timm(encoder: Mapping[str, Tensor]) -> State:
    """The student under timm's names, with a last norm of weight 1 and bias 0 where the method has none."""
    width = encoder["cls_token"].shape[-1]
    return {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width), **encoder}


def with_head(encoder: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> State:
    """A classifier: the encoder and, out of a fine-tuned method's weights, `fc_norm` and `head`."""
    return {**encoder, **{name: tensor for name, tensor in weights.items() if name.startswith(HEAD)}}


def call(vit: Student, weights: Mapping[str, Tensor] | None = None) -> tuple[str, dict[str, Any]]:
    """timm's name and options for this shape; weights: of a classifier, whose head decides classes and pooling."""
    student, size = vit.config, vit.grid[0] * vit.config.patch
    shape = (student.width, student.depth, student.heads)
    named = next((name for name, sizes in STUDENT_SIZES.items() if sizes == shape), None)
    kind = "beit" if isinstance(vit, Beit) else "vit"
    known = ("base", "large") if kind == "beit" else tuple(STUDENT_SIZES)
    known_name = named if named in known else "base"
    patch = HUGE_PATCH if known_name == "huge" else NAMED_PATCH
    options: dict[str, Any] = {"num_classes": 0}
    if named != known_name:
        options |= {"embed_dim": student.width, "depth": student.depth, "num_heads": student.heads}
    for name, value, usual in (
        ("img_size", size, NAMED_SIZE),
        ("patch_size", student.patch, patch),
        ("mlp_ratio", student.mlp_ratio, 4.0),
    ):
        if value != usual:
            options[name] = value
    if isinstance(vit, Beit):
        options |= _beit_options(vit)
    if weights is not None and "head.weight" in weights:
        pool = "avg" if "fc_norm.weight" in weights else "token"
        options |= {"num_classes": len(weights["head.weight"]), "global_pool": pool}
    return f"{kind}_{known_name}_patch{patch}_{NAMED_SIZE}", options


def _beit_options(vit: Beit) -> dict[str, Any]:
    """Whose the positions are; with the mean as global_pool there is no last norm of this name."""
    return {
        "use_abs_pos_emb": vit.positions == "absolute",
        "use_rel_pos_bias": vit.positions == "per_block",
        "use_shared_rel_pos_bias": vit.positions == "relative",
        "init_values": vit.layer_scale or 0.0,  # create_model drops a None
        "global_pool": "token",
    }


def network(vit: Student, weights: Mapping[str, Tensor] | None = None, **more: Any) -> Any:
    """timm's network for `call`; more: further arguments of `timm.create_model`."""
    import timm

    name, options = call(vit, weights)
    return timm.create_model(name, **options, **more).eval()


def for_this_timm(vit: Student, state: Mapping[str, Tensor]) -> State:
    """With the index into BEiT's bias tables, which follows from the grid, where the installed timm stores it."""
    if not isinstance(vit, Beit):
        return dict(state)
    return {**{n: t for n, t in network(vit).state_dict().items() if n.endswith(INDEX)}, **state}
