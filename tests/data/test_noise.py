"""Keyed random numbers: fixed values, independent between keys, and of the right distribution."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.random import Philox

from mimscale.data import noise


def test_the_numbers_never_change() -> None:
    """A change here breaks the resume of every existing run."""
    assert noise.raw(0, "crop", 3, 17, n=3).tolist() == RAW
    assert noise.uniform(0, "crop", 3, 17, n=3).tolist() == [(number >> 40) / 2**24 for number in RAW]
    assert noise.permutation(7, "block", 0, 1, 2, n=8).tolist() == PERMUTATION
    np.testing.assert_allclose(noise.exponential(0, "crop", 3, 17, n=3), EXPONENTIAL, rtol=1e-7)


RAW = [12229081767526461648, 2276589232726329813, 16576020196205046699]
PERMUTATION = [6, 1, 5, 3, 0, 7, 2, 4]
EXPONENTIAL = [1.0874939, 0.131720632, 2.28856254]


def test_the_generator_is_plain_philox() -> None:
    digest = blake2b(b"2/0/3/17/crop", digest_size=16).digest()
    assert Philox(key=int.from_bytes(digest, "little")).random_raw(3).tolist() == RAW


keys = st.tuples(
    st.integers(0, 2**63), st.sampled_from(["crop", "noise/mask", "1", "/", "1/crop"]), st.lists(st.integers(0, 99))
)


@given(keys, keys)
def test_other_keys_give_other_numbers(first: tuple, second: tuple) -> None:
    one = noise.raw(first[0], first[1], *first[2], n=4)
    two = noise.raw(second[0], second[1], *second[2], n=4)
    assert np.array_equal(one, two) == (first == second)


def test_numpy_integers_give_the_same_key() -> None:
    assert np.array_equal(noise.raw(1, "x", 2, n=2), noise.raw(np.int64(1), "x", np.int32(2), n=2))


def test_a_longer_draw_starts_with_the_shorter_one() -> None:
    assert np.array_equal(noise.uniform(1, "x", n=50)[:7], noise.uniform(1, "x", n=7))


@pytest.mark.parametrize("draw", [noise.uniform, noise.exponential])
def test_distribution(draw) -> None:
    """Kolmogorov-Smirnov against the true distribution; many short draws, as the loader makes them."""
    n = 20_000
    sample = np.sort(np.concatenate([draw(5, "ks", index, n=20) for index in range(n // 20)]).astype(np.float64))
    assert draw(5, "ks", 0, n=20).dtype == np.float32
    expected = sample if draw is noise.uniform else -np.expm1(-sample)
    distance = np.abs(expected - (np.arange(n) + 0.5) / n).max()
    assert distance < 1.95 / np.sqrt(n)  # exceeded by chance once in a thousand seeds; this one is fixed


def test_the_ends_of_the_ranges() -> None:
    ends = np.array([0, 2**64 - 1], dtype=np.uint64)
    low, high = noise.to_exponential(ends)
    assert 0 < low < 1e-15 and 36 < high < 38
    assert noise.uniform(5, "ends", n=100_000).max() < 1


@given(st.integers(0, 300), st.integers(0, 5))
def test_permutation(n: int, index: int) -> None:
    assert sorted(noise.permutation(3, "p", index, n=n)) == list(range(n))
