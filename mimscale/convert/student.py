"""The student of any checkpoint, as a network on the CPU in fp32."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mimscale.convert.formats.simmim import REL_POS_TABLE, TABLE, grid_side, relative_table
from mimscale.convert.registry import encoder_of
from mimscale.convert.source import Loaded, read
from mimscale.errors import UserError
from mimscale.models import pos_embed
from mimscale.models.beit import LAYER_SCALE, Beit, Positions
from mimscale.models.config import STUDENT_SIZES, StudentConfig
from mimscale.models.convvit import ConvStages, ConvViT, stages_of
from mimscale.models.vit import ViT

Student = ViT | Beit | ConvViT
OWN_TABLE = f"blocks.0.attn.{TABLE}"
KINDS: dict[str, Positions] = {REL_POS_TABLE: "relative", OWN_TABLE: "per_block", "pos_embed": "absolute"}
CONVMAE_BASE = (768, 11)  # width and depth of its attention stage


@dataclass(frozen=True)
class StudentInfo:
    """What is known of a loaded student. method: None for a file that does not say; final_norm: whether it has one."""

    config: StudentConfig
    image_size: int
    method: str | None
    final_norm: bool
    stages: ConvStages | None = None


def student_from(
    path: Path, *, image_size: int | None = None, heads: int | None = None, ema: bool = False
) -> tuple[Student, StudentInfo]:
    """The student of any checkpoint that `read` understands, and what is known of it.

    image_size: resize the positions to another input. heads: needed for an official file of an unusual size, because
    weights do not tell. ema: its exponential moving average. Raises UserError.
    """
    return student_of(read(path, ema), image_size=image_size, heads=heads)


def student_of(
    loaded: Loaded, *, image_size: int | None = None, heads: int | None = None
) -> tuple[Student, StudentInfo]:
    path, encoder = loaded.path, encoder_of(loaded.weights)
    relative = relative_table(encoder) is not None
    positions = next((name for name in (REL_POS_TABLE, OWN_TABLE) if name in encoder), "pos_embed")
    convolutional = "patch_embed1.proj.weight" in encoder
    needed: tuple[str, ...] = ("cls_token", positions, "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")
    if convolutional:
        needed = (positions, "patch_embed2.proj.weight", "patch_embed3.proj.weight")
        needed = (*needed, *(f"blocks{stage}.0.mlp.fc1.weight" for stage in (1, 2, 3)))
    missing = [name for name in needed if name not in encoder]
    if missing:
        kind = "ConvMAE encoder" if convolutional else "ViT with a class token"
        raise UserError(f"{path} holds no {kind}: {missing[0]} is missing")
    stages = stages_of(encoder) if convolutional else None
    run = loaded.run
    student = run.student if run else loaded.student or _config_from(encoder, path, heads, stages)
    side = side_of(encoder)
    size = image_size or side * student.patch
    if size % student.patch:
        raise UserError(f"image size {size} is not a multiple of the student's patch = {student.patch}")
    new = size // student.patch
    if relative and new != side:
        raise UserError(f"{path} has relative positions, which are not resized; take image size {side * student.patch}")
    if not relative:
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


def side_of(encoder: Mapping[str, Tensor]) -> int:
    """Rows of the square grid that the positions are for."""
    table = relative_table(encoder)
    if table is not None:
        return grid_side(table)
    return math.isqrt(encoder["pos_embed"].shape[1] - int("cls_token" in encoder))


def load(module: torch.nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Every tensor, no other; else one line of UserError."""
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit: {' '.join(str(error).split())[:300]}") from None


def _config_from(
    encoder: Mapping[str, Tensor], path: Path, heads: int | None, stages: ConvStages | None
) -> StudentConfig:
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
            f"{path}: width {width}, depth {depth} is no usual size and weights do not tell; give the heads"
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
