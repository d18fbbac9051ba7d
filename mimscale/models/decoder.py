"""MAE's decoder: a narrow ViT over visible and mask tokens (He et al. 2022, sec. 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimscale.models.pos_embed import sincos_2d
from mimscale.models.token_selection import RasterOrder, gather_tokens
from mimscale.models.vit import LN_EPS, Block, Linear, run_blocks
from mimscale.types import Masks


class MAEDecoder(nn.Module):
    """in_width: of the encoder. width, depth, heads, mlp_ratio: of the decoder. patch: side of a patch in pixels.

    prefix: number of tokens before the patch tokens: 1 with a class token, else 0. recompute_every: see `vit.ViT`.
    """

    pos_embed: Tensor

    def __init__(
        self,
        *,
        in_width: int,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        patch: int,
        grid: tuple[int, int],
        prefix: int = 1,
        recompute_every: int = 0,
    ) -> None:
        super().__init__()
        self.prefix = prefix
        self.recompute_every = recompute_every
        self.embed = Linear(in_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        nn.init.normal_(self.mask_token, std=0.02)
        self.register_buffer("pos_embed", sincos_2d(width, grid, cls=prefix == 1))
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=LN_EPS)
        self.pred = Linear(width, patch * patch * 3)

    def forward(self, latent_BTD: Tensor, patches: RasterOrder | Masks) -> Tensor:
        """Features of the visible patches, [B, prefix + K, D] -> predicted pixels [B, S or M, p*p*3].

        patches: a RasterOrder: of all its patches, in its order. Masks: of the masked patches only, in their order: the
        same numbers up to rounding. The last block then computes queries' attention and MLP of these alone, keys and
        values of all. Queries are projected for all, in one product with keys and values: to part them would move more
        memory than it saves.
        """
        x = self.embed(latent_BTD)
        masked_only = isinstance(patches, Masks)
        x = self._drawn_order(x, patches) if isinstance(patches, Masks) else self._raster_order(x, patches)
        first = latent_BTD.shape[1] if masked_only else 0
        x = run_blocks(self.blocks, x, None, self.recompute_every, last={"first": first} if first else {}).tokens
        return self.pred(self.norm(x if masked_only else x[:, self.prefix :]))

    def _drawn_order(self, x: Tensor, masks: Masks) -> Tensor:
        """The input of the blocks: prefix, visible and masked patches as they were drawn. Attention has no order."""
        rows = F.pad(torch.cat(masks, dim=1) + self.prefix, (self.prefix, 0))  # row 0 is the class token's
        hidden = self.mask_token.expand(len(x), masks.masked.shape[1], -1)
        return (torch.cat([x, hidden], dim=1) + self.pos_embed[0, rows]).to(x.dtype)

    def _raster_order(self, x: Tensor, raster: RasterOrder) -> Tensor:
        """The input of the blocks: prefix and patches, row by row."""
        prefix, visible = x[:, : self.prefix], x[:, self.prefix :]
        masked = raster.ids_restore.shape[1] - visible.shape[1]
        shuffled = torch.cat([visible, self.mask_token.expand(len(x), masked, -1)], dim=1)
        x = torch.cat([prefix, gather_tokens(shuffled, raster.ids_restore)], dim=1)
        positions = self.pos_embed
        if x.shape[1] < positions.shape[1]:
            positions = self.pos_embed[0, self.prefix :][raster.ids]
            positions = torch.cat([self.pos_embed[:, : self.prefix].expand(len(x), -1, -1), positions], dim=1)
        return (x + positions).to(x.dtype)
