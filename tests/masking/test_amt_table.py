"""AMT's table: rows are read and written by sample, on whichever rank they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mimscale.masking._amt_table import ImportanceTable
from tests import ranks

CPU = torch.device("cpu")
SAMPLES, WIDTH = 11, 4


def test_reading_and_writing_by_one_rank() -> None:
    table = ImportanceTable(SAMPLES, WIDTH, 0, CPU)
    table.rows += torch.arange(SAMPLES, dtype=torch.uint8)[:, None]
    ids = table.gather(np.array([3, 10, 3, 0]))
    assert ids.shape == (1, 4)
    assert table.read(ids)[:, 0].tolist() == [3, 10, 3, 0]
    rows = torch.tensor([[50], [60], [70]], dtype=torch.uint8).expand(3, WIDTH)
    table.write([np.array([7, 2, 5])], [np.array([0, 1, 2])], rows, torch.tensor([True, False, True]))
    assert table.rows[:, 1].tolist() == [0, 1, 2, 3, 4, 70, 6, 50, 8, 9, 10]  # the row of sample 2 was not valid


@pytest.mark.parametrize("positions", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
def test_of_several_rows_for_one_sample_the_highest_position_is_written(positions: list[int]) -> None:
    table = ImportanceTable(SAMPLES, 1, 0, CPU)
    rows = torch.tensor([[10], [20], [30]], dtype=torch.uint8)
    table.write([np.array([4, 4, 4])], [np.array(positions)], rows, torch.ones(3, dtype=torch.bool))
    assert table.rows[4].item() == [10, 20, 30][positions.index(2)]


def test_ranges_tile_the_samples() -> None:
    for world in (1, 2, 3, 11, 16):
        parts = [ImportanceTable(SAMPLES, 1, 0, CPU, rank, world) for rank in range(world)]
        covered = [s for part in parts for s in range(part.first, part.first + len(part.rows))]
        assert covered == list(range(SAMPLES))


@pytest.mark.multi
@pytest.mark.slow
def test_several_ranks() -> None:
    """Runs tests/masking/amt_table_ranks.py on three ranks."""
    ranks.run(3, "tests.masking.amt_table_ranks")
