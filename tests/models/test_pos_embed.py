"""Position tables against the official ones."""

from __future__ import annotations

import pytest
import torch

from mimscale.models.pos_embed import resize, sincos_2d
from tests import golden
from tests.golden import close


def test_golden_maskalign() -> None:
    g = golden.load("sincos_dev")
    for width, side, cls in g.config["cases"]:
        stored = g[f"pos/dim{width}_grid{side}_{'cls' if cls else 'nocls'}"]
        golden.equal(sincos_2d(width, (side, side), cls=cls)[0], stored, "table")


def test_golden_mae() -> None:
    g = golden.load("mae_posembed")
    for width, side in ((64, 4), (64, 6), (48, 4), (768, 14), (1280, 16)):
        stored = g[f"sincos/d{width}_g{side}"]
        table = sincos_2d(width, (side, side))[0]
        if len(stored) == 6:
            table = table[[0, 1, 2, side, side + 1, side * side]]
        golden.equal(table, stored, "table")
    close(resize(g["interp/src_4x4"], (4, 4), (6, 6)), g["interp/dst_6x6"])


def test_golden_teacher_resize() -> None:
    g = golden.load("clip14_pos_resize_dev")
    resized = resize(g["input/patch_positions_16x16"][None], (16, 16), (14, 14), prefix=0)
    close(resized[0], g["output/patch_positions_14x14"])


def test_first_half_is_the_column() -> None:
    table = sincos_2d(8, (2, 3), cls=False)[0].view(2, 3, 8)
    assert torch.equal(table[0, :, :4], table[1, :, :4]) and torch.equal(table[:, 0, 4:], table[:, 2, 4:])
    assert not torch.equal(table[:, 0, :4], table[:, 1, :4])
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_2d(6, (2, 2))


def test_resize_to_the_same_grid_is_the_same_table() -> None:
    table = sincos_2d(8, (3, 3))
    assert resize(table, (3, 3), (3, 3)) is table
    assert resize(table, (3, 3), (2, 4)).shape == (1, 9, 8)
