"""Several data sets with weights: the order is a pure function, every set's samples come once per epoch of the set."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from data_prep.__main__ import main
from mimscale.data.config import DataConfig
from mimscale.data.loader import TrainLoader
from mimscale.data.manifest import Manifest
from mimscale.data.mixture import ROWS, Mixture, MixtureOrder, order_of, shares
from mimscale.data.order import rank_positions
from mimscale.data.wds_stream import open_source
from mimscale.errors import UserError
from mimscale.types import Needs, Noise

COUNTS = [np.array([7, 5, 11]), np.array([3]), np.array([20, 20])]


def order(weights: list[float], seed: int = 0, rows: int = 16, streams: int = 4) -> MixtureOrder:
    counts = COUNTS[: len(weights)]
    return MixtureOrder(counts, shares(weights, rows), seed, streams=streams, block=2, rows=rows)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8), st.integers(64, 2048))
def test_shares_are_the_rounded_weights(weights: list[float], rows: int) -> None:
    found = shares(weights, rows)
    assert found.sum() == rows and found.min() >= 0
    assert np.abs(found - np.array(weights) / sum(weights) * rows).max() < 1


def test_shares_of_weights_at_the_ends_of_their_range() -> None:
    assert shares([1e308, 1e308]).tolist() == shares([5e-324, 5e-324]).tolist() == [ROWS // 2, ROWS // 2]
    assert shares([1e308, 1]).tolist() == [ROWS, 0]  # which is refused


@pytest.mark.parametrize("weights", [[1.0], [0.5, 0.5], [0.6, 0.1, 0.3], [9, 1]])
@pytest.mark.parametrize("seed", [0, 7])
def test_each_set_has_its_share_and_each_sample_once_per_epoch_of_the_set(weights: list[float], seed: int) -> None:
    mixed = order(weights, seed)
    cycle = 16 * 4
    for cycles in (1, 5, 23):
        ids = mixed.ids(np.arange(cycles * cycle))
        for number, counts in enumerate(COUNTS[: len(weights)]):
            first, total = int(mixed.first_ids[number]), int(counts.sum())
            own = ids[(ids >= first) & (ids < first + total)] - first
            assert len(own) == cycles * 4 * shares(weights, 16)[number]  # exactly its share
            times = np.bincount(own, minlength=total)
            assert times.max() - times.min() <= 1 and times.min() == len(own) // total


def test_it_is_a_pure_function_of_the_position(tmp_path: Path) -> None:
    mixed, positions = order([0.6, 0.1, 0.3]), np.arange(3000)
    ids = mixed.ids(positions)
    for start in (0, 1, 999, 2500):
        assert np.array_equal(order([0.6, 0.1, 0.3]).ids(positions[start:]), ids[start:])
    shuffled = np.random.default_rng(0).permutation(positions)
    assert np.array_equal(mixed.ids(shuffled), ids[shuffled])
    assert np.array_equal(pickle.loads(pickle.dumps(mixed)).ids(positions), ids)
    assert not np.array_equal(order([0.6, 0.1, 0.3], seed=1).ids(positions), ids)
    for world in (1, 2, 4, 8):
        parts = [rank_positions(3, 64, rank, world) for rank in range(world)]
        assert sorted(np.concatenate([mixed.ids(part) for part in parts])) == sorted(ids[192:256])
    late = mixed.ids(np.arange(10**15, 10**15 + 64))  # no replay
    assert late.min() >= 0 and late.max() < sum(int(c.sum()) for c in COUNTS)
    with pytest.raises(ValueError, match="negative"):
        mixed.ids([-1])


def test_the_stream_of_a_set_is_the_column(tmp_path: Path) -> None:
    mixed = order([0.6, 0.4])
    positions = np.arange(4096)
    _, places = mixed.sets(positions)
    assert np.array_equal(places % 4, positions % 4)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("two")
    for name, classes, count in (("a", 2, 12), ("b", 2, 8)):
        assert main(["synthetic", str(root / name), "--classes", str(classes), "--per-class", str(count)]) == 0
        assert main(["folder", str(root / name), str(root / f"{name}-shards"), "--shard-samples", "5"]) == 0
    return [root / "a-shards", root / "b-shards"]


def config(two: list[Path], weights: tuple[float, ...] = (3, 1), **changes: object) -> DataConfig:
    sets = {str(path): weight for path, weight in zip(two, weights, strict=True)}
    return DataConfig(shards=sets, image_size=16, workers=0, streams=4, block=4, **changes)


def test_one_manifest_of_two_sets(two: list[Path]) -> None:
    mixture = open_source(config(two))
    a, b = (Manifest.load(path) for path in two)
    assert isinstance(mixture, Mixture) and mixture.samples == 40 and mixture.labels is not None
    for sample in (0, 23, 24, 39):
        part, inside = (a, sample) if sample < 24 else (b, sample - 24)
        assert mixture.read(sample) == part.read(inside) and mixture.key(sample) == part.key(inside)
        assert mixture.shards[mixture.shard_of(sample)].sha256 == part.shards[part.shard_of(inside)].sha256
        assert mixture.locate([sample])[0] == mixture.shard_of(sample)
    ids = np.arange(40)
    assert a.labels is not None and b.labels is not None
    assert mixture.labels[ids].tolist() == [*a.labels.tolist(), *b.labels.tolist()]
    assert pickle.loads(pickle.dumps(mixture)).fingerprint == mixture.fingerprint
    assert open_source(config(two, (1, 1))).fingerprint != mixture.fingerprint
    assert open_source(config(two, (6, 2))).fingerprint == mixture.fingerprint  # the same shares
    for outside in (-1, 40):
        with pytest.raises(IndexError):
            mixture.read(outside)
    assert "75.00% from" in mixture.describe()


def test_batches_are_the_same_for_any_ranks_and_after_a_resume(two: list[Path]) -> None:
    data, needs = config(two), Needs(noise={"mask": Noise("uniform", (4,))}, labels=True)
    source = open_source(data)

    def batch(step: int, world: int) -> dict[int, tuple[int, int, bytes]]:
        found = {}
        for rank in range(world):
            options = {"seed": 3, "global_batch": 8, "micro_batch": 2, "rank": rank, "world": world}
            loader = TrainLoader(source, data, needs, start_step=step, **options)  # type: ignore[arg-type]
            batches = iter(loader)
            for _ in range(8 // (2 * world)):
                one = next(batches)
                assert one.labels is not None
                for row, position in enumerate(one.positions.tolist()):
                    found[position] = (int(one.ids[row]), int(one.labels[row]), one.images[row].numpy().tobytes())
            loader.close()
        return found

    reference = {step: batch(step, 1) for step in (0, 3, 11)}
    for world in (2, 4):
        assert {step: batch(step, world) for step in reference} == reference
    wanted = order_of(source, 3, 4, 4).ids(np.arange(24, 32))  # type: ignore[arg-type]
    assert [reference[3][position][0] for position in range(24, 32)] == wanted.tolist()


def test_mistakes_are_named(two: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"is below 1 / {ROWS:,} of all"):
        open_source(config(two, (1, 1e-6)))
    with pytest.raises(UserError, match="no such folder"):
        open_source(DataConfig(shards={str(two[0]): 1, str(tmp_path / "nowhere"): 1}))
    with pytest.raises(UserError, match="are the same data set; name it once"):
        open_source(DataConfig(shards={str(two[0]): 1, f"{two[0]}/": 2}))
    weights = (0, -1, float("nan"), float("inf"), "many", "1e999", True, None, [1])
    assert DataConfig(shards={"a": "1e-3", "b": 2}).shards == {"a": 0.001, "b": 2.0}
    odd = [({"a": 1, "b": weight}, "the weight .* of 'b' must be a number above 0") for weight in weights]
    stream = ({"wds:a.tar": 1}, "weights need data sets with an index")
    for sets, message in (*odd, ({}, "weights need"), stream, (["a", "b"], "several data sets need weights")):
        with pytest.raises(ValidationError, match=message):
            DataConfig(shards=sets)


def test_sets_with_other_classes_have_no_labels_together(two: list[Path], tmp_path: Path) -> None:
    assert main(["synthetic", str(tmp_path / "c"), "--classes", "3", "--per-class", "4"]) == 0
    assert main(["folder", str(tmp_path / "c"), str(tmp_path / "c-shards")]) == 0
    mixture = open_source(config([two[0], tmp_path / "c-shards"]))
    assert mixture.labels is None and mixture.classes is None  # type: ignore[union-attr]
