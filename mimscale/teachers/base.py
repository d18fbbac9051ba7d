"""What a frozen teacher is: pixels in, token features and one row of attention out.

A teacher is a plain pre-norm vision transformer of a library. The adapters say how that library names its parts; the
walk over the blocks, the input affine and the attention row stand here once.

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
    """A frozen ViT with its own input normalisation and size. Lives outside the engine and outside checkpoints.

    tower: the library's module without the parts that no target reads (final norm, pooling, head).
    prefix: tokens before the patches; the class token, where there is one, is the first of them.
    norm_eps: of every LayerNorm, where it is not the library's.
    input: image size, mean and std; teachers in which these are equal see the same pixels.
    """

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
        for name, values in (("scale", scale), ("shift", shift)):  # on the CPU even while the tower is built on meta
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
        """[B, 3, S, S] in the teacher's precision and normalisation -> tokens [B, N, D] that enter the first block."""

    def run(self, block: nn.Module, tokens: Tensor) -> Tensor:
        """One block on tokens [B, N, D]."""
        out: Tensor = block(tokens)
        return out

    @abstractmethod
    def query_and_keys(self, block: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens before a block -> scaled query of the first token [B, H, 1, d], keys of all tokens [B, H, N, d]."""

    @abstractmethod
    def adapt(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint's tensors under the tower's names, position table resampled to the tower's grid.

        The resampling is bicubic without antialiasing, as the official MaskAlign does it once at construction.
        """

    def preprocess(self, images: Tensor) -> Tensor:
        """float32 [B, 3, h, w], ImageNet-normalised -> float32 [B, 3, S, S] in the teacher's own normalisation.

        A resize where sizes differ: bicubic, no antialiasing, on the normalised tensor (official MaskAlign), then one
        affine x * (s_i / s_t) + (m_i - m_t) / s_t, which is undoing ImageNet's and applying the teacher's statistics.
        """
        size = (self.info.image_size, self.info.image_size)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size=size, mode="bicubic", align_corners=False, antialias=False)
        return torch.addcmul(self.shift, images, self.scale)

    @torch.no_grad()  # not inference_mode: the student's loss saves the targets for its backward pass
    def forward(self, pixels: Tensor, needs: TeacherNeeds) -> Targets:
        """float32 [B, 3, S, S] out of `preprocess` -> what `needs` names, and no block is run beyond it."""
        dtype = next(self.tower.parameters()).dtype
        tokens = self.embed(pixels.to(dtype))
        levels: dict[int, Tensor] = {}
        cls: dict[int, Tensor] = {}
        attention = None
        last = self.info.depth - 1
        runs = max((level + 1 for level in needs.levels), default=0)
        if needs.cls_attention:
            runs = max(runs, last)  # the row is read from the tokens that enter the last block
        for index, block in enumerate(self.blocks):
            if index == last and needs.cls_attention:
                attention = cls_attention(*self.query_and_keys(block, tokens))[:, self.prefix :]
            if index >= runs:
                break
            tokens = self.run(block, tokens)
            if index in needs.levels:
                levels[index] = tokens[:, self.prefix :]
                if self.info.has_cls:
                    cls[index] = tokens[:, 0]
        return Targets(levels, cls, attention)

    def load(self, state: Mapping[str, Tensor], precision: str, source: str) -> None:
        """Take a checkpoint's weights, cast once. Raises UserError naming the first tensor that does not fit or is not
        finite, which would give NaN as features and attention."""
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
        cast = {key: tensor.to(DTYPES[precision]) for key, tensor in given.items()}
        for key, tensor in cast.items():
            if not tensor.isfinite().all():
                raise UserError(f"{source}: tensor '{key}' is not finite in {precision}; get another file, or use bf16")
        self.tower.load_state_dict(cast, strict=True, assign=True)

    def train(self, mode: bool = True) -> Teacher:
        """A teacher stays in evaluation mode."""
        return super().train(False)


def project(tokens: Tensor, weight: Tensor, bias: Tensor | None, heads: int) -> Tensor:
    """A linear layer and the split into heads: [B, N, D] -> [B, H, N, d]."""
    return F.linear(tokens, weight, bias).unflatten(-1, (heads, -1)).transpose(1, 2)


def cls_attention(query: Tensor, keys: Tensor) -> Tensor:
    """Attention from one token to all: scaled query [B, H, 1, d], keys [B, H, N, d] -> float32 [B, N], mean over heads.

    Softmax over all N keys in float32. MaskAlign drops the prefix columns without renormalising, and so does the
    caller: with registers, their share of the attention is missing from the patches' sum like the class token's own.
    """
    return (query.float() @ keys.float().transpose(-1, -2)).softmax(-1).mean(1).squeeze(1)


def fault_of(targets: Targets) -> str | None:
    """What makes targets useless, None where they are not. Waits for the device."""
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
    """Refuse what this teacher cannot give. Raises UserError."""
    for level in needs.levels:
        if not 0 <= level < info.depth:
            raise UserError(f"teachers.{info.name} has blocks 0 to {info.depth - 1}; level {level} is outside of them")
    if needs.cls_attention and not info.has_cls:
        raise UserError(
            f"teachers.{info.name} has no class token, so there is no CLS attention; "
            f"use random masking or a teacher with a class token (CLIP, DINO, DINOv2, DINOv3, EVA02)"
        )


def info_of(
    name: str, config: TeacherConfig, size: int, patch: tuple[int, int], dim: int, depth: int, has_cls: bool
) -> TeacherInfo:
    """Facts of a teacher at an image size. Raises UserError where the patches do not tile the image."""
    if size % patch[0] or size % patch[1]:
        fits = [patch[0] * (size // patch[0] + more) for more in (0, 1)]
        raise UserError(
            f"teachers.{name}: image size {size} is not a multiple of the patch {patch[0]} of {config.model}; "
            f"set teachers.{name}.image_size to {fits[0] or fits[1]} or {fits[1]}"
        )
    return TeacherInfo(name, dim, depth, (size // patch[0], size // patch[1]), size, has_cls)


def one_line(error: Exception) -> str:
    """The first line of a library's message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _shape(state: Mapping[str, Tensor], key: str) -> str:
    return str(list(state[key].shape)) if key in state else "absent"
