"""ConvMAE's encoder: two stages of masked convolution, then attention (Gao et al., NeurIPS 2022, arXiv 2205.03892).

The stages work on windows: the pixels of one patch of the attention grid, channels last, [B, K, h, w, C]. The receptive
field of strided embeddings, 1x1 convolutions and norms stays inside a window, so they run on any subset of windows:
all, or the visible ones. The depth-wise convolution reads neighbouring windows; it runs on the whole map, in which
masked windows are zero. Names in the state dict are the official ones.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from mimscale.config.base import Strict
from mimscale.errors import UserError
from mimscale.models.config import StudentConfig
from mimscale.models.patches import patches_at, patchify
from mimscale.models.pos_embed import sincos_2d
from mimscale.models.token_selection import gather_tokens, mask_of, scatter_tokens
from mimscale.models.vit import LN_EPS, Block, Encoder, Linear, Mlp, Residual, drop_path_scales, run_blocks

STAGE_EPS = 1e-5  # LayerNorm eps before the attention stage, as released; LN_EPS from there on
KERNEL = 5

Count = Annotated[int, Field(ge=1, le=2**16)]
Ratio = Annotated[float, Field(gt=0, le=256)]


class ConvStages(Strict):
    """The convolution stages before a ViT, base size by default; the ViT itself is the section `student`.

    patches: downsampling before stage 1, stage 2 and attention; their product is student.patch.
    widths: channels of stages 1 and 2. depths: their blocks. mlp_ratios: hidden channels of an MLP as a multiple.
    skip_masked: compute visible windows only. false: compute all and multiply by the mask, as released, which costs
        more and gives the same numbers up to rounding.
    class_token: add one in the attention stage; ConvMAE has none, ConvMAE-v2 has one.
    """

    patches: tuple[Count, Count, Count] = (4, 2, 2)
    widths: tuple[Count, Count] = (256, 384)
    depths: tuple[Count, Count] = (2, 2)
    mlp_ratios: tuple[Ratio, Ratio] = (4.0, 4.0)
    skip_masked: bool = True
    class_token: bool = False

    @model_validator(mode="after")
    def _wide_enough(self) -> ConvStages:
        for width, ratio in zip(self.widths, self.mlp_ratios, strict=True):
            if int(width * ratio) < 1:
                raise ValueError(f"mlp_ratios: {ratio} of width {width} is less than one channel")
        return self

    @property
    def patch(self) -> int:
        """Side of a window in pixels."""
        return self.patches[0] * self.patches[1] * self.patches[2]


def stages_of(encoder: Mapping[str, Tensor]) -> ConvStages:
    """Read the shape of the stages from a state dict with the official names."""
    embeds = [encoder[f"patch_embed{stage}.proj.weight"].shape for stage in (1, 2, 3)]
    hidden = [encoder[f"blocks{stage}.0.mlp.fc1.weight"].shape for stage in (1, 2)]
    first, second = ({name.split(".")[1] for name in encoder if name.startswith(f"blocks{stage}.")} for stage in (1, 2))
    return ConvStages(
        patches=(embeds[0][2], embeds[1][2], embeds[2][2]),
        widths=(embeds[0][0], embeds[1][0]),
        depths=(len(first), len(second)),
        mlp_ratios=(hidden[0][0] / hidden[0][1], hidden[1][0] / hidden[1][1]),
        class_token="cls_token" in encoder,
    )


def check_stages(stages: ConvStages, student: StudentConfig) -> None:
    """Refuse stages that do not end at the student's patch size. Raises UserError."""
    if stages.patch != student.patch:
        raise UserError(
            f"method.stages.patches = {list(stages.patches)} multiply to {stages.patch}, student.patch is "
            f"{student.patch}; make the two equal"
        )


class ConvViTOutput(NamedTuple):
    """tokens: [B, (1+)K, D], class token first if there is one. levels: attention block -> its output, the same shape.

    stage_outputs: [B, (1+)K, D], sum of both convolution stages, which multi-scale fusion adds to the last block's
    output (zero at the class token); None without fusion. attention: of the last block if requested: the result of
    `models.vit.patch_attention`.
    """

    tokens: Tensor
    levels: dict[int, Tensor]
    stage_outputs: Tensor | None
    attention: Tensor | None = None


def to_map(windows_BKhwC: Tensor, grid: tuple[int, int], ids_keep_BK: Tensor | None = None) -> Tensor:
    """Windows -> map [B, C, rows * h, columns * w]; zero where no window is given.

    ids_keep: index of each window in the grid; None: all windows, in raster order.
    """
    if ids_keep_BK is not None:
        windows_BKhwC = scatter_tokens(windows_BKhwC, ids_keep_BK, grid[0] * grid[1])
    tiles = windows_BKhwC.unflatten(1, grid).permute(0, 1, 3, 2, 4, 5)
    return tiles.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def to_windows(map_BCHW: Tensor, grid: tuple[int, int], ids_keep_BK: Tensor | None = None) -> Tensor:
    """The inverse of `to_map`: windows [B, K, h, w, C] at `ids_keep`; None: all, in raster order."""
    tiles = map_BCHW.permute(0, 2, 3, 1).unflatten(2, (grid[1], -1)).unflatten(1, (grid[0], -1))
    windows = tiles.permute(0, 1, 3, 2, 4, 5).flatten(1, 2)
    return windows if ids_keep_BK is None else gather_tokens(windows, ids_keep_BK)


class WindowConv(nn.Conv2d):
    """A convolution whose stride equals its kernel size, computed as a matrix product.

    PyTorch's default initialisation, as released; `xavier`: Xavier-uniform, the weight seen as a matrix.
    """

    def __init__(self, in_width: int, width: int, size: int = 1, xavier: bool = False) -> None:
        super().__init__(in_width, width, kernel_size=size, stride=size)
        if xavier:
            nn.init.xavier_uniform_(self.weight.view(width, -1))

    def forward(self, x_BKhwC: Tensor) -> Tensor:
        """Windows [B, K, h, w, C] of any float type -> [B, K, h / size, w / size, width] in the weight's dtype."""
        size, x = self.kernel_size[0], x_BKhwC
        if size > 1:
            x = x.unflatten(3, (-1, size)).unflatten(2, (-1, size)).transpose(3, 4).flatten(4)
        return F.linear(x.to(self.weight.dtype), self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)


class StageEmbed(nn.Module):
    """Strided convolution, norm, GELU: [B, K, h, w, C] -> [B, K, h / size, w / size, width]."""

    def __init__(self, in_width: int, width: int, size: int, xavier: bool = False) -> None:
        super().__init__()
        self.proj = WindowConv(in_width, width, size, xavier)
        self.norm = nn.LayerNorm(width, eps=STAGE_EPS)

    def forward(self, x_BKhwC: Tensor) -> Tensor:
        return F.gelu(self.norm(self.proj(x_BKhwC)))


class ConvBlock(Residual):
    """x + conv2(attn(mask * conv1(norm1(x)))), then x + mlp(norm2(x)), with drop path per sample on each branch.

    attn is a depth-wise 5x5 convolution. The residual path and the MLP are not masked.
    """

    def __init__(self, width: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=STAGE_EPS)
        self.conv1 = WindowConv(width, width)
        self.attn = nn.Conv2d(width, width, KERNEL, padding=KERNEL // 2, groups=width)
        self.conv2 = WindowConv(width, width)
        self.norm2 = nn.LayerNorm(width, eps=STAGE_EPS)
        self.mlp = Mlp(width, int(width * mlp_ratio), fc1=WindowConv, fc2=WindowConv)

    def forward(
        self,
        x_BKhwC: Tensor,
        scales_B2: Tensor | None,
        grid: tuple[int, int],
        ids_keep_BK: Tensor | None = None,
        visible_BL: Tensor | None = None,
    ) -> Tensor:
        """Windows -> windows. ids_keep: indices of the given windows; all others are masked. visible: all windows are
        given, 1 = visible. Neither: nothing is masked."""
        branch = self.conv1(self.norm1(x_BKhwC))
        if visible_BL is not None:
            branch = branch * visible_BL[:, :, None, None, None].to(branch.dtype)
        branch = to_windows(self.attn(to_map(branch, grid, ids_keep_BK)), grid, ids_keep_BK)
        x_BKhwC = self.add_branch(x_BKhwC, self.conv2(branch), scales_B2, 0)
        return self.add_branch(x_BKhwC, self.mlp(self.norm2(x_BKhwC)), scales_B2, 1)


class ConvViT(Encoder):
    """Convolution stages 1 and 2, then the ViT of `config` as stage 3.

    fusion: multi-scale fusion: add the outputs of stages 1 and 2 to the last block's output before the norm (in
    pre-training; fine-tuning has none).
    final_norm, learned_pos, recompute_every: see `models.vit.ViT`.
    """

    pos_embed: Tensor
    cls_token: nn.Parameter | None

    def __init__(
        self,
        config: StudentConfig,
        stages: ConvStages,
        image_size: int,
        *,
        fusion: bool = True,
        final_norm: bool = True,
        learned_pos: bool = False,
        recompute_every: int = 0,
    ) -> None:
        super().__init__()
        side = image_size // stages.patch
        first, second = stages.widths
        width = config.width
        self.config = config
        self.stages = stages
        self.grid = (side, side)
        self.recompute_every = recompute_every
        self.patch_embed1 = StageEmbed(3, first, stages.patches[0])
        self.patch_embed2 = StageEmbed(first, second, stages.patches[1])
        self.patch_embed3 = StageEmbed(second, width, stages.patches[2], xavier=True)
        self.patch_embed4 = Linear(width, width)
        self.register_parameter("cls_token", nn.Parameter(torch.zeros(1, 1, width)) if stages.class_token else None)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=0.02)
        table = sincos_2d(width, self.grid, stages.class_token)
        if learned_pos:
            self.pos_embed = nn.Parameter(table)
        else:
            self.register_buffer("pos_embed", table)
        self.blocks1 = nn.ModuleList(ConvBlock(first, stages.mlp_ratios[0]) for _ in range(stages.depths[0]))
        self.blocks2 = nn.ModuleList(ConvBlock(second, stages.mlp_ratios[1]) for _ in range(stages.depths[1]))
        self.blocks3 = nn.ModuleList(Block(width, config.heads, config.mlp_ratio) for _ in range(config.depth))
        self.stage1_output_decode = WindowConv(first, width, stages.patches[1] * stages.patches[2]) if fusion else None
        self.stage2_output_decode = WindowConv(second, width, stages.patches[2]) if fusion else None
        self.norm = nn.LayerNorm(width, eps=LN_EPS) if final_norm else nn.Identity()

    @property
    def depth(self) -> int:
        """Blocks of all three stages."""
        return sum(self.stages.depths) + self.config.depth

    @property
    def prefix(self) -> int:
        return int(self.stages.class_token)

    def untrained(self) -> ConvViT:
        """A newly initialised network of the same shape, with a final norm."""
        fusion = self.stage1_output_decode is not None
        return ConvViT(self.config, self.stages, self.grid[0] * self.stages.patch, fusion=fusion)

    def forward(
        self,
        images_B3HW: Tensor,
        ids_keep: Tensor | None = None,
        drop_noise: Tensor | None = None,
        levels: Collection[int] = (),
        apply_norm: bool = True,
        attention: bool = False,
    ) -> ConvViTOutput:
        """images: normalised, any float type. ids_keep: int64 [B, K], the visible patches, in the order of the tokens;
        None: all, in raster order. drop_noise: uniform [B, depth, 2], the rate rises over all three stages; None:
        nothing is dropped. levels: attention blocks whose output is returned. attention: return the attention of the
        last block.

        Returns tokens in the parameters' dtype. apply_norm: false skips the final norm, for a method that applies
        `norm` to something else.
        """
        patch, given, visible = self.stages.patch, ids_keep, None
        if ids_keep is not None and not self.stages.skip_masked:
            given, visible = None, 1 - mask_of(ids_keep, self.patches)
        windows = patchify(images_B3HW, patch) if given is None else patches_at(images_B3HW, patch, given)
        scales1, scales2, scales3 = self._scales(drop_noise)
        every, masks = self.recompute_every, (self.grid, given, visible)
        first = run_blocks(self.blocks1, self.patch_embed1(windows.permute(0, 1, 3, 4, 2)), scales1, every, (), masks)
        second = run_blocks(self.blocks2, self.patch_embed2(first.tokens), scales2, every, (), masks)
        tokens = self.patch_embed4(self.patch_embed3(second.tokens).flatten(2))
        stage_outputs = None
        if self.stage1_output_decode is not None and self.stage2_output_decode is not None:
            decoded = self.stage1_output_decode(first.tokens), self.stage2_output_decode(second.tokens)
            stage_outputs = (decoded[0] + decoded[1]).flatten(2)
        if visible is not None and ids_keep is not None:
            tokens = gather_tokens(tokens, ids_keep)
            stage_outputs = None if stage_outputs is None else gather_tokens(stage_outputs, ids_keep)

        positions = self.pos_embed[0, self.prefix :]
        x = (tokens + (positions[None] if ids_keep is None else positions[ids_keep])).to(tokens.dtype)
        if self.cls_token is not None:
            cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
            x = torch.cat([cls.to(x.dtype), x], dim=1)
        out = run_blocks(self.blocks3, x, scales3, every, levels, (), self.prefix if attention else None)
        tokens = out.tokens
        if stage_outputs is not None:
            stage_outputs = F.pad(stage_outputs, (0, 0, self.prefix, 0))
            tokens = tokens + stage_outputs
        return ConvViTOutput(self.norm(tokens) if apply_norm else tokens, out.levels, stage_outputs, out.attention)

    def _scales(self, drop_noise_BN2: Tensor | None) -> tuple[Tensor | None, ...]:
        """Drop-path factors of the three stages."""
        if drop_noise_BN2 is None:
            return None, None, None
        scales = drop_path_scales(drop_noise_BN2, self.config.drop_path)
        return scales.split((*self.stages.depths, self.config.depth), dim=1)
