"""Which rank keeps, reads and writes what, as pure functions: for a simulation of ranks that are not there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ALIGNMENT = 2
"""DeepSpeed pads each group of stages 1 and 2 to a multiple of this times the ranks."""


@dataclass(frozen=True)
class Piece:
    """A rank's run of a flattened parameter: the parameter's index, the first element, and how many."""

    parameter: int
    start: int
    length: int


def pieces(groups: Sequence[Sequence[int]], stage: int, rank: int, ranks: int) -> list[Piece]:
    """What a rank keeps of the optimiser's state and writes into a checkpoint.

    groups: elements of each parameter, by group of the optimiser; indices count through all groups. Stage 0: whole
    parameters in turn; stages 1 and 2: an equal cut of each group's concatenation; stage 3: an equal cut of each
    parameter. Every element is in exactly one rank's pieces.
    """
    found: list[Piece] = []
    index = 0
    for group in groups:
        if stage == 0:
            found += [Piece(index + i, 0, size) for i, size in enumerate(group) if (index + i) % ranks == rank]
        elif stage == 3:
            for i, size in enumerate(group):
                share = math.ceil(size / ranks)
                start, stop = min(size, rank * share), min(size, (rank + 1) * share)
                found += [Piece(index + i, start, stop - start)] if stop > start else []
        else:
            step = ALIGNMENT * ranks
            share = math.ceil(sum(group) / step) * step // ranks
            first, last, at = rank * share, (rank + 1) * share, 0
            for i, size in enumerate(group):
                start, stop = max(first, at), min(last, at + size)
                found += [Piece(index + i, start - at, stop - start)] if stop > start else []
                at += size
        index += len(group)
    return found


def kept(groups: Sequence[Sequence[int]], stage: int, ranks: int) -> np.ndarray:
    """Elements that each rank keeps, int64 [ranks]; without a loop over parameters and ranks where that is possible."""
    if stage in (1, 2):
        counts = np.zeros(ranks, dtype=np.int64)
        for group in groups:
            step, size = ALIGNMENT * ranks, sum(group)
            share = math.ceil(size / step) * step // ranks
            edges = np.minimum(np.arange(ranks + 1, dtype=np.int64) * share, size)
            counts += np.diff(edges)
        return counts
    if stage == 3:
        counts = np.zeros(ranks, dtype=np.int64)
        for size in (size for group in groups for size in group):
            share = math.ceil(size / ranks)
            counts += np.diff(np.minimum(np.arange(ranks + 1, dtype=np.int64) * share, size))
        return counts
    sizes = np.array([size for group in groups for size in group], dtype=np.int64)
    return np.bincount(np.arange(len(sizes)) % ranks, weights=sizes, minlength=ranks).astype(np.int64)
