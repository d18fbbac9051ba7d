"""The manifest comes from the shards' sidecars alone, at any later time and whoever asks."""

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
from data_prep.plan import Item, Plan
from data_prep.write import unfinished, write, write_shard
from mimscale.data.synthetic import make_image_folder
from mimscale.errors import UserError


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    root = make_image_folder(tmp_path_factory.mktemp("pictures"), classes=3, per_class=4, side=32)
    return Plan(read_folder(root, labelled=True), seed=0, shard_samples=4)


def files(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def write_only(plan: Plan, folder: Path, numbers: list[int]) -> None:
    """What array tasks do that end without seeing each other: shards, and nobody writes the manifest."""
    unfinished(plan, folder)
    for number in numbers:
        write_shard(folder, number, plan.shard(number), plan.labelled, plan.hash, plan.pictures)


def test_finish_writes_what_a_writer_would_have_written(plan: Plan, tmp_path: Path) -> None:
    whole, left = tmp_path / "whole", tmp_path / "left"
    assert write(plan, whole, unfinished(plan, whole)) == []
    write_only(plan, left, [2, 0, 1])
    assert not (left / "manifest.json").exists()
    assert main(["finish", str(left), str(whole)]) == 0
    assert files(left) == files(whole)


def test_any_repeated_part_finishes_too(plan: Plan, tmp_path: Path) -> None:
    write_only(plan, tmp_path / "out", [0, 1, 2])
    assert unfinished(plan, tmp_path / "out", (1, 3)) == []
    assert write(plan, tmp_path / "out", []) == [] and (tmp_path / "out" / "manifest.json").exists()


def test_missing_shards_are_named(plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_only(plan, tmp_path / "out", [0, 2])
    assert main(["finish", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "lacks 1 shards, the first is number 1; run its command again" in error and error.count("\n") == 1
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_files_that_show_up_late_are_waited_for(plan: Plan, tmp_path: Path) -> None:
    write_only(plan, tmp_path / "out", [0, 2])
    hidden = tmp_path / "out" / "shard-000001.tar"

    def later() -> None:
        time.sleep(0.3)
        write_shard(tmp_path / "out", 1, plan.shard(1), plan.labelled, plan.hash, plan.pictures)

    thread = threading.Thread(target=later)
    thread.start()
    assert not hidden.exists()
    assert main(["finish", str(tmp_path / "out"), "--wait", "60"]) == 0
    thread.join()
    assert (tmp_path / "out" / "manifest.json").exists()


def test_a_second_writer_is_named(plan: Plan, tmp_path: Path) -> None:
    def meanwhile() -> Iterator[Item]:
        write_only(plan, tmp_path / "out", [0])
        yield from plan.shard(0)

    unfinished(plan, tmp_path / "out")
    with pytest.raises(UserError, match="written by another process too"):
        write_shard(tmp_path / "out", 0, meanwhile(), plan.labelled, plan.hash, plan.pictures)  # type: ignore[arg-type]
    assert write(plan, tmp_path / "out", unfinished(plan, tmp_path / "out")) == []


def test_folders_that_were_never_begun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finish", str(tmp_path)]) == 2
    assert "nothing was begun there" in capsys.readouterr().err
    (tmp_path / "plan.json").write_text("{")
    assert main(["finish", str(tmp_path)]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_leftovers_of_dead_processes_of_this_node_are_taken_away(plan: Plan, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_only(plan, out, [0, 1, 2])
    node = os.uname().nodename
    gone = subprocess.Popen(["true"])
    gone.wait()
    owners = (f"{node}.{gone.pid}", f"{node}.{os.getppid()}", "elsewhere.1")
    names = [f".manifest.json.{owner}.0a1b2c3d.tmp.json" for owner in owners]
    for name in names:
        (out / name).write_text("half")
    assert main(["finish", str(out)]) == 0
    assert [name for name in names if (out / name).exists()] == names[1:]
