"""Random numbers as a pure function of a key: seed, purpose, epoch and index in the epoch.

There is no state that a resume could lose or that could differ between workers: a number depends on its key alone. The
key is hashed (blake2b, 128 bits) into the key of a Philox generator (Salmon et al. 2011), of which only the raw 64-bit
integers are used: numpy guarantees that stream across versions, but may change the methods of `Generator`.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
from numpy.random import Philox
from numpy.random.bit_generator import ISeedSequence
from numpy.typing import NDArray


class _Key(ISeedSequence):
    """Gives Philox its key unchanged. `Philox(key=...)` gives the same numbers but gathers entropy first: 5x slower."""

    def __init__(self, digest: bytes):
        self.words = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def generate_state(self, n_words: int, dtype: object = np.uint64) -> NDArray[np.uint64]:
        assert n_words == 2
        return self.words


def raw(seed: int, purpose: str, *numbers: int, n: int) -> NDArray[np.uint64]:
    """uint64 [n]: the first n integers under the key (seed, purpose, *numbers). Other keys give independent streams."""
    # the count comes first, so that no two keys give the same text
    text = "/".join(map(str, (len(numbers), int(seed), *map(int, numbers), purpose)))
    key = _Key(blake2b(text.encode(), digest_size=16).digest())
    return Philox(key).random_raw(n)  # type: ignore[arg-type]  # numpy's stubs know only one kind of seed sequence


def uniform(seed: int, purpose: str, *numbers: int, n: int) -> NDArray[np.float32]:
    """float32 [n] in [0, 1), multiples of 2**-24."""
    return to_uniform(raw(seed, purpose, *numbers, n=n))


def exponential(seed: int, purpose: str, *numbers: int, n: int) -> NDArray[np.float32]:
    """float32 [n] > 0 with unit rate: the inverse distribution function, -log1p(-u), in float64."""
    return to_exponential(raw(seed, purpose, *numbers, n=n))


def permutation(seed: int, purpose: str, *numbers: int, n: int) -> NDArray[np.int64]:
    """int64 [n]: a random order of 0 .. n-1."""
    return np.argsort(raw(seed, purpose, *numbers, n=n), kind="stable")


def to_uniform(integers: NDArray[np.uint64]) -> NDArray[np.float32]:
    """Each of `raw` to its number in [0, 1); many at a time cost less than each of them alone."""
    return (integers >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def to_exponential(integers: NDArray[np.uint64]) -> NDArray[np.float32]:
    cells = (integers >> np.uint64(12)).astype(np.float64)  # their midpoints are exact in float64 and never 0 or 1
    return (-np.log1p(-(cells + 0.5) * 2**-52)).astype(np.float32)
