"""MAE's decoder: a narrow ViT over visible and mask tokens (He et al. 2022, sec. 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mimscale.models.pos_embed import sincos_2d
from mimscale.models.token_selection import RasterOrder, gather_tokens
from mimscale.models.vit import LN_EPS, Block, Linear, run_blocks


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

    def forward(self, latent_BTD: Tensor, raster: RasterOrder) -> Tensor:
        """Features of the visible patches, [B, prefix + K, D] -> predicted pixels of the patches in `raster`, in its
        order: [B, S, p*p*3].
        """
        x = self.embed(latent_BTD)
        prefix, visible = x[:, : self.prefix], x[:, self.prefix :]
        masked = raster.ids_restore.shape[1] - visible.shape[1]
        shuffled = torch.cat([visible, self.mask_token.expand(len(x), masked, -1)], dim=1)
        x = torch.cat([prefix, gather_tokens(shuffled, raster.ids_restore)], dim=1)
        positions = self.pos_embed
        if x.shape[1] < positions.shape[1]:
            positions = self.pos_embed[0, self.prefix :][raster.ids]
            positions = torch.cat([self.pos_embed[:, : self.prefix].expand(len(x), -1, -1), positions], dim=1)
        x = (x + positions).to(x.dtype)
        x = run_blocks(self.blocks, x, None, self.recompute_every).tokens
        return self.pred(self.norm(x[:, self.prefix :]))
