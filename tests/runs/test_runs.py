"""What `mimscale runs` says of run folders: written as a run writes them, held by real processes, and damaged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mimscale.__main__ import main
from mimscale.fault_tolerance.run_lock import RunLock
from mimscale.files.tail import CHUNK, lines_backwards, objects_backwards
from mimscale.runs.summary import summary_of

HOLD = """
import sys, time
from pathlib import Path
from mimscale.fault_tolerance.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]), beat_s=0.1)
print("held", flush=True)
sys.stdin.read()
"""


def write_run(folder: Path, *lines: dict[str, Any], launched_s: float = 1000.0, **config: Any) -> Path:
    """A run of 100 steps with these lines in metrics.jsonl, one second apart."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps({"method": {"name": "mae"}, **config}))
    launch = {"time": launched_s, "ranks": 2, "device": "cuda", "host": "n1", "method": "mae"}
    (folder / "launches.jsonl").write_text(json.dumps(launch | {"total_steps": 100, "steps_per_epoch": 10}) + "\n")
    logged = [
        {**line, "time": launched_s + second} for second, line in enumerate(({"event": "start", "at": 0}, *lines))
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in logged))
    if found := [line for line in logged if line.get("event") == "evals"]:
        (folder / "evals.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
    return folder


def step(number: int, loss: float = 0.5) -> dict[str, Any]:
    return {"step": number, "loss": loss, "images_per_s": 800.0, "epoch": number / 10}


def evals(number: int, knn: float) -> dict[str, Any]:
    return {"event": "evals", "at": number, "knn": knn, "rankme": 59.0 + 0.4 * number, "seconds": 1.0}


def claim(folder: Path, age_s: float) -> None:
    """A holder on another host whose last beat is so old."""
    words = {"job": None, "restart": 0, "host": "elsewhere", "boot": "b", "pid": 7, "token": "t"}
    (folder / "lock").write_bytes(json.dumps(words).encode().ljust(2048) + b"%020d" % 3)
    os.utime(folder / "lock", (time.time() - age_s,) * 2)


def test_each_state(tmp_path: Path) -> None:
    done = write_run(tmp_path / "done", step(20), evals(40, 61.0), step(100), evals(100, 55.0))
    (done / "done").write_text("100\n")
    seen = summary_of(done)
    assert (seen.status, seen.step, seen.total_steps, seen.epoch, seen.epochs) == ("done", 100, 100, 10, 10)
    assert (seen.loss, seen.images_per_s, seen.device, seen.method) == (0.5, 800.0, "2 x cuda", "mae")
    assert seen.updated == 1004.0
    assert [(f.name, f.value, f.step) for f in seen.figures] == [("knn", 61.0, 40), ("rankme", 99.0, 100)]
    (done / "evals.jsonl").unlink()
    assert summary_of(done).figures == []
    (done / "launches.jsonl").write_text('{"time": 1000.0}\n')
    seen = summary_of(done)
    assert (seen.epoch, seen.epochs, seen.device) == (10, None, None)

    stopped = write_run(tmp_path / "stopped", step(20), {"event": "stopped", "at": 24, "reason": "SIGTERM"})
    assert (summary_of(stopped).status, summary_of(stopped).reason) == ("stopped", "SIGTERM")
    again = {"time": 2000.0, "ranks": 1, "device": "cpu", "total_steps": 100}
    with (stopped / "launches.jsonl").open("a") as file:
        file.write(json.dumps(again) + "\n")
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write('{"event": "start", "at": 20}\n')
    assert summary_of(stopped).status == "crashed" and summary_of(stopped).device == "1 x cpu"

    elsewhere = write_run(tmp_path / "elsewhere", step(20))
    claim(elsewhere, age_s=5.0)
    assert summary_of(elsewhere).status == "running"
    (elsewhere / "stop").touch()
    assert summary_of(elsewhere).reason == "asked to stop"
    claim(elsewhere, age_s=7300.0)
    assert summary_of(elsewhere).status == "stale"
    assert summary_of(elsewhere).reason == "no sign of life from process 7 on elsewhere for 2 h"

    guard = write_run(tmp_path / "guard", step(20))
    (guard / "guard.json").write_text("{}")
    assert summary_of(guard).reason == "too many bad steps: guard.json"
    hang = write_run(tmp_path / "hang", step(20))
    (hang / "hang").mkdir()
    assert (summary_of(hang).status, summary_of(hang).reason) == ("crashed", "it stood still: hang/")


def test_a_process_that_holds_a_folder_is_running_until_it_is_killed(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", step(20))
    words = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        assert summary_of(folder).status == "running"
        os.utime(folder / "lock", (0, 0))  # it beats again
        deadline = time.monotonic() + 30
        while summary_of(folder).status != "running" and time.monotonic() < deadline:
            time.sleep(0.02)
        assert summary_of(folder).status == "running"
        process.kill()
    seen = summary_of(folder)
    assert seen.status == "crashed" and seen.reason.startswith(f"process {process.pid} on ")


def test_whoever_asks_in_the_process_of_the_run_keeps_its_lock(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", step(20))
    lock = RunLock(folder)
    assert summary_of(folder).status == "running"
    code = (
        "import fcntl, sys; file = open(sys.argv[1], 'r+')\n"
        "try: fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB); print('free')\n"
        "except OSError: print('held')"
    )
    words = [sys.executable, "-c", code, str(folder / "lock.held")]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "held\n"
    lock.release()


def test_a_tree_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """At any depth, once each, also through a link, around a loop, and with a fine-tuning and reports inside."""
    root = tmp_path / "runs"
    one = write_run(root / "a" / "one", step(20), evals(20, 40.0))
    write_run(one / "finetune", step(10), {"event": "evals", "at": 10, "top1": 70.0})
    (one / "eval").mkdir()
    row = {"network": "student", "pool": "mean", "source": "x", "step": 20, "linear": 50.5}
    report = {"protocol": {"name": "linear"}, "metrics": {"linear": "linear"}, "rows": [row], "val": None}
    (one / "eval" / "linear.json").write_text(json.dumps(report))
    write_run(tmp_path / "scratch" / "two", step(30, loss=float("nan")), evals(30, 30.0))
    (root / "two").symlink_to(tmp_path / "scratch" / "two")
    (root / "loop").symlink_to(root)
    (one / "loop").symlink_to(one)
    (root / "everything").symlink_to("/")
    (root / "checkpoints").mkdir()
    (root / "notes.txt").touch()

    assert main(["runs", str(root), "--json"]) == 0
    runs = json.loads(capsys.readouterr().out)
    assert [os.path.relpath(run["path"], root) for run in runs] == ["a/one", "a/one/finetune", "two"]
    assert runs[2]["loss"] is None and runs[0]["age_s"] > 1e6
    found = {f["name"]: (f["value"], f["source"]) for f in runs[0]["figures"]}
    assert found["linear"] == (50.5, "eval/linear.json") and found["knn"] == (40.0, "evals.jsonl")

    for columns in (30, 40, 60, 100, 140):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert main(["runs", str(root)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= columns
        words = "".join("".join(lines).split())
        assert "crashed" in words and ("40.0@20" in words) is (columns >= 64)  # most runs have kNN
    assert main(["runs", str(root), "--metric", "top1"]) == 0
    assert "70.0 @10" in capsys.readouterr().out
    assert main(["runs", str(root), "--metric", "top5"]) == 2
    assert "no run has it; choose one of knn, linear, rankme, top1" in capsys.readouterr().err
    assert main(["runs", str(one)]) == 0  # a folder that is itself a run
    assert "one" in capsys.readouterr().out


def test_damage_is_passed_over_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", step(20), step(40))
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(
            b'\xff\xfe\n[1, 2]\n{"step": true}\n{"step": "x", "loss": {}}\n' + b"[" * 5000 + b'\n{"step": 60, "lo'
        )
    (run / "launches.jsonl").write_bytes(b"\0" * 100 + b"\n{}\n")
    (run / "evals.jsonl").mkdir()
    (run / "eval").mkdir()
    (run / "eval" / "knn.json").write_text("{")
    (run / "lock").write_bytes(b"\0" * 2048)
    pipe = write_run(tmp_path / "pipe")
    (pipe / "metrics.jsonl").unlink()
    os.mkfifo(pipe / "metrics.jsonl")
    assert main(["runs", str(tmp_path), "--json"]) == 0
    out, err = capsys.readouterr()
    damaged, special = sorted(json.loads(out), key=lambda one: one["path"], reverse=True)
    assert (damaged["step"], damaged["loss"], damaged["total_steps"]) == (40, 0.5, None)
    assert special["step"] is None
    for text in (
        "evals.jsonl cannot",
        "eval/knn.json is no report",
        "metrics.jsonl cannot be read (it is a named pipe, ",
    ):
        assert sum(text in line and line.endswith("left out") for line in err.splitlines()) == 1


def test_odd_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(tmp_path)]) == 0 and "holds no runs" in capsys.readouterr().err
    assert main(["runs", str(tmp_path), "--json"]) == 0 and capsys.readouterr().out == "[]\n"
    assert main(["runs", str(tmp_path / "absent")]) == 2 and "is no folder" in capsys.readouterr().err
    assert main(["runs", str(tmp_path), str(tmp_path)]) == 2 and "one folder at a time" in capsys.readouterr().err
    assert main(["runs", "compare", str(tmp_path)]) == 2 and "two runs or more" in capsys.readouterr().err
    assert main(["runs", "compare", str(tmp_path), str(tmp_path)]) == 2 and "is no run" in capsys.readouterr().err
    bad = write_run(tmp_path / "bad")
    (bad / "config.yaml").write_text("a: [")
    assert main(["runs", "compare", str(bad), str(bad)]) == 2 and "is not YAML" in capsys.readouterr().err


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write_run(tmp_path / "one", step(20, 0.5), evals(20, 40.0), optim={"lr": 1e-3}, seed=0)
    two = write_run(tmp_path / "two", step(40, 0.25), optim={"lr": 2e-3}, seed=0, key_of_another_release=[1])
    assert main(["runs", "compare", str(one), str(two), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recipe"] == {"optim.lr": [1e-3, 2e-3], "key_of_another_release": ["absent", [1]]}
    assert found["metrics"]["loss"] == [0.5, 0.25] and found["evaluations"]["knn"] == [40.0, None]
    assert [run["step"] for run in found["runs"]] == [20, 40]
    assert main(["runs", "compare", str(one), str(two)]) == 0
    out = capsys.readouterr().out
    assert "optim.lr" in out and "0.002" in out and "best knn" in out and "seed" not in out
    assert main(["runs", "compare", str(one), str(one)]) == 0
    assert "recipe (the same)" in capsys.readouterr().out


def test_lines_backwards(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    lines = [b"x" * size for size in (0, 3, CHUNK - 2, CHUNK, 0, 2 * CHUNK + 5, 1)]
    path.write_bytes(b"\n".join(lines))
    assert list(lines_backwards(path)) == lines[::-1]
    assert list(lines_backwards(path, limit=CHUNK)) == [b"x"]  # only what lies whole in the tail
    path.write_bytes(b"")
    assert list(lines_backwards(path)) == list(objects_backwards(path)) == []


def test_values_that_json_does_not_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A recipe of another release, in YAML: a date, infinity."""
    one, two = write_run(tmp_path / "a", step(20)), write_run(tmp_path / "b", step(20))
    (two / "config.yaml").write_text("method: {name: mae}\ndata: {since: 2026-01-31, limit: .inf}\n")
    assert main(["runs", "compare", str(one), str(two), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["recipe"]
    assert found["data.since"][1] == "2026-01-31" and found["data.limit"][1] is None


HUGE = 10**400


def test_numbers_that_no_arithmetic_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "a", step(20))
    b = write_run(tmp_path / "b", {**step(20), "loss": HUGE}, {"event": "evals", "at": 20, "knn": HUGE})
    launch = {"time": HUGE, "total_steps": HUGE, "steps_per_epoch": 1e-320, "step": HUGE, "ranks": HUGE}
    (b / "launches.jsonl").write_text(json.dumps(launch) + "\n")
    c = write_run(tmp_path / "c", {"step": 20, "loss": 0.5, "epoch": 1e-320})
    (c / "launches.jsonl").write_text(json.dumps({"time": 1000.0, "total_steps": 100, "steps_per_epoch": 1e-320}))
    (c / "config.yaml").write_text("method: {name: mae}\nschedule: {epochs: 1.0e+299}\n")
    for words in ([str(tmp_path)], ["compare", str(b), str(c)]):
        for more in ([], ["--json"]):
            assert main(["runs", *words, *more]) == 0
    out = capsys.readouterr().out
    assert "Infinity" not in out and "999999" not in out
    assert main(["report", str(b), str(c), "--json"]) == 0
    assert [run["step"] for run in json.loads(capsys.readouterr().out)["runs"]] == [20, 20]


def test_evaluations_of_steps_that_were_done_again(tmp_path: Path) -> None:
    def evals(at: int, knn: float) -> dict[str, Any]:
        return {"event": "evals", "at": at, "knn": knn}

    again = write_run(tmp_path / "a", step(8), evals(8, 99), step(5), step(8), evals(8, 50), step(9))
    assert [(one.value, one.step) for one in summary_of(again).figures] == [(50, 8)]
    behind = write_run(tmp_path / "b", step(4), evals(4, 40), step(8), evals(8, 99), step(5), step(7))
    assert [(one.value, one.step) for one in summary_of(behind).figures] == [(40, 4)]
    unlogged = write_run(tmp_path / "c", step(4), evals(6, 60))  # log.every = 4
    assert [(one.value, one.step) for one in summary_of(unlogged).figures] == [(60, 6)]


def test_recipes_and_folders_without_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write_run(tmp_path / "good", step(20))
    for number, text in enumerate(("a: &a {b: *a}", ALIASES)):
        bad = write_run(tmp_path / f"bad{number}", step(20))
        (bad / "config.yaml").write_text(text)
        assert main(["runs", "compare", str(bad), str(good)]) == 2 and "holds no recipe" in capsys.readouterr().err
        assert main(["report", str(bad), "--json"]) == 0 and "holds no recipe" in capsys.readouterr().out
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for path in (loop, tmp_path / ("x" * 300)):
        for words in (["runs", str(path)], ["report", str(path), "--json"], ["runs", "compare", str(path), str(good)]):
            assert main(words) == 2
            assert len(capsys.readouterr().err.splitlines()) == 1


def test_output_that_nobody_reads_is_said(tmp_path: Path) -> None:
    write_run(tmp_path / "a", step(20))
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "mimscale", "runs", str(tmp_path), "--json"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 141 and done.stderr.startswith("mimscale runs: nobody reads its output any more")
    assert len(done.stderr.splitlines()) == 1


ALIASES = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n" for before, name in zip("abcdef", "bcdefg", strict=True)
)
