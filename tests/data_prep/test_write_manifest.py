"""The manifest is made from the sidecars of the shards alone, by any process at any later time."""

from __future__ import annotations

import hashlib
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.__main__ import main
from data_prep.folder import read_folder
from data_prep.plan import Item, ShardPlan
from data_prep.write_shards import unfinished, write, write_shard
from mimscale.data.synthetic import make_image_folder
from mimscale.errors import UserError


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> ShardPlan:
    root = make_image_folder(tmp_path_factory.mktemp("images"), classes=3, per_class=4, side=32)
    return ShardPlan(read_folder(root, labelled=True), seed=0, shard_samples=4)


def files(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def write_only(plan: ShardPlan, folder: Path, numbers: list[int]) -> None:
    """What concurrent array tasks may do that do not see each other's files: no one writes the manifest."""
    unfinished(plan, folder)
    for number in numbers:
        write_shard(folder, number, plan.shard(number), plan.labelled, plan.hash, plan.images)


def test_finish_writes_the_manifest_of_an_uninterrupted_run(plan: ShardPlan, tmp_path: Path) -> None:
    expected, out = tmp_path / "expected", tmp_path / "out"
    assert write(plan, expected, unfinished(plan, expected)) == []
    write_only(plan, out, [2, 0, 1])
    assert not (out / "manifest.json").exists()
    assert main(["finish", str(out), str(expected)]) == 0
    assert files(out) == files(expected)


def test_a_repeated_part_writes_the_manifest(plan: ShardPlan, tmp_path: Path) -> None:
    write_only(plan, tmp_path / "out", [0, 1, 2])
    assert unfinished(plan, tmp_path / "out", (1, 3)) == []
    assert write(plan, tmp_path / "out", []) == [] and (tmp_path / "out" / "manifest.json").exists()


def test_missing_shards_are_named(plan: ShardPlan, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_only(plan, tmp_path / "out", [0, 2])
    assert main(["finish", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "lacks 1 shards, the first is number 1; run its command again" in error and error.count("\n") == 1
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_wait_for_files_that_appear_late(plan: ShardPlan, tmp_path: Path) -> None:
    write_only(plan, tmp_path / "out", [0, 2])
    late = tmp_path / "out" / "shard-000001.tar"

    def write_late() -> None:
        time.sleep(0.3)
        write_shard(tmp_path / "out", 1, plan.shard(1), plan.labelled, plan.hash, plan.images)

    thread = threading.Thread(target=write_late)
    thread.start()
    assert not late.exists()
    assert main(["finish", str(tmp_path / "out"), "--wait", "60"]) == 0
    thread.join()
    assert (tmp_path / "out" / "manifest.json").exists()


def test_a_second_writer_of_a_shard_is_refused(plan: ShardPlan, tmp_path: Path) -> None:
    def written_meanwhile() -> Iterator[Item]:
        write_only(plan, tmp_path / "out", [0])
        yield from plan.shard(0)

    unfinished(plan, tmp_path / "out")
    with pytest.raises(UserError, match="written by another process too"):
        write_shard(tmp_path / "out", 0, written_meanwhile(), plan.labelled, plan.hash, plan.images)  # type: ignore[arg-type]
    assert write(plan, tmp_path / "out", unfinished(plan, tmp_path / "out")) == []


def test_folders_without_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finish", str(tmp_path)]) == 2
    assert "no conversion was started there" in capsys.readouterr().err
    (tmp_path / "plan.json").write_text("{")
    assert main(["finish", str(tmp_path)]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_leftovers_of_dead_processes_of_this_node_are_removed(plan: ShardPlan, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_only(plan, out, [0, 1, 2])
    node = os.uname().nodename
    dead = subprocess.Popen(["true"])
    dead.wait()
    owners = (f"{node}.{dead.pid}", f"{node}.{os.getppid()}", "elsewhere.1")
    names = [f".manifest.json.{owner}.0a1b2c3d.tmp.json" for owner in owners]
    for name in names:
        (out / name).write_text("partial")
    assert main(["finish", str(out)]) == 0
    assert [name for name in names if (out / name).exists()] == names[1:]
