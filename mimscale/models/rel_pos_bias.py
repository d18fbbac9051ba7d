"""Relative position bias: a learned number per head for each offset between two patches (Bao et al. 2022, BEiT)."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

CLS_ROWS = 3  # the last rows of a table: class token to patch, patch to class token, class token to itself


def table_rows(grid: tuple[int, int]) -> int:
    """Number of rows of a table: one per offset between two patches of the grid, and CLS_ROWS."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) + CLS_ROWS


@lru_cache
def relative_index(grid: tuple[int, int], device: torch.device) -> Tensor:
    """Row of the table for each (query, key), int64 [1+L, 1+L], class token first. Cached per device.

    Offsets are (query - key), numbered from the most negative, vertical offset first.
    """
    rows, columns = (axis.reshape(-1) for axis in np.indices(grid))
    down = rows[:, None] - rows + grid[0] - 1
    right = columns[:, None] - columns + grid[1] - 1
    patches = down * (2 * grid[1] - 1) + right
    index = np.pad(patches, ((1, 0), (1, 0)))
    index[0, 1:], index[1:, 0], index[0, 0] = np.arange(-CLS_ROWS, 0) + table_rows(grid)
    return torch.from_numpy(index.astype(np.int64)).to(device)


def resize(table_RH: Tensor, new: tuple[int, int]) -> Tensor:
    """A table of a square grid for the square grid `new`; the CLS_ROWS stay. float32 [table_rows(new), heads].

    As in BEiT's and SimMIM's fine-tuning: the known offsets are placed on a geometric scale, denser near zero, that
    reaches as far as the new ones, and cubic splines go through them; behind the last the value of the edge holds.
    """
    if len(table_RH) == table_rows(new):
        return table_RH
    from scipy.interpolate import RectBivariateSpline

    old = (math.isqrt(len(table_RH) - CLS_ROWS) + 1) // 2
    known, wanted = _geometric_offsets(old, new[0]), np.arange(-new[0] + 1, new[0], dtype=np.float64)
    maps = table_RH[:-CLS_ROWS].double().reshape(2 * old - 1, 2 * old - 1, -1).cpu().numpy()
    degree = min(3, len(known) - 1)
    resized = np.stack(
        [
            RectBivariateSpline(known, known, maps[..., head], kx=degree, ky=degree)(wanted, wanted)
            for head in range(maps.shape[2])
        ],
        axis=-1,
    )
    rows = torch.from_numpy(resized.reshape(-1, maps.shape[2])).float().to(table_RH.device)
    return torch.cat([rows, table_RH[-CLS_ROWS:].float()])


def _geometric_offsets(old: int, new: int) -> NDArray[np.float64]:
    """float64 [2 old - 1], ascending and symmetric: 0, 1, 1 + q, 1 + q + q^2, ..., with the q that reaches new - 1.

    q is found by bisection between 1.01 and 1.5, which the official programs take for its bounds.
    """
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if (q ** (old - 1) - 1) / (q - 1) > new - 1 else (q, high)
    reach = np.cumsum(q ** np.arange(old - 1))
    return np.concatenate([-reach[::-1], [0.0], reach])


def index_among(grid: tuple[int, int], device: torch.device, ids_keep_BK: Tensor | None = None) -> Tensor:
    """`relative_index` of all tokens, int64 [1, 1+L, 1+L], or of the patches at `ids_keep`, int64 [B, K] -> [B, 1+K,
    1+K].
    """
    index = relative_index(grid, device)[None]
    if ids_keep_BK is None:
        return index
    ids = torch.cat([torch.zeros_like(ids_keep_BK[:, :1]), ids_keep_BK + 1], dim=1)
    return index[0, ids[:, :, None], ids[:, None, :]]


def bias_of(table_RH: Tensor, index_BTT: Tensor) -> Tensor:
    """The bias to add to the attention scores: float32 [1 or B, heads, T, T].

    In fp32, so that the gradients of all pairs are summed in fp32 also if the table is in 16 bit.
    """
    return table_RH.float()[index_BTT].permute(0, 3, 1, 2).contiguous()


class RelativePositionBias(nn.Module):
    """One table shared by all blocks, under the names that BEiT and timm use."""

    def __init__(self, grid: tuple[int, int], heads: int) -> None:
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.zeros(table_rows(grid), heads))

    def forward(self, index_BTT: Tensor) -> Tensor:
        """index: result of `index_among`. Returns `bias_of` the table."""
        return bias_of(self.relative_position_bias_table, index_BTT)
