"""The plan: keys, shuffle, shards and hash."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.plan import KEY_BYTES, Item, ShardPlan, Source, describe, unique_keys
from mimscale.data.sidecars import METADATA, is_sidecar
from mimscale.errors import UserError


def source(sizes: list[int], classes: list[str] | None = None) -> Source:
    items = [Item(f"k{n:04d}", n % 2 if classes else -1, "somewhere", 512 * n, s) for n, s in enumerate(sizes)]
    return Source({"kind": "test", "path": "somewhere"}, items, classes)


def plan(sizes: list[int], **options) -> ShardPlan:
    return ShardPlan(source(sizes), **{"seed": 0, "shard_mb": 1, "shard_samples": None, **options})


@given(st.lists(st.text(max_size=150), max_size=30))
def test_keys_are_unique_short_and_without_dots(names: list[str]) -> None:
    keys = unique_keys(names)
    assert len(set(keys)) == len(names)
    assert all("." not in key and len(key.encode()) <= KEY_BYTES for key in keys)


def test_keys_stay_readable() -> None:
    names = ["n01440764/n01440764_10026", "a.b", "a_b", "a_b-2", "a b", "x" * 200, "x" * 201]
    keys = unique_keys(names)
    assert keys[:5] == ["n01440764/n01440764_10026", "a_b", "a_b-2", "a_b-2-2", "a_b-3"]
    assert keys[5][:60] == keys[6][:60] == "x" * 60 and keys[5] != keys[6]


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=60), st.integers(1, 20))
def test_every_image_is_in_one_shard(sizes: list[int], per_shard: int) -> None:
    shuffled = plan(sizes, shard_samples=per_shard)
    shards = [shuffled.shard(number) for number in range(shuffled.shards)]
    assert sorted(item for shard in shards for item in shard) == source(sizes).items
    assert min(map(len, shards)) >= 1 and max(map(len, shards)) <= per_shard


def test_shards_by_size() -> None:
    shuffled = plan([100_000] * 95)
    assert shuffled.shards == 10  # 9.5 million bytes with their headers
    assert max(sum(item.size for item in shuffled.shard(n)) for n in range(10)) < 1.05 * 2**20
    assert plan([10]).shards == 1


def test_the_shuffle_is_global_and_follows_the_seed() -> None:
    one, again, other = (plan([10] * 500, seed=seed).items for seed in (1, 1, 2))
    assert one == again != other
    numbers = [int(item.key[1:]) for item in one]
    assert abs(np.corrcoef(numbers, np.arange(500))[0, 1]) < 0.15


def test_the_hash_covers_everything_that_changes_the_bytes() -> None:
    sizes = [10, 20, 30]
    base = plan(sizes).hash
    assert plan(sizes).hash == base
    assert len({base, plan([10, 20, 31]).hash, plan(sizes, seed=1).hash, plan(sizes, shard_samples=2).hash}) == 4
    sources = [source(sizes, classes) for classes in (["a", "b"], ["a", "c"])]
    labelled = [ShardPlan(found, seed=0, shard_mb=1, shard_samples=None).hash for found in sources]
    assert len({base, *labelled}) == 3


def test_a_source_without_images_is_refused() -> None:
    empty = Source(
        {"kind": "folder", "path": "/x"}, [], None, Counter({"hidden": 1200, "without an image's content": 2})
    )
    with pytest.raises(UserError, match="no images in '/x' .1,200 hidden, 2 without an image's content"):
        ShardPlan(empty, seed=0, shard_mb=1, shard_samples=None)
    assert describe(Counter()) == ""


@pytest.mark.parametrize("name", ["__background__/1", "__meta__", "__MACOSX/a", "x/__MACOSX/a"])
def test_no_key_is_one_that_readers_pass_over(name: str) -> None:
    first, second = unique_keys([name, name])
    for key in (first, second):
        assert not METADATA.match(f"{key}.jpg") and not is_sidecar(f"{key}.jpg")
    assert first != second and unique_keys(["a__b/__c", "__init"]) == ["a__b/__c", "__init"]
