"""The order of samples: a pure function from a position in ONE ENDLESS SEQUENCE to a sample id.

The sequence is the concatenation of one permutation of all N samples per epoch: position p is index p % N of epoch
p // N. Every sample comes exactly once per epoch; nothing is dropped or repeated. The order does not depend on ranks or
workers: step t takes the positions [tG, (t+1)G) for every world size, so a resume needs the step number only.

The order of one epoch, with all random numbers keyed by (seed, epoch):

1. The shards are permuted and concatenated into a line of N samples, which is rotated by a random offset.
2. The line is split into C streams of equal length. The last N mod C samples are the tail, which ends the epoch.
3. Inside a stream, every block of `block` samples is permuted; so is the tail.
4. The streams are interleaved: index q < C * (N // C) is sample q // C of stream q % C.

So a reader of one stream reads a few shards one after the other, while neighbouring indices come from C different parts
of the data. Samples are shuffled within a window of C * block (2 million by default).
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
    """The largest divisor of `streams` with which every stream has at least one full block; 1 if there is none.

    A stream shorter than a block would be shuffled within itself only. It must be a divisor, so that a world size that
    divides `streams` still gives every rank streams of its own.
    """
    return max((c for c in range(1, streams + 1) if streams % c == 0 and samples // c >= block), default=1)


class Order:
    """position in the endless sequence -> sample id (row of the manifest).

    counts: samples per shard, or the manifest itself. streams, block: see the module; `self.streams` is the result of
    `fitting_streams`. Every position costs the same: there is no state and no replay. Memory is bounded by the number
    of shards and a cache of block permutations (64 MiB, or one block if that is larger).
    """

    def __init__(self, counts: Manifest | Sequence[int] | Ints, seed: int, streams: int = 256, block: int = 8192):
        self.counts: Ints = np.asarray(counts.counts if isinstance(counts, Manifest) else counts, dtype=np.int64)
        self.samples = int(self.counts.sum())
        if self.samples < 1 or self.counts.min() < 0:
            raise UserError(f"an order needs at least one sample, and no shard with a negative count: {self.samples}")
        if streams < 1 or block < 1:
            raise UserError(f"streams = {streams} and block = {block} must be at least 1")
        self.seed, self.block, self._wanted_streams = seed, block, streams
        self.streams = fitting_streams(self.samples, streams, block)
        self.length = self.samples // self.streams  # samples per stream
        self._first_id = np.cumsum(self.counts) - self.counts
        self._epoch = lru_cache(maxsize=3)(self._make_epoch)
        self._block = lru_cache(maxsize=max(1, min(self.streams + 16, _CACHE_BYTES // (4 * block))))(self._make_block)

    def __reduce__(self) -> tuple[object, ...]:  # without the caches
        return Order, (self.counts, self.seed, self._wanted_streams, self.block)

    def ids(self, positions: ArrayLike) -> Ints:
        """int64 [n] positions >= 0, in any order -> int64 [n] sample ids."""
        at = np.asarray(positions, dtype=np.int64)
        if at.size and at.min() < 0:
            raise ValueError(f"position {at.min()} is negative")
        epochs, indices = np.divmod(at, self.samples)
        ids = np.empty_like(at)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            ids[here] = self._ids_of_epoch(int(epoch), indices[here])
        return ids

    def stream_shards(self, epoch: int, stream: int) -> Ints:
        """int64 [k]: the shards that a stream reads in an epoch, in this order (one may be both first and last)."""
        shards, starts, rotation = self._epoch(epoch)
        first = (stream * self.length + rotation) % self.samples
        last = first + self.length - 1
        slots = np.searchsorted(starts, [first, last % self.samples], side="right") - 1
        visited = np.arange(slots[0], slots[1] + 1 + (len(shards) if last >= self.samples else 0)) % len(shards)
        return shards[visited[self.counts[shards[visited]] > 0]]

    def _ids_of_epoch(self, epoch: int, indices: Ints) -> Ints:
        stream, row = indices % self.streams, indices // self.streams
        tail = row >= self.length  # treated as one more stream
        stream[tail], row[tail] = self.streams, indices[tail] - self.streams * self.length
        number, inside = np.divmod(row, self.block)
        offsets = stream * self.length + number * self.block  # on the line of shards
        for s, k in np.unique(np.stack([stream, number]), axis=1).T:
            here = (stream == s) & (number == k)
            offsets[here] += self._block(epoch, int(s), int(k))[inside[here]]
        shards, starts, rotation = self._epoch(epoch)
        offsets = (offsets + rotation) % self.samples
        slot = np.searchsorted(starts, offsets, side="right") - 1
        return self._first_id[shards[slot]] + offsets - starts[slot]

    def _make_epoch(self, epoch: int) -> tuple[Ints, Ints, int]:
        """(the shards in this epoch's order, the start of each on their line, the rotation of the line)."""
        shards = noise.permutation(self.seed, "shards", epoch, n=len(self.counts))
        counts = self.counts[shards]
        rotation = int(noise.raw(self.seed, "rotation", epoch, n=1)[0]) % self.samples
        return shards, np.cumsum(counts) - counts, rotation

    def _make_block(self, epoch: int, stream: int, number: int) -> NDArray[np.int32]:
        length = self.length if stream < self.streams else self.samples - self.streams * self.length
        size = min(self.block, length - number * self.block)
        return noise.permutation(self.seed, "block", epoch, stream, number, n=size).astype(np.int32)


Jumps = tuple[tuple[int, int], ...]


def batch_of(step: int, jumps: Jumps = ()) -> int:
    """Number of the global batch that a step takes. jumps: (step, number of batches skipped before it), ascending."""
    return step + sum(batches for start, batches in jumps if start <= step)


def jumped(jumps: Jumps, start: int, step: int) -> Jumps:
    """The jumps after a rollback to step `start`: from there on the run takes only batches that it has not seen.

    step: where the run was before the rollback; the first unseen batch is the one of that step.
    """
    kept = tuple(jump for jump in jumps if jump[0] < start)
    return (*kept, (start, batch_of(step, jumps) - batch_of(start, kept)))


def rank_positions(batch: int, global_batch: int, rank: int, world: int, unit: int = 1) -> Ints:
    """int64 [global_batch / world]: the positions of one rank in one global batch (counted from 0), ascending.

    Rank r has the offsets r, r + world, ... of the global batch. If world divides the number of streams, a rank
    therefore reads only its own streams within an epoch. Micro-batches are consecutive parts of this list. unit: so
    many neighbouring positions stay together on one rank; ranks then take turns by units.
    """
    if global_batch % (world * unit) or not 0 <= rank < world:
        raise UserError(
            f"global batch {global_batch} must be a multiple of the world size {world}, and rank {rank} in it"
        )
    positions = np.arange(batch * global_batch, (batch + 1) * global_batch, dtype=np.int64)
    return positions.reshape(-1, world, unit)[:, rank].reshape(-1)
