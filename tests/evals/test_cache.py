"""Features on disk: read by the next protocol, never those of other weights, never damaged ones."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mimscale.__main__ import main
from mimscale.data.synthetic import make_image_folder
from mimscale.errors import UserError
from mimscale.evals.cache import MOST_BYTES, Array, Stored, check_room, chunk_length, size_text
from tests import ranks
from tests.evals.conftest import save_run, shards, small_run

COMMON = ["--workers", "0", "--crop-pct", "1", "--device", "cpu"]
OF = {"network": {"sha256": "1" * 64}, "data": "2" * 64, "pooling": "mean", "precision": "fp32"}


def stored(folder: Path, samples: int = 70, **changes: Any) -> Stored:
    return Stored(Array({**OF, **changes}, samples, (3,)), folder, 32)


def values_of(samples: int) -> torch.Tensor:
    return torch.arange(3.0 * samples).view(samples, 3)


def filled(folder: Path) -> Stored:
    store, values = stored(folder), values_of(70)
    for number in store.missing():
        store.put(number, values[32 * number : 32 * (number + 1)])
    return store


def test_parts_become_one_file_that_is_mapped(tmp_path: Path) -> None:
    store = filled(tmp_path)
    assert len(list(store.folder.glob("part-*"))) == 3 and store.missing() == []
    store.complete()
    assert {path.name for path in store.folder.iterdir()} == {"features.npy", "about.json"}
    found = stored(tmp_path)
    assert found.missing() == [] and torch.equal(found.open(), values_of(70))
    found.open().zero_()  # in this process only
    assert stored(tmp_path).missing() == [] and torch.equal(found.open(), values_of(70))
    store.complete()  # another job has done it
    assert json.loads(store.about.read_text())["of"] == OF


def test_a_part_is_kept_and_a_bad_one_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = filled(tmp_path)
    parts = sorted(store.folder.glob("part-*"))
    data = bytearray(parts[1].read_bytes())
    data[-2] ^= 1
    parts[1].write_bytes(data)
    parts[2].write_bytes(parts[2].read_bytes()[:50])
    assert store.missing() == [1, 2]
    error = capsys.readouterr().err
    assert error.count("it is computed again\n") == 2 and error.count("\n") == 2 and "its checksum is another" in error
    other = stored(tmp_path, network={"sha256": "3" * 64})
    other.folder.mkdir()
    shutil.copy(parts[0], other.folder)
    assert other.missing() == [0, 1, 2] and "is of other weights or data" in capsys.readouterr().err


@pytest.mark.parametrize("harm", ["byte", "cut", "no values", "about", "no checksum", "nested", "fifo", "renamed"])
def test_a_complete_array_that_is_not_what_it_should_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], harm: str
) -> None:
    store = filled(tmp_path)
    store.complete()
    if harm == "byte":
        data = bytearray(store.values.read_bytes())
        data[-2] ^= 1
        store.values.write_bytes(data)
    elif harm == "cut":
        os.truncate(store.values, 500)
    elif harm == "no values":
        store.values.unlink()
    elif harm == "about":
        store.about.write_text("[]")
    elif harm == "no checksum":
        store.about.write_text(json.dumps({"key": store.array.key}))
    elif harm == "nested":
        store.about.write_text("[" * 100_000)
    elif harm == "fifo":
        store.values.unlink()
        os.mkfifo(store.values)
    else:
        other = stored(tmp_path, data="4" * 64)
        store.folder.rename(other.folder)
        store = other
    assert store.missing() == [0, 1, 2]
    error = capsys.readouterr().err
    assert error.endswith("its features are computed again\n") and error.count("\n") == 1
    assert not store.about.exists() and not store.values.exists()


def test_parts_of_a_job_that_worked_beside_the_one_that_finished_are_removed(tmp_path: Path) -> None:
    store = filled(tmp_path)
    parts = {path: path.read_bytes() for path in store.folder.glob("part-*")}
    store.complete()
    for path, data in parts.items():
        path.write_bytes(data)
    assert store.missing() == [] and not list(store.folder.glob("part-*")) and store.values.exists()


def test_whatever_the_numbers_depend_on_is_another_key() -> None:
    arrays = [Array({**OF, **change}, 70, (3,)) for change in ({}, *({name: "other"} for name in OF))]
    arrays += [Array(OF, 71, (3,)), Array(OF, 70, (4,))]
    assert len({array.key for array in arrays}) == len(arrays)
    assert Array(OF, 1_281_167, (768,)).bytes == 1_281_167 * 768 * 4 and size_text(3_935_745_024) == "3.9 GB"


def test_chunks_are_large_but_enough_for_the_ranks() -> None:
    assert chunk_length(1_281_167, (768,)) == 4096 and chunk_length(120, (32,)) == 32
    assert 4 * chunk_length(1_281_167, (196, 768)) * 196 * 768 <= MOST_BYTES
    assert chunk_length(5, (10**9,)) == 1


def test_a_full_disk_is_noticed_before(tmp_path: Path) -> None:
    check_room(tmp_path / "not" / "there", 1)
    with pytest.raises(UserError, match="the features need 4611686.0 TB"):
        check_room(tmp_path, 1 << 62)


def rows(path: Path) -> Any:
    return json.loads(path.read_text())["rows"]


def test_the_second_protocol_computes_no_features(
    data: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = save_run(tmp_path / "mae", small_run("mae"))
    words = ["--train", str(data[0]), "--val", str(data[1]), *COMMON, "--out", str(tmp_path / "a.json")]

    def evaluate(*more: str) -> tuple[Any, str]:
        assert main(["evaluate", more[0], str(run_dir), *words, *more[1:]]) == 0
        return rows(tmp_path / "a.json"), capsys.readouterr().err

    first, text = evaluate("knn")
    folder = run_dir / "eval" / "features"
    assert f"features of train: 15.4 kB into {folder} (--no-cache writes none)" in text
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert len(times) == 4
    again, text = evaluate("linear")
    assert "features of" not in text and times == {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    assert (again, first) == (evaluate("linear", "--no-cache")[0], evaluate("knn", "--no-cache")[0])

    _, text = evaluate("knn", "--pool", "mean", "cls")  # only what is not there
    assert "features of train: 15.4 kB into" in text
    for more in (["--crop-pct", "0.9"], ["--precision", "bf16"], ["--train", str(data[1]), "--val", str(data[0])]):
        _, text = evaluate("knn", *more)
        assert ("features of train:" in text) == (more[0] != "--train")  # each of the two sets is there
    save_run(tmp_path / "other", small_run("mae"), step=8)
    shutil.rmtree(run_dir / "checkpoints")
    shutil.copytree(tmp_path / "other" / "checkpoints", run_dir / "checkpoints")
    changed, text = evaluate("knn")
    assert "features of train: 15.4 kB" in text and changed[0]["sha256"] != first[0]["sha256"]
    assert changed == evaluate("knn", "--no-cache")[0]

    assert main(["evaluate", "knn", str(run_dir), *words, "--cache", str(tmp_path / "a.json")]) == 2
    error = capsys.readouterr().err
    assert "the feature cache cannot be used" in error and error.splitlines()[-1].endswith("in memory")


def test_a_killed_job_goes_on(data: tuple[Path, Path], tmp_path: Path) -> None:
    images = make_image_folder(tmp_path / "images", classes=3, per_class=500, side=32, seed=2)
    train, run_dir = shards(images, tmp_path / "train"), save_run(tmp_path / "mae", small_run("mae"))
    cache = tmp_path / "cache"
    words: tuple[str | Path, ...] = ("--train", train, "--val", data[1], *COMMON)

    def strike(pids: list[int]) -> None:
        ranks.until(lambda: len(list(cache.glob("mean-*/part-*"))) > 4, pids)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    done = ranks.run(2, "mimscale", "evaluate", "knn", run_dir, *words, "--cache", cache, check=False, meanwhile=strike)
    assert done.returncode and not (run_dir / "eval").exists()
    (folder,) = {path.parent for path in cache.glob("mean-*/part-*")}
    left = {path: path.stat().st_mtime_ns for path in folder.glob("part-*")}
    assert 4 < len(left) < 47 and not (folder / "about.json").exists()
    reached: dict[Path, int] = {}

    def watch(pids: list[int]) -> None:
        ranks.until(lambda: (folder / "part-000040.safetensors").exists() or (folder / "about.json").exists(), pids)
        reached.update({path: path.stat().st_mtime_ns for path in left if path.exists()})

    out = tmp_path / "resumed.json"
    done = ranks.run(1, "mimscale", "evaluate", "knn", run_dir, *words, "--cache", cache, "--out", out, meanwhile=watch)
    assert f"{len(left)} of 47 chunks are there already" in done.stderr
    assert reached.items() <= left.items()  # none was written again
    plain = tmp_path / "plain.json"
    assert main(["evaluate", "knn", str(run_dir), *map(str, words), "--no-cache", "--out", str(plain)]) == 0
    assert rows(out) == rows(plain)


def test_a_job_that_ended_before_its_chunks_were_one_file(data: tuple[Path, Path], tmp_path: Path) -> None:
    """All chunks are there, the file that is made of them is not: killed in between, or a job beside this one."""
    run_dir, out = save_run(tmp_path / "mae", small_run("mae")), tmp_path / "a.json"
    words = ["knn", str(run_dir), "--train", str(data[0]), "--val", str(data[1]), *COMMON, "--out", str(out)]
    assert main(["evaluate", *words]) == 0
    first = rows(out)
    for path in (run_dir / "eval" / "features").rglob("about.json"):
        values = torch.from_numpy(np.load(path.with_name("features.npy")))
        array = Array(json.loads(path.read_text())["of"], len(values), tuple(values.shape[1:]))
        store = Stored(array, path.parent.parent, chunk_length(array.samples, array.shape))
        assert store.about == path
        for number, part in enumerate(values.split(store.length)):
            store.put(number, part)
        store.values.unlink()
        path.unlink()
    assert main(["evaluate", *words]) == 0 and rows(out) == first
    assert not list(run_dir.rglob("part-*")) and len(list(run_dir.rglob("features.npy"))) == 2
