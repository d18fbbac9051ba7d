"""Several data sets in one run, with weights (`data.shards: {path: weight}`): one endless sequence, as order.py has it.

The set of a position is a pure function too. The sequence is a table with C = `streams` columns: position p is in row
p // C and column p % C. In each column, every ROWS rows are a cycle: each set has as many of them in every cycle (its
weight, rounded to 1 / ROWS), in an order that is keyed by (seed, cycle, column). Row j of a set in column c is
position j * C + c of that set's own endless order. So

- over any whole cycle the sets have exactly their shares, and a batch has them on average;
- a set's own positions are taken without gap or repeat: each of its samples comes once per epoch OF THE SET, whatever
  the others do (between columns, the places differ by less than a cycle);
- a position costs the same everywhere, and steps, ranks and resumes are those of a single set;
- p % C is the stream in the set's order as well, so a rank reads as few shards as it would from one set.

An epoch, for the schedules, is as many samples as all sets have together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mimscale.data import noise
from mimscale.data.manifest import Ints, Manifest, Shard
from mimscale.data.order import Order
from mimscale.data.shard_cache import Cache
from mimscale.errors import UserError

ROWS = 1024  # of a cycle


class Mixture:
    """Data sets with the attributes of one Manifest. Sample ids and shard numbers continue from set to set.

    parts: the sets. shares: int [sets], rows of each in a cycle; they sum to ROWS. labels: only if every set has labels
    of the same classes.
    """

    def __init__(self, parts: Sequence[Manifest], weights: Sequence[float]):
        self.parts = list(parts)
        self.shares = shares(weights)
        for part, weight, share in zip(parts, weights, self.shares, strict=True):
            if share == 0:
                raise UserError(
                    f"data.shards: the weight {weight:g} of '{part.location}' is below 1 / {ROWS:,} of all; enlarge "
                    "it, or leave that set out"
                )
        self.cache = parts[0].cache
        self.shards: list[Shard] = [shard for part in parts for shard in part.shards]
        self.shard_paths: list[Path] = [path for part in parts for path in part.shard_paths]
        self.counts: Ints = np.concatenate([part.counts for part in parts])
        self.samples = sum(part.samples for part in parts)
        self.first_ids: Ints = np.cumsum([0, *(part.samples for part in parts)])
        self.first_shards: Ints = np.cumsum([0, *(len(part.shards) for part in parts)])
        same = all(part.labels is not None and part.classes == parts[0].classes for part in parts)
        self.classes = parts[0].classes if same else None
        self.labels = _Labels(self) if same else None
        self.location = self.folder = ", ".join(part.location for part in parts)

    @classmethod
    def load(cls, sets: Mapping[str, float], cache: Cache | None = None) -> Mixture:
        """Open all sets. Raises UserError, also if two of them are one: its samples would come twice."""
        parts = [Manifest.load(path, cache=cache) for path in sets]
        seen: dict[str, str] = {}
        for part in parts:
            if part.fingerprint in seen:
                raise UserError(
                    f"data.shards: '{seen[part.fingerprint]}' and '{part.location}' are the same data set; name it "
                    "once, with the sum of the weights"
                )
            seen[part.fingerprint] = part.location
        return cls(parts, list(sets.values()))

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the sets, in their order, and of their shares."""
        values = [ROWS, [part.fingerprint for part in self.parts], self.shares.tolist()]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()

    def describe(self) -> str:
        """The shares and the sizes of the sets, as text."""
        return ", ".join(
            f"{share / ROWS:.2%} from {part.location} ({part.samples:,} samples)"
            for part, share in zip(self.parts, self.shares.tolist(), strict=True)
        )

    def locate(self, ids: ArrayLike) -> tuple[Ints, Ints]:
        """As `Manifest.locate`."""
        at = np.asarray(ids, dtype=np.int64)
        numbers, rows = np.empty_like(at), np.empty_like(at)
        for part, here in self._parts_of(at):
            found = self.parts[part].locate(at[here] - self.first_ids[part])
            numbers[here], rows[here] = found[0] + self.first_shards[part], found[1]
        return numbers, rows

    def shard_of(self, sample_id: int) -> int:
        part, inside = self._part(sample_id)
        return self.parts[part].shard_of(inside) + int(self.first_shards[part])

    def read(self, sample_id: int) -> bytes:
        part, inside = self._part(sample_id)
        return self.parts[part].read(inside)

    def key(self, sample_id: int) -> str:
        part, inside = self._part(sample_id)
        return self.parts[part].key(inside)

    def reopen(self, sample_id: int) -> None:
        part, inside = self._part(sample_id)
        self.parts[part].reopen(inside)

    def read_ahead(self, ids: Ints) -> None:
        for part, here in self._parts_of(ids):
            self.parts[part].read_ahead(ids[here] - self.first_ids[part])

    def shard_key(self, shard: int) -> str:
        part = self._part_of_shard(shard)
        return self.parts[part].shard_key(shard - int(self.first_shards[part]))

    def fetch(self, shard: int) -> bool:
        part = self._part_of_shard(shard)
        return self.parts[part].fetch(shard - int(self.first_shards[part]))

    def cut_file(self) -> Path | None:
        return next((path for part in self.parts if (path := part.cut_file()) is not None), None)

    def close(self) -> None:
        for part in self.parts:
            part.close()

    def _part(self, sample_id: int) -> tuple[int, int]:
        if not 0 <= sample_id < self.samples:
            raise IndexError(f"sample id {sample_id} outside 0 .. {self.samples - 1}")
        part = int(np.searchsorted(self.first_ids, sample_id, side="right")) - 1
        return part, sample_id - int(self.first_ids[part])

    def _part_of_shard(self, shard: int) -> int:
        return int(np.searchsorted(self.first_shards, shard, side="right")) - 1

    def _parts_of(self, ids: Ints) -> list[tuple[int, NDArray[np.bool_]]]:
        if ids.size and (ids.min() < 0 or ids.max() >= self.samples):
            raise IndexError(f"sample id outside 0 .. {self.samples - 1}")
        parts = np.searchsorted(self.first_ids, ids, side="right") - 1
        return [(int(part), parts == part) for part in np.unique(parts)]


class _Labels:
    """The labels of all sets, read where they are."""

    def __init__(self, mixture: Mixture):
        self._mixture = mixture

    def __getitem__(self, ids: Ints) -> Ints:
        found = np.empty_like(ids)
        for part, here in self._mixture._parts_of(ids):
            labels = self._mixture.parts[part].labels
            assert labels is not None
            found[here] = labels[ids[here] - self._mixture.first_ids[part]]
        return found

    def max(self) -> int:
        return max(int(part.labels.max()) for part in self._mixture.parts if part.labels is not None)


class MixtureOrder:
    """position in the endless sequence -> sample id of the mixture; see the module. counts: [sets][shards]."""

    def __init__(
        self, counts: Sequence[Ints], shares_: Ints, seed: int, streams: int = 256, block: int = 8192, rows: int = ROWS
    ):
        self._arguments = (counts, shares_, seed, streams, block, rows)
        self.shares, self.seed, self.streams, self.rows = shares_, seed, streams, rows
        seeds = [int(noise.raw(seed, "mixture set", number, n=1)[0] >> np.uint64(1)) for number in range(len(counts))]
        self.orders = [Order(of_set, own, streams, block) for of_set, own in zip(counts, seeds, strict=True)]
        self.first_ids = np.cumsum([0, *(order.samples for order in self.orders)])
        self._sets = np.repeat(np.arange(len(counts)), shares_)
        self._column = lru_cache(maxsize=2 * streams + 16)(self._make_column)

    def __reduce__(self) -> tuple[object, ...]:  # without the caches
        return MixtureOrder, self._arguments

    def ids(self, positions: ArrayLike) -> Ints:
        """int64 [n] positions >= 0, in any order -> int64 [n] sample ids."""
        at = np.asarray(positions, dtype=np.int64)
        if at.size and at.min() < 0:
            raise ValueError(f"position {at.min()} is negative")
        sets, inside = self.sets(at)
        ids = np.empty_like(at)
        for number in np.unique(sets):
            here = sets == number
            ids[here] = self.orders[number].ids(inside[here]) + self.first_ids[number]
        return ids

    def sets(self, positions: Ints) -> tuple[Ints, Ints]:
        """int64 [n] positions -> (number of the set, position in its own order)."""
        rows, columns = np.divmod(positions, self.streams)
        cycles, rows = np.divmod(rows, self.rows)
        sets, places = np.empty_like(positions), np.empty_like(positions)
        pairs, which = np.unique(np.stack([cycles, columns]), axis=1, return_inverse=True)
        for number, (cycle, column) in enumerate(pairs.T.tolist()):
            here = which.reshape(-1) == number
            of_row, place = self._column(cycle, column)
            sets[here], places[here] = of_row[rows[here]], place[rows[here]]
        return sets, (cycles * self.shares[sets] + places) * self.streams + columns

    def _make_column(self, cycle: int, column: int) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
        """(the set of each row of a cycle, how many earlier rows of the cycle have the same set)."""
        of_row = self._sets[noise.permutation(self.seed, "mixture", cycle, column, n=self.rows)]
        place = np.empty(self.rows, np.int16)
        for number, share in enumerate(self.shares.tolist()):
            place[of_row == number] = np.arange(share)
        return of_row.astype(np.int16), place


def shares(weights: Sequence[float], rows: int = ROWS) -> Ints:
    """int64 [sets]: the rows of a cycle for each weight, rounded so that they sum to `rows` (largest remainders)."""
    wanted = np.asarray(weights, dtype=np.float64)
    wanted = wanted / wanted.max()  # the sum of very large ones would be infinite
    wanted = wanted / wanted.sum() * rows
    result = np.floor(wanted + 1e-9).astype(np.int64)
    for number in np.argsort(-(wanted - result), kind="stable")[: rows - int(result.sum())]:
        result[number] += 1
    return result


Indexed = Manifest | Mixture
AnyOrder = Order | MixtureOrder


def order_of(source: Indexed, seed: int, streams: int, block: int) -> AnyOrder:
    """The order of a data set or of a mixture of them."""
    if isinstance(source, Mixture):
        return MixtureOrder([part.counts for part in source.parts], source.shares, seed, streams, block)
    return Order(source, seed, streams, block)
