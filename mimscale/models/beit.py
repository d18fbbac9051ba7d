"""BEiT's Vision Transformer, as SimMIM pre-trains it; its state dict has the names of timm's Beit.

Differences from the plain ViT: q and v have a bias and k has none; each branch has a learned scale per channel (layer
scale); positions are a relative bias, shared by all blocks or one per block, or a learned table. Masked patches enter
the network as mask tokens.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimscale.models.config import StudentConfig
from mimscale.models.patches import patches_at, patchify
from mimscale.models.rel_pos_bias import RelativePositionBias, bias_of, index_among, table_rows
from mimscale.models.token_selection import gather_tokens
from mimscale.models.vit import (
    LN_EPS,
    Encoder,
    Mlp,
    PatchEmbed,
    PatchProjection,
    Residual,
    ViTOutput,
    drop_path_scales,
    patch_attention,
    run_blocks,
    split_heads,
)

Positions = Literal["relative", "per_block", "absolute"]
INIT_STD = 0.02
LAYER_SCALE = 0.1


def trunc_normal_(tensor: Tensor, std: float = INIT_STD) -> Tensor:
    """Normal distribution truncated at one standard deviation, as in SimMIM; others truncate at two or more."""
    return nn.init.trunc_normal_(tensor, std=std, a=-std, b=std)


class Linear(nn.Linear):
    """nn.Linear with SimMIM's initialisation, done in the constructor because of zero.Init (see `vit.Linear`)."""

    def __init__(self, width: int, out: int, *, bias: bool = True, std: float = INIT_STD) -> None:
        super().__init__(width, out, bias=bias)
        trunc_normal_(self.weight, std)
        if bias:
            nn.init.zeros_(self.bias)


class ProjectionQKV(Linear):
    """The bias is an argument, because its parts are parameters of the attention module (BEiT's names)."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 3 * width, bias=False)

    def forward(self, input: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(input, self.weight, bias)


class TruncNormalProjection(PatchProjection):
    """The patch embedding with SimMIM's initialisation."""

    def __init__(self, width: int, patch: int) -> None:
        super().__init__(width, patch)
        trunc_normal_(self.weight)
        assert self.bias is not None
        nn.init.zeros_(self.bias)


class Attention(nn.Module):
    """Multi-head self-attention [B, T, D] -> [B, T, D]; scale head_dim^-0.5. out_std: initial std of the output
    projection.

    grid: if given, this module owns a table of relative position biases for it.
    """

    relative_position_bias_table: nn.Parameter | None

    def __init__(self, width: int, heads: int, out_std: float, grid: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = ProjectionQKV(width)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = Linear(width, width, std=out_std)
        table = None if grid is None else nn.Parameter(torch.zeros(table_rows(grid), heads))
        self.register_parameter("relative_position_bias_table", table)

    def forward(
        self,
        x_BTD: Tensor,
        positions: Tensor | None = None,
        prefix: int | None = None,
        only_BM: Tensor | None = None,
    ) -> Tensor:
        """positions: bias to add to the scaled scores, [1 or B, heads, T, T]; if the module owns a table, rows of that
        table, int64 [1 or B, T, T]. prefix: if given, return `patch_attention` instead of the output. only: int64
        [B, M], the tokens whose output is returned, [B, M, D]; None: all.
        """
        bias_BHTT = positions
        if self.relative_position_bias_table is not None and positions is not None:
            bias_BHTT = bias_of(self.relative_position_bias_table, positions)
        qkv_bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        batch, tokens, width = x_BTD.shape
        q, k, v = split_heads(self.qkv(x_BTD.flatten(0, 1), qkv_bias).view(batch, tokens, 3, self.heads, -1))
        if prefix is not None:
            return patch_attention(q, k, prefix, bias_BHTT)
        bias = None if bias_BHTT is None else bias_BHTT.to(q.dtype)
        out_BTD = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
        if only_BM is not None:
            out_BTD = gather_tokens(out_BTD, only_BM)
        return self.proj(out_BTD.flatten(0, 1)).view(out_BTD.shape)


class Block(Residual):
    """x + gamma_1 attn(norm1(x)), then x + gamma_2 mlp(norm2(x)), with drop path per sample on each branch.

    layer: 1-based index; the last matrix of each branch starts with std divided by sqrt(2 layer). layer_scale: initial
    gamma, None: no gamma. grid: see `Attention`.
    """

    gamma_1: nn.Parameter | None
    gamma_2: nn.Parameter | None

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        layer: int,
        layer_scale: float | None,
        grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        out_std = INIT_STD / math.sqrt(2 * layer)
        self.norm1 = nn.LayerNorm(width, eps=LN_EPS)
        self.attn = Attention(width, heads, out_std, grid)
        self.norm2 = nn.LayerNorm(width, eps=LN_EPS)
        self.mlp = Mlp(width, int(width * mlp_ratio), fc1=Linear, fc2=partial(Linear, std=out_std))
        for name in ("gamma_1", "gamma_2"):
            gamma = None if layer_scale is None else nn.Parameter(torch.full((width,), layer_scale))
            self.register_parameter(name, gamma)

    def forward(
        self,
        x_BTD: Tensor,
        scales_B2: Tensor | None = None,
        positions: Tensor | None = None,
        only_BM: Tensor | None = None,
        *,
        prefix: int | None = None,
    ) -> Tensor:
        """only: int64 [B, M], the tokens that are computed, [B, M, D]. They attend to all, and all of them ask: the
        bias of some would be as large as B such biases. prefix: if given, return the `patch_attention` instead.
        """
        if prefix is not None:
            return self.attn(self.norm1(x_BTD), positions, prefix=prefix)
        branch = self.attn(self.norm1(x_BTD), positions, only_BM=only_BM)
        x_BTD = x_BTD if only_BM is None else gather_tokens(x_BTD, only_BM)
        x_BTD = self.add_branch(x_BTD, branch if self.gamma_1 is None else self.gamma_1 * branch, scales_B2, 0)
        branch = self.mlp(self.norm2(x_BTD))
        return self.add_branch(x_BTD, branch if self.gamma_2 is None else self.gamma_2 * branch, scales_B2, 1)


class Beit(Encoder):
    """positions: a relative bias shared by all blocks, one per block, or a learned table. layer_scale: initial value,
    None: no layer scale.

    mask_token: create one; without it no patch can be masked. final_norm: end with a LayerNorm. recompute_every:
    recompute every k-th block in the backward pass (activation checkpointing), 0 = none.
    """

    mask_token: nn.Parameter | None
    pos_embed: nn.Parameter | None

    def __init__(
        self,
        config: StudentConfig,
        image_size: int,
        *,
        positions: Positions = "relative",
        layer_scale: float | None = LAYER_SCALE,
        mask_token: bool = False,
        final_norm: bool = True,
        recompute_every: int = 0,
    ) -> None:
        super().__init__()
        side, width = image_size // config.patch, config.width
        self.config = config
        self.grid = (side, side)
        self.positions: Positions = positions
        self.layer_scale = layer_scale
        self.recompute_every = recompute_every
        self.patch_embed = PatchEmbed(width, config.patch, TruncNormalProjection)
        self.cls_token = nn.Parameter(trunc_normal_(torch.zeros(1, 1, width)))
        mask = nn.Parameter(trunc_normal_(torch.zeros(1, 1, width))) if mask_token else None
        self.register_parameter("mask_token", mask)
        absolute = positions == "absolute"
        table = nn.Parameter(trunc_normal_(torch.zeros(1, 1 + self.patches, width))) if absolute else None
        self.register_parameter("pos_embed", table)
        self.rel_pos_bias = RelativePositionBias(self.grid, config.heads) if positions == "relative" else None
        table_grid = self.grid if positions == "per_block" else None
        self.blocks = nn.ModuleList(
            Block(width, config.heads, config.mlp_ratio, layer, layer_scale, table_grid)
            for layer in range(1, config.depth + 1)
        )
        self.norm = nn.LayerNorm(width, eps=LN_EPS) if final_norm else nn.Identity()

    def untrained(self) -> Beit:
        """A newly initialised network of the same shape, with a final norm."""
        size = self.grid[0] * self.config.patch
        return Beit(self.config, size, positions=self.positions, layer_scale=self.layer_scale)

    def forward(
        self,
        images_B3HW: Tensor,
        mask_BL: Tensor | None = None,
        drop_noise: Tensor | None = None,
        ids_keep: Tensor | None = None,
        levels: Collection[int] = (),
        apply_norm: bool = True,
        attention: bool = False,
        only_BM: Tensor | None = None,
    ) -> ViTOutput:
        """images: normalised, any float type. mask: [B, L] in raster order, 1 = replaced by the mask token. drop_noise:
        uniform [B, depth, 2]; None: nothing is dropped. ids_keep: int64 [B, K], the patches, masked or not, that enter
        the blocks; None: all, in raster order. levels: blocks whose output is returned. attention: return the attention
        of the last block. only: int64 [B, M], the tokens (0: the class token) that the last block computes and that are
        returned, in this order; None: all.

        Returns tokens [B, 1+K or M, D] in the parameters' dtype. apply_norm: false skips the final norm, for a method
        that applies `norm` to something else.
        """
        patch = self.config.patch
        patches = patchify(images_B3HW, patch) if ids_keep is None else patches_at(images_B3HW, patch, ids_keep)
        tokens = self.patch_embed(patches)
        if mask_BL is not None:
            assert self.mask_token is not None, "built without a mask token"
            mask = mask_BL if ids_keep is None else mask_BL.gather(1, ids_keep)
            tokens = torch.where(mask.bool()[:, :, None], self.mask_token, tokens)
        cls: Tensor = self.cls_token
        if self.pos_embed is not None:
            positions_LD = self.pos_embed[0, 1:]
            tokens = tokens + (positions_LD if ids_keep is None else positions_LD[ids_keep])
            cls = cls + self.pos_embed[:, :1]
        x_BTD = torch.cat([cls.expand(len(tokens), -1, -1), tokens], dim=1)
        extra: tuple[Tensor, ...] = ()
        if self.positions != "absolute":
            index = index_among(self.grid, x_BTD.device, ids_keep)
            extra = (index if self.rel_pos_bias is None else self.rel_pos_bias(index),)
        scales = None if drop_noise is None else drop_path_scales(drop_noise, self.config.drop_path)
        prefix = self.prefix if attention else None
        last = {} if only_BM is None else {"only_BM": only_BM}
        out = run_blocks(self.blocks, x_BTD, scales, self.recompute_every, levels, extra, prefix, last)
        return out._replace(tokens=self.norm(out.tokens) if apply_norm else out.tokens)
