"""MAE's decoder: a narrow ViT over visible and mask tokens (He et al. 2022, sec. 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mimscale.models.pos_embed import sincos_2d
from mimscale.models.token_selection import Raster, gather_tokens
from mimscale.models.vit import LN_EPS, Block, Linear, run_blocks


class MAEDecoder(nn.Module):
    """width, depth, heads of the decoder; `patch` fixes the length p*p*3 of a predicted patch.

    prefix: tokens of the latent before its patch tokens: 1, the class token, or 0.
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
        checkpoint_every: int = 0,
    ) -> None:
        super().__init__()
        self.prefix = prefix
        self.checkpoint_every = checkpoint_every
        self.embed = Linear(in_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        nn.init.normal_(self.mask_token, std=0.02)
        self.register_buffer("pos_embed", sincos_2d(width, grid, cls=prefix == 1))
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=LN_EPS)
        self.pred = Linear(width, patch * patch * 3)

    def forward(self, latent_BTD: Tensor, raster: Raster) -> Tensor:
        """latent [B, prefix + K, D] of the visible patches -> predictions [B, S, p*p*3] of the patches of `raster`."""
        x = self.embed(latent_BTD)
        first, patches = x[:, : self.prefix], x[:, self.prefix :]
        masked = raster.places.shape[1] - patches.shape[1]
        shuffled = torch.cat([patches, self.mask_token.expand(len(x), masked, -1)], dim=1)
        x = torch.cat([first, gather_tokens(shuffled, raster.places)], dim=1)
        positions = self.pos_embed
        if x.shape[1] < positions.shape[1]:
            positions = self.pos_embed[0, self.prefix :][raster.ids]
            positions = torch.cat([self.pos_embed[:, : self.prefix].expand(len(x), -1, -1), positions], dim=1)
        x = (x + positions).to(x.dtype)
        x = run_blocks(self.blocks, x, None, self.checkpoint_every).tokens
        return self.pred(self.norm(x[:, self.prefix :]))
