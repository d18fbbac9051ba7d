"""Networks out of named tensors, on the CPU in fp32: the student of any checkpoint, or a whole method."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mimscale.config.run import RunConfig, method_class
from mimscale.convert.formats.base import encoder_of, format_of, formats
from mimscale.convert.formats.timm import HEAD, SHARED_TABLE, TABLE, grid_side, relative_table
from mimscale.convert.names import Levels, Mapped, State
from mimscale.convert.read import Loaded, read
from mimscale.convert.saved_folder import heads_beside
from mimscale.errors import UserError
from mimscale.methods.base import Method
from mimscale.models import pos_embed, rel_pos_bias
from mimscale.models.beit import LAYER_SCALE, Beit, Positions
from mimscale.models.config import STUDENT_SIZES, StudentConfig
from mimscale.models.convvit import ConvStages, ConvViT, stages_of
from mimscale.models.vit import ViT
from mimscale.types import TeacherInfo

Student = ViT | Beit | ConvViT
OWN_TABLE = f"blocks.0.attn.{TABLE}"
KINDS: dict[str, Positions] = {SHARED_TABLE: "relative", OWN_TABLE: "per_block", "pos_embed": "absolute"}
CONVMAE_BASE = (768, 11)  # width and depth of its attention stage
MASKALIGN = "maskalign"


@dataclass(frozen=True)
class StudentInfo:
    """What is known of a loaded student.

    method: None where the file does not say. final_norm: whether there is a norm after the last block. stages: of
    ConvMAE's encoder.
    """

    config: StudentConfig
    image_size: int
    method: str | None
    final_norm: bool
    stages: ConvStages | None = None


def student_from(
    path: Path, *, image_size: int | None = None, heads: int | None = None, ema: bool = False
) -> tuple[Student, StudentInfo]:
    """The student of any checkpoint that `read` understands, and what is known of it.

    image_size: resize the position table to this input, in pixels. heads: number of attention heads, needed for an
    official file of an unusual size because tensors do not show it. ema: the student's exponential moving average.
    Raises UserError.
    """
    return student_of(read(path, ema), image_size=image_size, heads=heads)


def student_of(
    loaded: Loaded, *, image_size: int | None = None, heads: int | None = None
) -> tuple[Student, StudentInfo]:
    """As `student_from`, of tensors that were read before."""
    path = loaded.path
    strangers = parts_that_no_student_has(loaded)
    if strangers:
        raise UserError(f"{path} holds a ViT with {' and '.join(strangers)}, which students do not have")
    encoder = encoder_of(loaded.weights)
    relative = relative_table(encoder) is not None
    positions = next((name for name in (SHARED_TABLE, OWN_TABLE) if name in encoder), "pos_embed")
    convolutional = "patch_embed1.proj.weight" in encoder
    needed: tuple[str, ...] = ("cls_token", positions, "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")
    if convolutional:
        needed = (positions, "patch_embed2.proj.weight", "patch_embed3.proj.weight")
        needed = (*needed, *(f"blocks{stage}.0.mlp.fc1.weight" for stage in (1, 2, 3)))
    missing = [name for name in needed if name not in encoder]
    if missing:
        kind = "ConvMAE encoder" if convolutional else "ViT with a class token"
        names = ", ".join(sorted(loaded.weights)[:3])
        raise UserError(
            f"{path} holds no {kind}: {missing[0]} is missing among its {len(loaded.weights)} tensors ({names}, ...)"
        )
    _check_shapes(encoder, path)
    stages = stages_of(encoder) if convolutional else None
    run = loaded.run
    known = run.student if run else loaded.student
    student = known or _config_from(encoder, path, heads or heads_beside(path), stages)
    side = side_of(encoder)
    size = image_size or side * student.patch
    if size % student.patch:
        raise UserError(f"image size {size} is not a multiple of the student's patch = {student.patch}")
    new = size // student.patch
    if relative:
        tables = [name for name in encoder if name.endswith(TABLE)]
        encoder = {**encoder, **{name: rel_pos_bias.resize(encoder[name], (new, new)) for name in tables}}
    else:
        table = pos_embed.resize(encoder["pos_embed"], (side, side), (new, new), int("cls_token" in encoder))
        encoder = {**encoder, "pos_embed": table}
    final_norm = "norm.weight" in encoder
    vit: Student
    if "blocks.0.attn.q_bias" in encoder:
        vit = Beit(
            student,
            size,
            positions=KINDS[positions],
            layer_scale=LAYER_SCALE if "blocks.0.gamma_1" in encoder else None,
            final_norm=final_norm,
        )
    elif stages is not None:
        vit = ConvViT(student, stages, size, fusion="stage1_output_decode.weight" in encoder, final_norm=final_norm)
    else:
        vit = ViT(student, size, final_norm=final_norm)
    load(vit, encoder, path)
    return vit, StudentInfo(student, size, run.method.name if run else None, final_norm, stages)


STRANGERS = (
    (r"(^|\.)reg_token$", "register tokens"),
    (r"(^|\.)norm_pre\.", "a norm before its blocks (CLIP)"),
    (r"(^|\.)blocks\.\d+\.ls1\.gamma$", "layer scale (DINOv2)"),
    (r"(^|\.)blocks\.\d+\.attn\.[qk]_norm\.", "norms of its queries and keys"),
    (r"(^|\.)blocks\.\d+\.mlp\.(w12|w1|fc1_g)\.", "a gated MLP"),
    (r"(^|\.)(embeddings\.class_embedding|visual\.class_embedding)$", "a norm before its blocks (CLIP)"),
    (r"(^|\.)layer_scale1\.lambda1$", "layer scale (DINOv2)"),
    (r"(^|\.)register_tokens$", "register tokens"),
    (r"(^|\.)(dist_token|distillation_token)$", "a distillation token (DeiT)"),
)
"""Names of tensors that belong to a ViT of another kind, and what they are."""


def parts_that_no_student_has(loaded: Loaded) -> list[str]:
    """What a ViT's tensors show that ours has no place for, in words; empty where it is one of our kinds."""
    weights = loaded.weights
    if loaded.run is not None or is_whole_model(weights):  # named by its method; a teacher inside may be of any kind
        return []
    found = dict.fromkeys(what for pattern, what in STRANGERS if any(re.search(pattern, name) for name in weights))
    bare = {name.rpartition("blocks.")[2] for name in weights}
    if "0.attn.qkv.weight" in bare and not bare & {"0.attn.qkv.bias", "0.attn.q_bias"}:
        found["no biases of its queries, keys and values"] = None
    timm_names = "patch_embed.proj.weight" in weights and "pos_embed" in weights
    if timm_names and "cls_token" not in weights:
        found["no class token"] = None
    elif timm_names and math.isqrt(weights["pos_embed"].shape[1]) ** 2 == weights["pos_embed"].shape[1]:
        found["no position of its class token"] = None
    return list(found)


def side_of(encoder: Mapping[str, Tensor]) -> int:
    """Rows of the square patch grid that the encoder's positions are for."""
    table = relative_table(encoder)
    if table is not None:
        return grid_side(table)
    return math.isqrt(encoder["pos_embed"].shape[1] - int("cls_token" in encoder))


def _check_shapes(encoder: Mapping[str, Tensor], path: Path) -> None:
    """Raise UserError for tensors whose sizes cannot be those of a network; the others are compared with one."""
    dimensions = {"pos_embed": 3, "cls_token": 3, "patch_embed.proj.weight": 4}
    for name, tensor in encoder.items():
        linear = name.startswith(("blocks.", "blocks3.")) and name.endswith(".mlp.fc1.weight")
        expected = 2 if linear else dimensions.get(name, tensor.dim())
        if tensor.dim() != expected or (expected > 1 and not tensor.numel()):
            raise UserError(
                f"{path}: {name} has the shape {list(tensor.shape)}, where a ViT has {expected} dimensions, none of "
                f"them 0; get the file again"
            )


def load(module: torch.nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Load a state dict with exactly the module's names and shapes. Raises UserError with one line that says `path`."""
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit: {' '.join(str(error).split())[:300]}") from None


def _config_from(
    encoder: Mapping[str, Tensor], path: Path, heads: int | None, stages: ConvStages | None
) -> StudentConfig:
    """The sizes of an encoder, from the shapes of its tensors. Raises UserError where the heads are not known."""
    blocks = "blocks." if stages is None else "blocks3."
    hidden, width = encoder[f"{blocks}0.mlp.fc1.weight"].shape
    patch = encoder["patch_embed.proj.weight"].shape[2] if stages is None else stages.patch
    depth = len({name.split(".")[1] for name in encoder if name.startswith(blocks)})
    usual = {(w, d): h for w, d, h in STUDENT_SIZES.values()} | {CONVMAE_BASE: 12}
    table = relative_table(encoder)
    if table is not None:
        heads = table.shape[1]
    if heads is None and (width, depth) not in usual:
        raise UserError(
            f"{path}: width {width}, depth {depth} is no usual size and weights do not show it; give the heads"
        )
    heads = usual[width, depth] if heads is None else heads
    if heads < 1 or width % heads:
        raise UserError(
            f"{path}: width {width} is not divisible by heads = {heads}; give the heads that it was trained with"
        )
    return StudentConfig(
        width=width,
        depth=depth,
        heads=heads,
        patch=patch,
        mlp_ratio=hidden / width,
    )


def classifier_of(loaded: Loaded) -> State:
    """`head`, and `fc_norm` where the mean of the patches is classified, of a fine-tuned network. Raises UserError."""
    if "head.weight" not in loaded.weights or "student.mask_token" in loaded.weights:
        raise UserError(f"--with-head: {loaded.path} holds no classifier; leave it out")
    return {name: tensor for name, tensor in loaded.weights.items() if name.startswith(HEAD)}


def without_key_bias(vit: ViT) -> Beit:
    """The same function as a Beit with absolute positions: the bias of the keys adds the same number to all scores of a
    query, which the softmax takes away.
    """
    own, state = vit.state_dict(), {}
    for name, tensor in own.items():
        if name.endswith(".attn.qkv.bias"):
            place = name.removesuffix("qkv.bias")
            state[f"{place}q_bias"], _, state[f"{place}v_bias"] = tensor.chunk(3)
        else:
            state[name] = tensor
    size = vit.grid[0] * vit.config.patch
    beit = Beit(vit.config, size, positions="absolute", layer_scale=None, final_norm="norm.weight" in own)
    beit.load_state_dict(state)
    return beit


def method_from(loaded: Loaded, run: RunConfig) -> tuple[Method, tuple[str, ...]]:
    """The method of a recipe with the weights of an official file, and notes of what was left out. Raises UserError."""
    name, state = format_of(loaded.weights), loaded.weights
    if name is None:
        raise UserError(f"{loaded.path} has none of the known name formats ({', '.join(formats())})")
    names = formats()[name]
    if not is_whole_model(state):
        lacks = "no decoder or heads" if names.WHOLE_MODEL is None else f"no {names.WHOLE_MODEL}"
        raise UserError(
            f"{loaded.path} holds {lacks}: it is not a whole {run.method.name} model; leave out --recipe to convert "
            "its encoder alone"
        )
    another = UserError(
        f"{loaded.path} is a whole model in the format {name}, which method.name = {run.method.name} does not have; "
        f"take a recipe of {' or '.join(names.METHODS)}"
    )
    if (MASKALIGN in names.METHODS) != (run.method.name == MASKALIGN):  # without its heads no teacher is known
        raise another
    method: Method = method_class(run.method.name)(run, _teachers_in(state, run))
    if not names.fits(method.state_dict()):
        raise another
    mapped: Mapped = names.from_official(state, levels_of(method))
    load(method, mapped.weights, loaded.path)
    return method, mapped.notes


def is_whole_model(state: Mapping[str, Tensor]) -> bool:
    """Whether official weights hold more than an encoder: a decoder, heads, or what their format has beside it."""
    name = format_of(state)
    prefix = None if name is None else formats()[name].WHOLE_MODEL
    return prefix is not None and any(key.startswith(prefix) for key in state)


def levels_of(method: Method) -> Levels:
    """Of each teacher, the levels that a method's loss reads."""
    return {name: needs.levels for name, needs in method.needs.teachers.items() if needs.levels}


def _teachers_in(state: Mapping[str, Tensor], run: RunConfig) -> dict[str, TeacherInfo]:
    """The recipe's teachers, with the sizes that the heads of a MaskAlign file show; empty for other files."""
    heads = [key for key in state if key.startswith("distill_heads.")]
    if not heads:
        return {}
    last = max(int(key.split(".")[1]) for key in heads)
    depth = state["distill_weights"].shape[0] if "distill_weights" in state else last + 1
    output = max(key for key in heads if key.startswith(f"distill_heads.{last}.") and key.endswith(".weight"))
    dim, size = state[output].shape[0], run.data.image_size
    return {name: TeacherInfo(name, dim, depth, run.grid, size, has_cls=True) for name in run.teachers or ["teacher"]}
