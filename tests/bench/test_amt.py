"""The AMT benchmark: its memory stays below the limit, and its parts add up."""

from __future__ import annotations

from mimscale.bench.amt import costs, memory_row


def test_memory_is_the_ranks_share_of_the_table() -> None:
    ranks, grown, limit = memory_row(1_400_000, 4)
    assert ranks == "4" and 60 < float(grown) <= float(limit) == 92


def test_costs_add_up() -> None:
    rows = costs(
        "amt_mae_vit_b16", batch=2, rounds=1, overrides=["data.image_size=32", "student.patch=8", "student.depth=1"]
    )
    assert rows[0][2] == "100 %" and rows[-1][0] == "AMT in all"
    parts = [float(row[1]) for row in rows[1:-1]]
    assert abs(sum(parts) - float(rows[-1][1])) < 0.05
