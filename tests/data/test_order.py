"""The endless order: every sample once per epoch, independent of ranks, workers, resumes and world sizes."""

from __future__ import annotations

import hashlib
import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimscale.data.order import Order, fitting_streams, rank_positions
from mimscale.errors import UserError

counts = st.lists(st.integers(0, 60), min_size=1, max_size=12).filter(any)
orders = st.builds(Order, counts, st.integers(0, 9), st.integers(1, 40), st.integers(1, 50))


def test_the_order_never_changes() -> None:
    """A change here breaks the resume of every existing run."""
    order = Order([700, 300, 1100, 4000, 100], seed=5, streams=16, block=100)
    ids = order.ids(np.arange(3 * order.samples))
    assert ids[:6].tolist() == FIRST
    assert hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest() == DIGEST


FIRST = [9, 429, 2217, 2618, 2947, 3363]
DIGEST = "92ab266f612ffe0f5f630ad038bc739eb2f5eb518d13c55308e8178efcb067e5"


@given(orders, st.integers(0, 10**6))
def test_each_epoch_has_every_sample_once(order: Order, epoch: int) -> None:
    ids = order.ids(epoch * order.samples + np.arange(order.samples))
    assert np.array_equal(np.sort(ids), np.arange(order.samples))


@given(orders, st.data())
def test_ids_do_not_depend_on_earlier_calls(order: Order, data: st.DataObject) -> None:
    """Any start, any number of positions per call, any order, another process: the ids of an uninterrupted run."""
    total = 3 * order.samples
    uninterrupted = order.ids(np.arange(total))
    start = data.draw(st.integers(0, total - 1))
    fresh = pickle.loads(pickle.dumps(order))
    resumed = []
    while start < total:
        count = data.draw(st.integers(1, total))
        resumed.append(fresh.ids(np.arange(start, min(total, start + count))))
        start += count
    tail = np.concatenate(resumed)
    assert np.array_equal(tail, uninterrupted[total - len(tail) :])
    shuffled = np.array(data.draw(st.permutations(range(min(total, 50)))))
    assert np.array_equal(order.ids(shuffled), uninterrupted[shuffled])


@given(orders, st.data())
def test_ranks_workers_and_changes_of_world_size(order: Order, data: st.DataObject) -> None:
    """Steps under changing world sizes, micro-batches and workers: the global batches are [tG, (t+1)G) throughout."""
    world_sizes = [1, 2, 3, 4, 6, 12]
    global_batch = 12 * data.draw(st.integers(1, 4))
    steps = data.draw(st.integers(1, 12))
    expected = order.ids(np.arange(steps * global_batch)).reshape(steps, global_batch)
    for step in range(steps):
        world = data.draw(st.sampled_from(world_sizes))
        parts = [rank_positions(step, global_batch, rank, world) for rank in range(world)]
        assert {len(part) for part in parts} == {global_batch // world}
        micro = data.draw(st.sampled_from([m for m in (1, 2, 3, 4, 12) if global_batch // world % m == 0]))
        batches = [pickle.loads(pickle.dumps(order)).ids(run) for part in parts for run in part.reshape(-1, micro)]
        where = np.argsort(np.concatenate(parts))
        assert np.array_equal(np.concatenate(batches)[where], expected[step])


@pytest.mark.parametrize(("samples", "streams"), [(1, 1), (3, 256), (255, 256), (257, 256), (1000, 256), (20_000, 64)])
def test_epochs_and_seeds_differ(samples: int, streams: int) -> None:
    epochs = Order([samples], 0, streams, 64).ids(np.arange(20 * samples)).reshape(20, samples)
    other = Order([samples], 1, streams, 64).ids(np.arange(20 * samples)).reshape(20, samples)
    distinct = {epoch.tobytes() for epoch in (*epochs, *other)}
    assert len(distinct) == {1: 1, 3: 6}.get(samples, 40)


def test_a_small_data_set_is_shuffled_completely() -> None:
    """Up to one block every permutation is possible, however many streams were asked for."""
    epochs = Order([100], 0, 256, 8192).ids(np.arange(100 * 400)).reshape(400, 100)
    mean_index = np.argsort(epochs, axis=1).mean(axis=0)
    assert np.abs(mean_index - 49.5).max() < 4.5 * 28.9 / 20  # standard error of the mean of 400 uniform indices


def test_neighbours_come_from_many_shards() -> None:
    order = Order([1000] * 600, 0, streams=64, block=2048)
    assert order.streams == 64
    assert len(np.unique(order.ids(np.arange(4096)) // 1000)) > 64


def test_a_rank_reads_only_its_own_streams() -> None:
    """If the world size divides the streams, a rank reads few shards per epoch."""
    order = Order([1000] * 512, 0, streams=64, block=2048)
    steps = order.samples // 256
    touched = [
        len(np.unique(order.ids(np.concatenate([rank_positions(t, 256, rank, 32) for t in range(steps)])) // 1000))
        for rank in (0, 31)
    ]
    assert max(touched) <= 2 * (8000 // 1000 + 1)  # two streams of 8,000 samples each


@given(orders, st.integers(0, 5), st.data())
def test_the_shards_of_a_stream(order: Order, epoch: int, data: st.DataObject) -> None:
    stream = data.draw(st.integers(0, order.streams - 1))
    indices = stream + order.streams * np.arange(order.length)
    ids = order.ids(epoch * order.samples + indices)
    read = np.searchsorted(np.cumsum(order.counts), ids, side="right")
    assert set(order.stream_shards(epoch, stream).tolist()) == set(read.tolist())


@given(st.data())
def test_launches_with_other_world_sizes_and_batches(data: st.DataObject) -> None:
    """A run of several launches, each with its own ranks (1 to 512), workers and global batch.

    Every launch continues the endless sequence where the last one stopped: no sample is lost, repeated or moved.
    """
    order = data.draw(orders)
    consumed = 0
    for _ in range(data.draw(st.integers(1, 4))):
        world, micro = data.draw(st.integers(1, 512)), data.draw(st.integers(1, 3))
        batch = world * micro * data.draw(st.integers(1, 2))
        first = -(-consumed // batch)  # a launch starts at a multiple of its own batch
        step = first + data.draw(st.integers(0, 3))
        parts = [rank_positions(step, batch, rank, world) for rank in range(world)]
        workers = data.draw(st.integers(1, 7))
        by_worker = [run for part in parts for w in range(workers) for run in part.reshape(-1, micro)[w::workers]]
        positions = np.sort(np.concatenate(by_worker))
        assert np.array_equal(positions, np.arange(step * batch, (step + 1) * batch))
        ids = order.ids(positions)
        assert np.array_equal(ids, order.ids(positions[::-1])[::-1])
        consumed = (step + 1) * batch
    epoch = order.ids(np.arange(order.samples) + order.samples * (consumed // order.samples))
    assert np.array_equal(np.sort(epoch), np.arange(order.samples))


@given(st.integers(1, 10**9), st.integers(1, 512), st.integers(1, 10**4))
def test_fitting_streams(samples: int, streams: int, block: int) -> None:
    fitting = fitting_streams(samples, streams, block)
    assert streams % fitting == 0
    assert fitting == 1 or samples // fitting >= block
    larger = [c for c in range(fitting + 1, streams + 1) if streams % c == 0]
    assert all(samples // c < block for c in larger)


def test_four_hundred_million_samples_on_1024_ranks() -> None:
    """Any step of any rank is found without a list of all samples."""
    shards = np.full(160_000, 2500)
    shards[::7] = 1234
    tracemalloc.start()
    order = Order(shards, seed=0)
    world, global_batch, step = 1024, 16_384, 10**6 + 1
    parts = [order.ids(rank_positions(step, global_batch, rank, world)) for rank in range(0, world, 93)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 128 << 20
    expected = order.ids(np.arange(step * global_batch, (step + 1) * global_batch))
    assert len(np.unique(expected)) == global_batch and expected.max() < order.samples
    for rank, part in zip(range(0, world, 93), parts, strict=True):
        assert np.array_equal(part, expected[rank::world])


def test_a_batch_may_cross_the_end_of_an_epoch() -> None:
    order = Order([10, 3], 0, streams=4, block=2)
    batch = order.ids(rank_positions(2, 5, 0, 1))  # positions 10 .. 14: three of epoch 0, two of epoch 1
    assert batch.tolist() == order.ids(np.arange(26))[10:15].tolist()


def test_wrong_numbers_are_refused() -> None:
    with pytest.raises(UserError, match="at least one sample"):
        Order([0, 0], 0)
    with pytest.raises(UserError, match="streams = 0"):
        Order([3], 0, streams=0)
    with pytest.raises(UserError, match="multiple of the world size 3"):
        rank_positions(0, 16, 0, 3)
    with pytest.raises(ValueError, match="position -1"):
        Order([3], 0).ids([-1])
