"""The base class of frozen teachers: images -> features of patch tokens and the attention of the class token.

A teacher is a plain pre-norm vision transformer of a library. An adapter per library gives access to its parts; input
normalisation, the loop over the blocks and the CLS attention are implemented here.

Shape letters: B images, N = P + L tokens (P prefix tokens: class token, registers; L patches), D channels, H heads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimscale.errors import UserError
from mimscale.teachers.config import TeacherConfig
from mimscale.types import IMAGENET_MEAN, IMAGENET_STD, Targets, TeacherInfo, TeacherNeeds

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Teacher(nn.Module, ABC):
    """A frozen ViT with its own input normalisation and size. It is not part of the engine or of checkpoints.

    tower: the library's module without the parts that no target uses (final norm, pooling, head).
    prefix: number of tokens before the patches; the class token, if there is one, is the first of them.
    norm_eps: eps of every LayerNorm; None: the library's.
    input: image size, mean and std; teachers with the same values share their input pixels.
    changes: what `teachers.kernels` replaced in the tower, in words.
    """

    changes = ""

    def __init__(
        self,
        tower: nn.Module,
        info: TeacherInfo,
        prefix: int,
        mean: Sequence[float],
        std: Sequence[float],
        norm_eps: float | None,
    ) -> None:
        super().__init__()
        self.tower, self.info, self.prefix = tower, info, prefix
        self.input = (info.image_size, tuple(mean), tuple(std))
        scale = [ours / theirs for ours, theirs in zip(IMAGENET_STD, std, strict=True)]
        shift = [(ours - theirs) / s for ours, theirs, s in zip(IMAGENET_MEAN, mean, std, strict=True)]
        for name, values in (("scale", scale), ("shift", shift)):  # on the CPU also if the tower is on the meta device
            tensor = torch.tensor(values, dtype=torch.float32, device="cpu").view(1, 3, 1, 1)
            self.register_buffer(name, tensor, persistent=False)
        self.scale: Tensor
        self.shift: Tensor
        if norm_eps is not None:
            for module in tower.modules():
                if isinstance(module, nn.LayerNorm):
                    module.eps = norm_eps

    @property
    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """The transformer blocks, each [B, N, D] -> [B, N, D]."""

    @abstractmethod
    def embed(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] in the teacher's precision and normalisation -> input tokens of the first block [B, N, D]."""

    def run(self, block: nn.Module, tokens: Tensor) -> Tensor:
        """Run one block on tokens [B, N, D]."""
        out: Tensor = block(tokens)
        return out

    @abstractmethod
    def query_and_keys(self, block: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Input tokens of a block -> scaled query of the first token [B, H, 1, d], keys of all tokens [B, H, N, d]."""

    @abstractmethod
    def adapt(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename a checkpoint's tensors to the tower's names and resize the position table to the tower's grid.

        Bicubic without antialiasing, as in the official MaskAlign.
        """

    def preprocess(self, images: Tensor) -> Tensor:
        """float32 [B, 3, h, w], ImageNet-normalised -> float32 [B, 3, S, S] in the teacher's own normalisation.

        If the sizes differ, a bicubic resize without antialiasing of the normalised tensor (as in the official
        MaskAlign); then x * (s_i / s_t) + (m_i - m_t) / s_t, which replaces ImageNet's mean and std by the teacher's.
        """
        size = (self.info.image_size, self.info.image_size)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size=size, mode="bicubic", align_corners=False, antialias=False)
        return torch.addcmul(self.shift, images, self.scale)

    @torch.no_grad()  # not inference_mode: the student's loss saves the targets for its backward pass
    def forward(self, pixels: Tensor, needs: TeacherNeeds) -> Targets:
        """float32 [B, 3, S, S] from `preprocess` -> the targets in `needs`. Stops after the last block that they
        need.
        """
        dtype = next(self.tower.parameters()).dtype
        tokens = self.embed(pixels.to(dtype))
        levels: dict[int, Tensor] = {}
        cls: dict[int, Tensor] = {}
        attention = None
        last = self.info.depth - 1
        runs = max((level + 1 for level in needs.levels), default=0)
        if needs.cls_attention:
            runs = max(runs, last)  # it is computed from the input of the last block
        by_norm = needs.cls_attention and self.info.norm_attention
        if by_norm:
            runs = last + 1
        for index, block in enumerate(self.blocks):
            if index == last and needs.cls_attention and not by_norm:
                attention = cls_attention(*self.query_and_keys(block, tokens))[:, self.prefix :]
            if index >= runs:
                break
            tokens = self.run(block, tokens)
            if index in needs.levels:
                levels[index] = tokens[:, self.prefix :]
                if self.info.has_cls:
                    cls[index] = tokens[:, 0]
        if by_norm:
            attention = norm_attention(tokens[:, self.prefix :])
        return Targets(levels, cls, attention)

    def load(
        self, state: Mapping[str, Tensor], precision: str, source: str, factors: Mapping[str, float] | None = None
    ) -> None:
        """Load a checkpoint's tensors, multiplied by `factors` in fp32 (by the tower's names), then cast to
        `precision`. source: for messages. Raises UserError with the first tensor that does not fit or is not finite.
        """
        try:
            given = self.adapt(state)
        except (AssertionError, AttributeError, LookupError, ValueError, RuntimeError) as error:
            raise UserError(f"{source} is not a checkpoint of this model: {one_line(error)}") from None
        wanted = self.tower.state_dict()
        for key in sorted(wanted.keys() | given.keys()):
            if key not in given or key not in wanted or given[key].shape != wanted[key].shape:
                raise UserError(
                    f"{source} does not fit this model: tensor '{key}' is {_shape(given, key)} in the file and "
                    f"{_shape(wanted, key)} in the model; check model, options and the file"
                )
        given |= {key: given[key].float() * factor for key, factor in (factors or {}).items()}
        cast = {key: tensor.to(DTYPES[precision]) for key, tensor in given.items()}
        for key, tensor in cast.items():
            if not tensor.isfinite().all():
                raise UserError(f"{source}: tensor '{key}' is not finite in {precision}; get another file, or use bf16")
        self.tower.load_state_dict(cast, strict=True, assign=True)

    def train(self, mode: bool = True) -> Teacher:
        """Does nothing: a teacher stays in evaluation mode."""
        return super().train(False)


def project(tokens: Tensor, weight: Tensor, bias: Tensor | None, heads: int) -> Tensor:
    """Apply a linear layer and split into heads: [B, N, D] -> [B, H, N, d]."""
    return F.linear(tokens, weight, bias).unflatten(-1, (heads, -1)).transpose(1, 2)


def cls_attention(query: Tensor, keys: Tensor) -> Tensor:
    """Attention of one token: scaled query [B, H, 1, d], keys [B, H, N, d] -> float32 [B, N], mean over heads.

    Softmax over all N keys in float32. As in MaskAlign the caller removes the prefix columns without renormalising, so
    the patches' values sum to less than 1: the attention to class token and registers is missing.
    """
    return (query.float() @ keys.float().transpose(-1, -2)).softmax(-1).mean(1).squeeze(1)


def norm_attention(tokens_BLD: Tensor) -> Tensor:
    """Each patch's share of the L2 norms of all patches: float32 [B, L], positive, sum 1."""
    norms_BL = tokens_BLD.float().norm(dim=-1)
    return norms_BL / norms_BL.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def fault_of(targets: Targets) -> str | None:
    """Why targets are unusable, None if they are fine. Synchronises with the device."""
    for part, levels in (("patch", targets.levels), ("class", targets.cls)):
        for level, tokens in levels.items():
            if not tokens.isfinite().all():
                return f"the {part} tokens of block {level} are not finite"
    attention_BL = targets.cls_attention
    if attention_BL is not None and not attention_BL.isfinite().all():
        return "the CLS attention is not finite"
    if attention_BL is not None and not (attention_BL > 0).any(dim=1).all():
        return "the CLS attention is zero on every patch"
    return None


def check_needs(info: TeacherInfo, needs: TeacherNeeds) -> None:
    """Refuse targets that this teacher does not have. Raises UserError."""
    for level in needs.levels:
        if not 0 <= level < info.depth:
            raise UserError(f"teachers.{info.name} has blocks 0 to {info.depth - 1}; level {level} does not exist")
    if needs.cls_attention and not info.has_attention:
        raise UserError(
            f"teachers.{info.name} has no class token, so there is no CLS attention; "
            f"use random masking or a teacher with a class token (CLIP, DINO, DINOv2, DINOv3, EVA02), or set "
            f"teachers.{info.name}.attention = norm"
        )


def info_of(
    name: str, config: TeacherConfig, size: int, patch: tuple[int, int], dim: int, depth: int, has_cls: bool
) -> TeacherInfo:
    """TeacherInfo at an image size. Raises UserError if the patches do not tile the image."""
    if size % patch[0] or size % patch[1]:
        fits = [patch[0] * (size // patch[0] + more) for more in (0, 1)]
        raise UserError(
            f"teachers.{name}: image size {size} is not a multiple of the patch {patch[0]} of {config.model}; "
            f"set teachers.{name}.image_size to {fits[0] or fits[1]} or {fits[1]}"
        )
    for key in ("stride", "grid"):
        if getattr(config, key) is not None:
            raise UserError(
                f"teachers.{name}.{key} is of convolutional networks; {config.model} is a transformer, whose grid "
                f"follows from image_size: remove {key}"
            )
    if config.attention == "cls" and not has_cls:
        raise UserError(
            f"teachers.{name}.attention = cls: {config.model} has no class token; use norm, or random masking"
        )
    grid = size // patch[0], size // patch[1]
    return TeacherInfo(name, dim, depth, grid, size, has_cls, norm_attention=config.attention == "norm")


def one_line(error: Exception) -> str:
    """The first line of an exception's message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _shape(state: Mapping[str, Tensor], key: str) -> str:
    return str(list(state[key].shape)) if key in state else "absent"
