"""Whatever happens to one file of a run folder: the run goes on to the same weights, or ends with one line."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.faults.folders import Folders, flipped, harm

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Folders:
    return Folders(tmp_path_factory.mktemp("folders"), shards)


@pytest.mark.parametrize("seed", range(4))
def test_one_damaged_file(folders: Folders, seed: int) -> None:
    """`python -m tests.faults.folders --seed S --count N` strikes more of them."""
    dice = random.Random(seed)
    for _ in range(4):
        outcome = folders.strike(dice)
        assert not outcome.failure, outcome


def test_another_weight_would_be_noticed(folders: Folders, tmp_path: Path) -> None:
    """The comparison sees one bit: the rules of `Folders` can fail."""
    name = next(iter(folders.expected))
    right = folders.expected[name].clone()
    folders.expected[name].view(-1)[0] += 1e-6
    try:
        assert "other weights" in folders._wrong(0, "", [], folders.whole)
    finally:
        folders.expected[name].copy_(right)
    assert folders._wrong(0, "", [], folders.whole) == ""
    assert folders._wrong(2, "", [], folders.whole) and folders._wrong(1, "", [], folders.whole)


def test_every_kind_of_damage_changes_the_file(tmp_path: Path) -> None:
    dice, kinds = random.Random(0), set()
    for number in range(120):
        path = tmp_path / str(number)
        path.write_bytes(b'{"a": 12}\n')
        kinds.add(harm(tmp_path, Path(str(number)), dice).what.split()[0])
        assert not path.is_file() or path.read_bytes() != b'{"a": 12}\n'
    assert {"bit", "cut", "absent", "folder", "holds", "has", "pipe", "link"} <= kinds
    assert len({flipped(b'{"a": 12}\n', dice)[0] for _ in range(100)}) > 15
