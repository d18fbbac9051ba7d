"""Fixed 2-D sine-cosine position embeddings, and resizing of a position table to another grid."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def sincos_2d(width: int, grid: tuple[int, int], cls: bool = True) -> Tensor:
    """Position table [1, (1 +) L, D], float32; L = rows x columns in raster order; the class token's row is zero.

    The first half of the channels encodes the column, the second half the row; each half is [sines, cosines] at the
    frequencies 10000^(-k / (D/4)). Computed in float64, then cast. Equal to MAE's tables (He et al. 2022, app. A.1).
    Computed with NumPy, because DeepSpeed's zero.Init makes torch's constructors return 16-bit tensors.
    """
    if width % 4:
        raise ValueError(f"width = {width}: a 2-D sine-cosine table needs a multiple of 4")
    frequencies = 10000.0 ** (-np.arange(width // 4, dtype=np.float64) / (width // 4))
    rows, columns = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")

    def encode(coordinates: np.ndarray) -> np.ndarray:
        angles = coordinates.reshape(-1, 1).astype(np.float64) * frequencies
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    table = np.concatenate([encode(columns), encode(rows)], axis=1)
    if cls:
        table = np.concatenate([np.zeros((1, width)), table])
    return torch.from_numpy(table.astype(np.float32))[None]


def resize(table_1TD: Tensor, old: tuple[int, int], new: tuple[int, int], prefix: int = 1) -> Tensor:
    """Resize a position table [1, prefix + L, D] from grid `old` to grid `new`; the first `prefix` rows stay.

    Bicubic, align_corners off, no antialiasing, as in MAE's fine-tuning and MaskAlign's 16x16 -> 14x14 teacher.
    """
    if old == new:
        return table_1TD
    head, body = table_1TD[:, :prefix], table_1TD[:, prefix:]
    maps = body.reshape(1, *old, -1).permute(0, 3, 1, 2)
    maps = F.interpolate(maps.float(), size=new, mode="bicubic", align_corners=False)
    return torch.cat([head, maps.permute(0, 2, 3, 1).flatten(1, 2).to(table_1TD.dtype)], dim=1)
