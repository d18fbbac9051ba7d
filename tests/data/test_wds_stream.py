"""Shards without an index: streamed, distributed over ranks and workers, never through a shell or a pickle."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from mimscale.config.recipes import load_recipe, validate
from mimscale.data.config import DataConfig
from mimscale.data.loader import TrainLoader
from mimscale.data.manifest import Manifest
from mimscale.data.sample_reader import DamagedSample
from mimscale.data.wds_stream import Source, WebDatasetStream, open_source
from mimscale.errors import UserError
from mimscale.training.checked_run import prepare
from mimscale.types import Batch, Needs, Noise
from tests import ranks
from tests.data.servers import WebServer

NEEDS = Needs(noise={"mask": Noise("uniform", (4,))})
GLOBAL = 16  # of 80 samples in 5 shards


def config(shards: Path | str, **changes) -> DataConfig:
    values = {"image_size": 16, "workers": 0, "stream": {"samples": 80, "buffer": 8}, **changes}
    return DataConfig(shards=str(shards), **values)


def loader(source: Source, data: DataConfig, rank: int = 0, world: int = 1, start_step: int = 0) -> TrainLoader:
    sizes: Any = {"global_batch": GLOBAL, "micro_batch": GLOBAL // world, "rank": rank, "world": world}
    return TrainLoader(source, data, NEEDS, seed=3, start_step=start_step, **sizes)


def batches(data: DataConfig, steps: int, world: int = 1, start_step: int = 0) -> list[Batch]:
    found = []
    for rank in range(world):
        part = loader(WebDatasetStream(data, world), data, rank, world, start_step)
        found += list(islice(part, steps))
        part.close()
    return found


def ids(found: list[Batch]) -> list[int]:
    return torch.cat([batch.ids for batch in found]).tolist()


def all_shards(shards: Path) -> str:
    return f"wds:{shards}/shard-{{000000..000004}}.tar"


@pytest.mark.parametrize("world", [1, 2])
def test_a_pass_over_all_shards_has_every_image_once_and_the_next_has_another_order(shards: Path, world: int) -> None:
    """A reader reads all of its shards before it starts again."""
    found = batches(config(all_shards(shards), stream={"samples": 80, "buffer": 1}), 5 if world == 1 else 2, world)
    assert len(set(ids(found))) == len(ids(found)) == (80 if world == 1 else 32)
    again = batches(config(all_shards(shards), stream={"samples": 80, "buffer": 1}), 10)
    assert ids(again[:5]) != ids(again[5:]) and sorted(ids(again[:5])) == sorted(ids(again[5:]))


def test_positions_noise_and_flips_are_those_of_an_indexed_run(shards: Path) -> None:
    (batch,) = batches(config(all_shards(shards)), 1, start_step=2)
    data = DataConfig(shards=str(shards), image_size=16, workers=0)
    exact = next(iter(loader(Manifest.load(shards), data, start_step=2)))
    assert torch.equal(batch.positions, exact.positions) and torch.equal(batch.flips, exact.flips)
    assert torch.equal(batch.noise["mask"], exact.noise["mask"]) and batch.images.shape == (GLOBAL, 3, 16, 16)


@pytest.mark.multi
def test_workers_take_the_positions_in_turn(shards: Path) -> None:
    found = batches(config(all_shards(shards), workers=2), 4)
    assert torch.cat([batch.positions for batch in found]).tolist() == list(range(4 * GLOBAL))
    assert len(set(ids(found))) > 2 * GLOBAL


def test_a_resumed_run_reads_the_shards_in_another_order(shards: Path) -> None:
    first, later = (ids(batches(config(all_shards(shards)), 1, start_step=step)) for step in (0, 7))
    assert first != later and first == ids(batches(config(all_shards(shards)), 1))


def write_shard(path: Path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return f"wds:{path}"


class FailsWhenUnpickled:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was decoded",))


def test_nothing_is_unpickled_and_other_members_are_ignored(shards: Path, tmp_path: Path) -> None:
    jpeg = Manifest.load(shards).read(0)
    bad = pickle.dumps(FailsWhenUnpickled())
    url = write_shard(tmp_path / "a.tar", {"x/1.jpg": jpeg, "x/1.pyd": bad, "x/1.pkl": bad, "x/1.pth": bad})
    (batch,) = batches(config(url), 1)
    assert len(set(batch.ids.tolist())) == 1 and not batch.damage


def test_damage_is_recorded_and_skipped(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    jpeg = Manifest.load(shards).read(0)
    write_shard(copy / "shard-000000.tar", {"a.jpg": b"no image", "b.txt": b"text", "c.jpg": jpeg})
    write_shard(copy / "shard-000003.tar", {"._d.jpg": b"x", "d.jpg": jpeg})
    data = (copy / "shard-000001.tar").read_bytes()
    (copy / "shard-000001.tar").write_bytes(data[: len(data) // 2 + 700])
    found = batches(config(all_shards(copy)), 5)
    damage = {(d.shard, d.key): d.reason for batch in found for d in batch.damage}
    assert "not an image" in damage["shard-000000.tar", "a"] and ("shard-000000.tar", "b") not in damage
    assert "truncated" in damage["shard-000001.tar", ""] and not any(shard == "shard-000003.tar" for shard, _ in damage)
    said = capsys.readouterr().err
    assert said.count("are passed over: 1 ") == 1  # the first shard that has some; a line for each would be many
    assert all(len(batch.ids) == GLOBAL for batch in found)


def test_archives_joined_in_one_shard_are_read_and_zeros_over_members_recorded(shards: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(shards)
    for number in range(3):
        write_shard(tmp_path / f"{number}.tar", {f"{number}.jpg": manifest.read(number), f"{number}.cls": b"1"})
    data = [(tmp_path / f"{number}.tar").read_bytes() for number in range(3)]
    (tmp_path / "all.tar").write_bytes(b"".join(data))
    (batch,) = batches(config(f"wds:{tmp_path}/all.tar"), 1)
    assert len(set(batch.ids.tolist())) == 3 and not batch.damage
    write_shard(tmp_path / "hole.tar", {f"{n}.jpg": manifest.read(n) for n in range(3)})
    whole = (tmp_path / "hole.tar").read_bytes()
    at = whole.index(b"1.jpg")
    (tmp_path / "hole.tar").write_bytes(whole[:at] + bytes(512) + whole[at + 512 :])
    (batch,) = batches(config(f"wds:{tmp_path}/hole.tar"), 1)
    assert len(set(batch.ids.tolist())) == 1 and f"zeros at byte {at:,}, then" in batch.damage[0].reason


def test_nothing_usable_ends_the_stream(tmp_path: Path) -> None:
    with pytest.raises(DamagedSample, match="nothing in the shards of wds:.* can be used: a.tar: a"):
        batches(config(write_shard(tmp_path / "a.tar", {"a.jpg": b"no image"})), 1)
    with pytest.raises(DamagedSample, match="they hold no images"):
        batches(config(write_shard(tmp_path / "b.tar", {})), 1)


@pytest.fixture
def web(shards: Path) -> Iterator[WebServer]:
    server = WebServer(shards)
    yield server
    server.stop()


def test_a_web_server(shards: Path, web: WebServer) -> None:
    url = f"wds:{web.url}/shard-{{000000..000004}}.tar"
    assert ids(batches(config(url), 3)) == ids(batches(config(all_shards(shards)), 3))
    (shards / "a b.tar").symlink_to("shard-000000.tar")
    try:
        for name in ("a b.tar", "a%20b.tar"):
            assert not batches(config(f"wds:{web.url}/{name}"), 1)[0].damage
    finally:
        (shards / "a b.tar").unlink()


@pytest.mark.parametrize(
    ("url", "world", "message"),
    [
        ("wds:{0}/nowhere.tar", 1, "nowhere.tar' cannot be opened"),
        ("wds:{0}", 1, "is no regular file.; correct data.shards"),
        ("wds:", 1, "is no regular file"),
        ("wds:{0}/../pipe.tar", 1, "pipe.tar' is no regular file"),
        ("wds:ftp://host/a.tar", 1, "'ftp://' cannot be read"),
        ("wds:{0}/shard-{{000000.tar", 1, "write part-"),
        ("wds:{0}/shard-{{000000..000004}}.tar", 6, "5 shards of .* are too few for 6 ranks x 1 workers"),
    ],
)
def test_urls_that_are_refused(shards: Path, url: str, world: int, message: str) -> None:
    if url.endswith("pipe.tar"):
        os.mkfifo(shards.parent / "pipe.tar")
    with pytest.raises(UserError, match=message) as caught:
        open_source(config(url.format(shards)), world)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"shards": "wds:a.tar"}, "set data.stream.samples"),
        ({"shards": "wds:pipe:cat a.tar", "stream": {"samples": 1}}, "no shell is run for data"),
        (
            {"shards": "wds:https://h/a.tar?sig=secret", "stream": {"samples": 1}},
            "'wds:https://h/a.tar' was given",
        ),
        ({"shards": "/folder", "stream": {"samples": 1}}, "set stream=null"),
        ({"shards": "wds:a.tar", "stream": {"samples": 1}, "cache": "/tmp"}, "set cache=null"),
    ],
)
def test_contradictions_are_refused(data: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate({**load_recipe("mae_tiny").dump(), "data": data}, "test")


def test_methods_that_need_labels_or_stable_ids_are_refused(shards: Path, tmp_path: Path) -> None:
    data = config(all_shards(shards))
    with pytest.raises(UserError, match="needs labels"):
        TrainLoader(
            WebDatasetStream(data), data, Needs(labels=True), seed=0, global_batch=8, micro_batch=8, rank=0, world=1
        )
    with pytest.raises(UserError, match="stream, for training only"):
        Manifest.load(all_shards(shards))
    words = [
        f"data.shards={all_shards(shards)}",
        "data.stream.samples=80",
        "data.workers=0",
        "method.masking.policy=amt",
    ]
    recipe = ranks.recipe(tmp_path, shards, "mae")
    with pytest.raises(UserError, match="amt stores importance per sample"):
        prepare(load_recipe(str(recipe), words), tmp_path / "run", None, ())


@pytest.mark.slow
def test_training_warns_that_it_is_not_exact_and_resumes(shards: Path, tmp_path: Path) -> None:
    data = {"shards": all_shards(shards), "stream": {"samples": 80}, "workers": 0}
    recipe = ranks.recipe(tmp_path, shards, "mae", data=data)
    ranks.train(1, recipe, tmp_path / "run")
    ranks.cut_back(tmp_path / "run", tmp_path / "again", step=8)
    words = ranks.command(1, "mimscale", "train", recipe, "--run-dir", tmp_path / "again")
    done = subprocess.run(words, env=ranks.environment(), capture_output=True, text=True, check=True)
    assert "streamed without an index, which is not exact" in done.stdout + done.stderr
    assert list(ranks.curve(tmp_path / "again")) == list(range(1, 13))
