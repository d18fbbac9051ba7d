"""MaskAlign's names: the student as timm has it, `distill_heads`, `distill_weights`, and the teacher's own tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mimscale.config.run import RunConfig
from mimscale.convert.formats import timm
from mimscale.convert.names import Levels, Mapped, State, below, parts_of
from mimscale.errors import UserError
from mimscale.models.heads import initial_mixing

METHODS: tuple[str, ...] = ("maskalign",)
WHOLE_MODEL: str | None = "distill_heads."
TEACHERS = ("clip_model.", "dino_model.")


def recognises(state: Mapping[str, Tensor]) -> bool:
    return any(name.startswith("distill_") for name in state)


def encoder(state: Mapping[str, Tensor]) -> State:
    """The student without its last norm, which MaskAlign never trains."""
    return {name: tensor for name, tensor in timm.encoder(state).items() if not name.startswith("norm.")}


def from_official(state: Mapping[str, Tensor], levels: Levels | None = None) -> Mapped:
    """Official names -> our names. levels: of one teacher; the rest of the adaptors and mixing rows was never trained.

    Raises UserError for several teachers, which the official code does not have.
    """
    if levels is None or len(levels) != 1:
        raise UserError("a MaskAlign file has one teacher, and method.targets of this recipe has none or several")
    ((teacher, read),) = levels.items()
    weights = {f"student.{name}": tensor for name, tensor in encoder(state).items()}
    for name, tensor in state.items():
        if name == "distill_weights":
            weights[f"alignment.{teacher}.mixing"] = tensor[list(read)]
        elif name.startswith("distill_heads."):
            level, rest = name.removeprefix("distill_heads.").split(".", 1)
            if int(level) in read:
                weights[f"alignment.{teacher}.adaptors.{level}.{rest}"] = tensor
    notes = ["left out: the student's last norm and the heads of unsupervised levels, which are never trained"]
    frozen = sum(tensor.numel() for name, tensor in state.items() if name.startswith(TEACHERS))
    if frozen:
        notes.append(f"left out: the teacher inside the checkpoint ({frozen / 1e6:.1f} M parameters)")
    return Mapped(weights, tuple(notes))


def fits(weights: Mapping[str, Tensor]) -> bool:
    return parts_of(weights) == {"student", "alignment"} and "student.patch_embed.proj.weight" in weights


def to_official(weights: Mapping[str, Tensor], run: RunConfig) -> Mapped:
    """Our names -> official names. Raises UserError for what the official code does not have.

    It builds the last norm and a mixing row for every level, and trains neither beyond the supervised levels; they are
    filled in with the initial values that they keep there.
    """
    method: Any = run.method
    if method.adaptor_position == "before":
        raise UserError(
            "method.adaptor_position = before has no official names, the release adapts after; use --to timm"
        )
    teachers = {name.split(".")[1] for name in weights if name.startswith("alignment.")}
    if len(teachers) > 1:
        raise UserError(
            f"{' and '.join(sorted(teachers))} have no official names, the release has one teacher; use --to timm"
        )
    teacher = teachers.pop()
    own = method.targets.get(teacher)
    rule = method.levels if own is None or own.levels is None else own.levels
    if method.fusion == "sum" and (not isinstance(rule, str) or rule.startswith("mid")):
        raise UserError(
            f"method.levels = {rule} with fusion = sum: the official mixing has a row for each level up to the "
            "teacher's last, and the weights do not show which that is; use --to timm"
        )
    heads = below(f"alignment.{teacher}.", weights)
    state = below("student.", weights)
    width = state["cls_token"].shape[-1]
    state |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    levels = sorted({int(name.split(".")[1]) for name in heads if name.startswith("adaptors.")})
    depth = 1 + max(levels) if method.fusion == "sum" else run.student.depth
    for name, tensor in heads.items():
        if name == "mixing":
            full = initial_mixing("sum" if method.fusion == "sum" else "linear", tensor.shape[1], range(depth))
            full[levels] = tensor
            state["distill_weights"] = full
        else:
            state[name.replace("adaptors.", "distill_heads.", 1)] = tensor
    return Mapped(
        state,
        (
            "filled in: the student's last norm and unsupervised mixing rows, with the initial values that they keep",
            f"left out: the teacher, and the heads of levels other than {levels}; load with strict=False",
        ),
    )
