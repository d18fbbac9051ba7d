"""`mimscale.open_shards`: every sample exactly once, whatever the size of a batch."""

from __future__ import annotations

import multiprocessing
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import mimscale
from data_prep.__main__ import main as data_prep
from mimscale.data.decode import decode
from mimscale.data.manifest import Manifest
from mimscale.data.synthetic import make_image_folder
from mimscale.data.transforms import center_crop, to_pixels
from tests.data.servers import WebServer


@pytest.mark.parametrize(("size", "workers"), [(7, 0), (32, 2), (80, 1), (1000, 0)])
def test_every_sample_once_in_order(size: int, workers: int, shards: Path) -> None:
    manifest = Manifest.load(shards)
    data = mimscale.open_shards(shards)
    batches = list(data.batches(size, image_size=32, workers=workers))
    assert len(data) == 80 and data.classes == ("class_000", "class_001", "class_002", "class_003")
    sizes = [len(batch) for batch in batches]
    assert sizes == [size] * (80 // size) + [80 % size] * bool(80 % size)
    assert torch.cat([batch.ids for batch in batches]).tolist() == list(range(80))
    assert manifest.labels is not None
    labels = torch.cat([batch.labels for batch in batches if batch.labels is not None])
    assert labels.tolist() == manifest.labels.tolist()
    assert [key for batch in batches for key in batch.keys] == [manifest.key(sample) for sample in range(80)]
    for batch in (batches[0], batches[-1]):
        assert batch.images.dtype == torch.uint8 and batch.images.shape == (len(batch), 3, 32, 32)
    expected = to_pixels(center_crop(decode(manifest.read(79)), 32, 0.875)[0])
    assert np.array_equal(batches[-1].images[-1].numpy(), expected)


def test_labels_are_wanted_or_not(shards: Path, tmp_path: Path) -> None:
    data = mimscale.open_shards(str(shards))
    assert next(data.batches(4, image_size=32, workers=0, labels=False)).labels is None
    labels = next(data.batches(4, image_size=32, workers=0, labels=True)).labels
    assert labels is not None and labels.dtype == torch.int64
    make_image_folder(tmp_path / "images", classes=1, per_class=3, side=32)
    words = ["folder", str(tmp_path / "images"), str(tmp_path / "shards"), "--unlabelled"]
    assert data_prep(words) == 0
    bare = mimscale.open_shards(tmp_path / "shards")
    assert bare.classes is None and next(bare.batches(4, image_size=32, workers=0)).labels is None
    with pytest.raises(mimscale.UserError, match="has samples without labels"):
        bare.batches(4, labels=True)


def test_who_stops_early_leaves_no_workers(shards: Path) -> None:
    batches = mimscale.open_shards(shards).batches(8, image_size=32, workers=2)
    next(batches)
    assert multiprocessing.active_children()
    batches.close()  # type: ignore[attr-defined]
    assert not multiprocessing.active_children()


def test_a_web_server_gives_the_same(shards: Path, tmp_path: Path) -> None:
    web = WebServer(shards)
    try:
        with pytest.raises(mimscale.UserError, match="is remote: give cache="):
            mimscale.open_shards(web.url)
        remote = mimscale.open_shards(web.url, cache=tmp_path / "cache")
        ours, theirs = (list(d.batches(50, image_size=32, workers=0)) for d in (remote, mimscale.open_shards(shards)))
        assert all(torch.equal(a.images, b.images) for a, b in zip(ours, theirs, strict=True))
        assert ours[1].keys == theirs[1].keys
    finally:
        web.stop()


def test_what_is_refused(shards: Path, tmp_path: Path) -> None:
    for path, text in ((tmp_path / "nowhere", "no such folder"), ("wds:/data/part-{0..9}.tar", "for training only")):
        with pytest.raises(mimscale.UserError, match=text):
            mimscale.open_shards(path)
    with pytest.raises(mimscale.UserError, match="cannot be made: Not a directory"):
        mimscale.open_shards(shards, cache=shards / "manifest.json")
    for number in (0, float("nan"), float("inf"), "1", True):
        with pytest.raises(mimscale.UserError, match="cache_gib = "):
            mimscale.open_shards(shards, cache=tmp_path / "cache", cache_gib=number)  # type: ignore[arg-type]
    for place in (5, "", None, b"bytes"):
        with pytest.raises(mimscale.UserError, match="path = .* is not a path"):
            mimscale.open_shards(place)  # type: ignore[arg-type]
    data = mimscale.open_shards(shards)
    for size, options, text in (
        (0, {}, "size = 0 must be 1 or more"),
        (4.0, {}, "size = 4.0 is not a whole number"),
        (True, {}, "size = True is not a whole number"),
        (4, {"crop_pct": 1.5}, "crop_pct = 1.5 must lie between 0 and 1"),
        (4, {"crop_pct": "all"}, "crop_pct = 'all' is not a number"),
        (4, {"crop_pct": 1e-9}, "crop_pct = 1e-09 enlarges the short side of an image to 224,000,000,000 pixels"),
        (4, {"image_size": 0}, "image_size = 0"),
        (4, {"image_size": 1 << 40}, "image_size = 1099511627776 must be 1 or more and at most 8192"),
        (4, {"workers": -1}, "workers = -1"),
        (4, {"workers": 1e9}, "workers = 1000000000.0 is not a whole number"),
        (4, {"labels": "yes"}, "labels = 'yes' is neither True nor False"),
    ):
        with pytest.raises(mimscale.UserError, match=text):
            data.batches(size, **options)  # type: ignore[arg-type]


def test_a_damaged_sample_stops_the_iteration(shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path / "copy")
    manifest = Manifest.load(shards)
    shard, offset = manifest.shard_of(20), int(manifest.offsets[20])
    with (tmp_path / "copy" / manifest.file.shards[shard].name).open("r+b") as file:
        file.seek(offset)
        file.write(b"\0" * 64)
    data = mimscale.open_shards(tmp_path / "copy")
    with pytest.raises(mimscale.Stopped, match=f"sample 20 .*{manifest.key(20)}"):
        list(data.batches(16, image_size=32, workers=0))
