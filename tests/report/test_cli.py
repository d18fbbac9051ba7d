"""`mimscale report`: what it says of runs in every state, and what it refuses. Drawn pages: test_browser.py."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mimscale.__main__ import main
from mimscale.fault_tolerance.run_lock import RunLock
from mimscale.report import page
from mimscale.report.runs import names, plain, read
from tests.report import folders


def summary(capsys: pytest.CaptureFixture[str], *paths: Path) -> Any:
    assert main(["report", *map(str, paths), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_page_and_its_summary_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = folders.eventful(tmp_path / "a")
    (tmp_path / "a" / "done").write_text("60\n")
    folders.add_evaluation(run, "knn", 71.25)
    folders.add_panels(run, 20, 60)
    other = folders.Folder(tmp_path / "b", "student.width=128", "log.panels=0")
    other.launch()
    capsys.readouterr()
    out = tmp_path / "out.html"
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "b"), str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    a, b = found["runs"]
    assert (a["status"], a["step"], a["total_steps"], a["last"]["loss"]) == ("done", 60, 60, 0.25)
    assert a["events"]["skipped"] == 2 and a["events"]["rollback"] == 1 and a["discarded_lines"] == 20
    assert [figure["value"] for figure in a["figures"]] == [71.25] and a["recipe_name"] == "mae_tiny"
    assert b["step"] == 0 and b["last"] == {}
    assert found["differences"] == {"student.width": [64, 128], "log.panels": [60, 0]}
    text = out.read_text()
    assert len(text) < 5_000_000 and not re.search(r"""(?:src|href)=["'](?!data:|#)""", text.rpartition("</main>")[0])
    for words in ("71.2", "60 of 60", "rolled back", "student.width", "data:image/jpeg;base64,", "node7"):
        assert words in text


def test_expected_values_stand_once_or_with_their_runs(tmp_path: Path) -> None:
    made = [
        folders.Folder(tmp_path / name, f"expected.knn={{value: {value}, source: 'a paper'}}")
        for name, value in (("a", 40.0), ("b", 40.0), ("c", 41.5))
    ]
    for run in made:
        run.launch()
        folders.add_evaluation(run, "knn", 40.0)
        path = run.path / "eval" / "knn.json"
        changed = {"differs_from_paper": ["crop_pct = 1"], "name": "knn"}
        path.write_text(json.dumps({**json.loads(path.read_text()), "protocol": changed}))
    runs = [read(run.path, run.path.name) for run in made]
    assert "A, B: 40.0 (a paper)<br>C: 41.5 (a paper)" in page.render(runs)
    same = page.render(runs[:2])
    assert ">40.0 (a paper)<" in same and "A, B: 40.0" not in same
    assert same.count("crop_pct = 1.</p>") == 1 and "A knn; B knn: crop_pct = 1." in same
    assert "expected.knn" not in page.render(runs).partition("what differs")[2].partition("all 1")[0]


def test_runs_in_every_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = {name: folders.Folder(tmp_path / name) for name in ("running", "crashed", "stopped", "fresh")}
    for name, run in made.items():
        if name != "fresh":
            run.launch()
            run.step(5)
    made["stopped"].event("stopped", at=5, reason="SIGTERM")
    with (tmp_path / "running" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    lock = RunLock(tmp_path / "running")
    try:
        runs = summary(capsys, *(tmp_path / name for name in made))["runs"]
        text = page.render([read(tmp_path / name, name) for name in made])
    finally:
        lock.release()
    assert {one["name"]: one["status"] for one in runs} == {
        "running": "running",
        "crashed": "crashed",
        "stopped": "stopped",
        "fresh": "new",
    }
    running, _, stopped, fresh = runs
    assert stopped["reason"] == "SIGTERM" and "stopped: SIGTERM" in text
    assert (running["step"], running["total_steps"], running["notes"]) == (5, 60, []) and fresh["last"] == {}


def test_a_folder_of_which_little_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = folders.eventful(tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text("[1, 2")
    (tmp_path / "run" / "launches.jsonl").unlink()
    (tmp_path / "run" / "panels").mkdir()
    (tmp_path / "run" / "panels" / "step-00000010.png").write_bytes(b"no image")
    (tmp_path / "run" / "eval").mkdir()
    (tmp_path / "run" / "eval" / "knn.json").write_text("[]")
    (found,) = summary(capsys, run.path)["runs"]
    assert found["step"] == 60 and found["samples"] is None and found["launches"] == []
    assert any("config.yaml is not YAML" in note for note in found["notes"])
    assert sum("eval/knn.json is no report" in note for note in found["notes"]) == 1
    assert "is no panel" in page.render([read(run.path, "run")])


def test_a_folder_of_reports_that_cannot_be_read_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = folders.Folder(tmp_path / "run")
    (run.path / "eval").symlink_to("eval")
    (found,) = summary(capsys, run.path)["runs"]
    assert found["notes"] == ["eval cannot be read (Too many levels of symbolic links); left out"]


def test_names_are_the_shortest_that_differ(tmp_path: Path) -> None:
    paths = [Path("/x/seed-0/mae"), Path("/x/seed-1/mae"), Path("/x/amt"), Path("/x/amt")]
    assert names(paths) == ["seed-0/mae", "seed-1/mae", "amt", "amt (4)"]


def test_secrets_stay_out(tmp_path: Path) -> None:
    run = folders.Folder(tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text(
        "data: {shards: 'https://me:hunter2@host/x?token=hunter2'}\nwhen: 2026-01-01\n"
    )
    run.launch(command=["train", "data.shards=s3://key:hunter2@bucket/x"])
    found = read(run.path, "run")
    assert "hunter2" not in page.render([found]) + json.dumps(plain(found))


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = folders.Folder(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    out = str(tmp_path / "out.html")
    for words, line in (
        ([str(tmp_path / "empty"), out], "is no run: it holds none of metrics.jsonl"),
        ([str(tmp_path / "nowhere"), out], "is no folder"),
        ([str(run.path)], "is no page"),
        ([out], "no run is named"),
        ([str(run.path), str(tmp_path / "no" / "out.html")], "its folder is missing"),
    ):
        assert main(["report", *words]) == 2
        error = capsys.readouterr().err
        assert line in error and error.count("\n") == 1
    assert not Path(out).exists() and {path.name for path in tmp_path.iterdir()} == {"run", "empty"}
