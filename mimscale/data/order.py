"""Which sample stands where: a pure function over ONE ENDLESS SEQUENCE.

The sequence is the epochs' permutations of all N samples laid end to end: position p is place p % N of epoch p // N, so
every sample comes exactly once in each epoch; nothing is dropped or repeated. Nothing here knows of ranks or workers:
step t takes the positions [tG, (t+1)G) for every world size, and a resume is a number.

The order of one epoch, all random numbers keyed by (seed, epoch):

1. The shards are permuted and laid end to end, and the whole is rotated by a random offset.
2. It is cut into C equal streams. The N mod C samples behind the last cut are the tail, which ends the epoch.
3. Inside a stream, every block of `block` samples is permuted; so is the tail.
4. The streams are interleaved: place q < C * (N // C) is sample q // C of stream q % C.

A reader of one stream thus walks through its own few shards, while neighbouring places come from C different parts of
the data. The window within which samples mix is C * block (2 million by default).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mimscale.data import noise
from mimscale.data.manifest import Ints, Manifest
from mimscale.errors import UserError

_CACHE_BYTES = 64 << 20


def fitting_streams(samples: int, streams: int, block: int) -> int:
    """The largest divisor of `streams` that leaves every stream a full block; 1 where there is none.

    A stream shorter than a block would mix nothing but itself. A divisor, so that whoever laid out ranks for `streams`
    still reads whole streams.
    """
    return max((c for c in range(1, streams + 1) if streams % c == 0 and samples // c >= block), default=1)


class Order:
    """position in the endless sequence -> sample id (row of the manifest).

    counts: samples per shard, or the manifest itself. streams, block: see the module; `self.streams` is what
    `fitting_streams` made of it. Any position costs the same: there is no state and no replay. Memory is bounded by
    the number of shards and a cache of block permutations (64 MiB, or one block if that is larger).
    """

    def __init__(self, counts: Manifest | Sequence[int] | Ints, seed: int, streams: int = 256, block: int = 8192):
        self.counts: Ints = np.asarray(counts.counts if isinstance(counts, Manifest) else counts, dtype=np.int64)
        self.samples = int(self.counts.sum())
        if self.samples < 1 or self.counts.min() < 0:
            raise UserError(f"an order needs at least one sample, and no shard with a negative count: {self.samples}")
        if streams < 1 or block < 1:
            raise UserError(f"streams = {streams} and block = {block} must be at least 1")
        self.seed, self.block, self._asked_streams = seed, block, streams
        self.streams = fitting_streams(self.samples, streams, block)
        self.length = self.samples // self.streams  # samples per stream
        self._first_id = np.cumsum(self.counts) - self.counts
        self._epoch = lru_cache(maxsize=3)(self._make_epoch)
        self._block = lru_cache(maxsize=max(1, min(self.streams + 16, _CACHE_BYTES // (4 * block))))(self._make_block)

    def __reduce__(self) -> tuple[object, ...]:  # caches stay behind
        return Order, (self.counts, self.seed, self._asked_streams, self.block)

    def ids(self, positions: ArrayLike) -> Ints:
        """int64 [n] positions >= 0, in any order -> int64 [n] sample ids."""
        at = np.asarray(positions, dtype=np.int64)
        if at.size and at.min() < 0:
            raise ValueError(f"position {at.min()} is negative")
        epochs, places = np.divmod(at, self.samples)
        ids = np.empty_like(at)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            ids[here] = self._ids_of_epoch(int(epoch), places[here])
        return ids

    def stream_shards(self, epoch: int, stream: int) -> Ints:
        """int64 [k]: the shards that a stream walks through in an epoch, in this order (one may come at both ends)."""
        shards, starts, offset = self._epoch(epoch)
        first = (stream * self.length + offset) % self.samples
        last = first + self.length - 1
        slots = np.searchsorted(starts, [first, last % self.samples], side="right") - 1
        walk = np.arange(slots[0], slots[1] + 1 + (len(shards) if last >= self.samples else 0)) % len(shards)
        return shards[walk[self.counts[shards[walk]] > 0]]

    def _ids_of_epoch(self, epoch: int, places: Ints) -> Ints:
        stream, row = places % self.streams, places // self.streams
        tail = row >= self.length
        stream[tail], row[tail] = (
            self.streams,
            places[tail] - self.streams * self.length,
        )  # it counts as one more stream
        number, inside = np.divmod(row, self.block)
        laid = stream * self.length + number * self.block  # place on the line of shards
        for s, k in np.unique(np.stack([stream, number]), axis=1).T:
            here = (stream == s) & (number == k)
            laid[here] += self._block(epoch, int(s), int(k))[inside[here]]
        shards, starts, offset = self._epoch(epoch)
        laid = (laid + offset) % self.samples
        slot = np.searchsorted(starts, laid, side="right") - 1
        return self._first_id[shards[slot]] + laid - starts[slot]

    def _make_epoch(self, epoch: int) -> tuple[Ints, Ints, int]:
        """The shards in this epoch's order, where each starts on their line, and the line's rotation."""
        shards = noise.permutation(self.seed, "shards", epoch, n=len(self.counts))
        counts = self.counts[shards]
        offset = int(noise.raw(self.seed, "rotation", epoch, n=1)[0]) % self.samples
        return shards, np.cumsum(counts) - counts, offset

    def _make_block(self, epoch: int, stream: int, number: int) -> NDArray[np.int32]:
        length = self.length if stream < self.streams else self.samples - self.streams * self.length
        size = min(self.block, length - number * self.block)
        return noise.permutation(self.seed, "block", epoch, stream, number, n=size).astype(np.int32)


Jumps = tuple[tuple[int, int], ...]


def batch_of(step: int, jumps: Jumps = ()) -> int:
    """Which global batch of the endless sequence a step takes. jumps: (step, batches left out before it), ascending."""
    return step + sum(batches for start, batches in jumps if start <= step)


def jumped(jumps: Jumps, start: int, step: int) -> Jumps:
    """The jumps with which a run that goes back finds, from step `start` on, only batches that it has not seen.

    step: where it was; the first batch it has not seen is that step's.
    """
    kept = tuple(jump for jump in jumps if jump[0] < start)
    return (*kept, (start, batch_of(step, jumps) - batch_of(start, kept)))


def rank_positions(batch: int, global_batch: int, rank: int, world: int) -> Ints:
    """int64 [global_batch / world]: the positions of one rank in one global batch (counted from 0), ascending.

    The ranks take turns: rank r has the offsets r, r + world, ... of the global batch. Where world divides the number
    of streams, a rank so reads only its own streams within an epoch. Micro-batches are consecutive runs of this list.
    """
    if global_batch % world or not 0 <= rank < world:
        raise UserError(
            f"global batch {global_batch} must be a multiple of the world size {world}, and rank {rank} in it"
        )
    return np.arange(batch * global_batch + rank, (batch + 1) * global_batch, world, dtype=np.int64)
