"""results.json: what all evaluations of a run found, beside what the recipe expects."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mimscale.__main__ import main
from mimscale.config.recipes import load_recipe, recipe_names
from mimscale.errors import UserError
from tests.evals.conftest import save_run, small_run

QUICK = ("--workers", "0", "--device", "cpu", "--no-cache")


def report(protocol: str, *rows: dict[str, Any], metrics: tuple[str, ...] = ()) -> str:
    keys = {key: key for key in metrics or (protocol,)}
    return json.dumps(
        {"protocol": {"name": protocol}, "metrics": keys, "val": {"fingerprint": "f"}, "rows": list(rows)}
    )


def row(step: Any = 5, pool: str = "mean", **values: Any) -> dict[str, Any]:
    return {"network": "run", "source": "run", "step": step, "sha256": "0" * 64, "pool": pool, **values}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run that expects five things; three were measured, one stage failed, one never ran."""
    folder = tmp_path / "run"
    config = small_run("mae").dump()
    wanted = {"knn": 40.0, "linear": 70.0, "attentive": 75.5, "top1": 83.6, "sweep": 68.0}
    config["expected"] = {name: {"value": value, "source": "a paper"} for name, value in wanted.items()}
    for name in ("eval", "finetune/eval", "job"):
        (folder / name).mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    raw = {"network": "raw pixels", "pool": "pixels", "knn": 99.0}
    (folder / "eval" / "knn-mean.json").write_text(report("knn", raw, row(knn=39.96)))
    (folder / "eval" / "knn-mean-old.json").write_text(report("knn", row(step=2, knn=88.0)))
    (folder / "eval" / "linear.json").write_text(report("linear", row(linear=68.44)))
    (folder / "finetune" / "eval" / "top1.json").write_text(report("top1", row(top1=85.0), metrics=("top1",)))
    jobs = ("prepare 1", "finish 2", "pretrain 3", "knn 4", "linear 5", "attentive 6", "finetune 7", "results 8")
    (folder / "job" / "jobs.txt").write_text("\n".join(jobs) + "\n")
    states = {"prepare-0": "done", "prepare-1": "done", "finish": "done", "pretrain": "done", "knn": "done"}
    states |= {"attentive": "failed, exit code 2", "finetune": "running"}
    for stage, state in states.items():
        (folder / "job" / f"stage-{stage}.txt").write_text(state + "\n")
    lines = [{"step": 4, "loss": 0.7}, {"event": "evals", "at": 4, "knn": 12.0, "seconds": 1, "time": 2}]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 5, "lo')
    return folder


def results(run_dir: Path, *words: str) -> dict[str, Any]:
    assert main(["results", str(run_dir), *words]) == 0
    found: dict[str, Any] = json.loads((run_dir / "results.json").read_text())
    return found


def test_reached_short_failed_and_not_run(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = results(run_dir)
    status = {entry["protocol"]: (entry["found"], entry["status"]) for entry in found["expected"]}
    assert status == {
        "knn": (39.96, "reached"),  # at one decimal, and of the newest checkpoint
        "linear": (68.44, "short by 1.6"),
        "attentive": (None, "failed"),
        "top1": (85.0, "reached"),
        "sweep": (None, "not run"),
    }
    assert {f["value"] for f in found["figures"]} == {39.96, 88.0, 68.44, 85.0}  # no baseline
    assert found["training"] == {"step": 4, "loss": 0.7, "evals": {"at": 4, "knn": 12.0}, "finished": False}
    states = {stage: of["state"] for stage, of in found["stages"].items()}
    assert states == {
        "prepare": "done", "finish": "done", "pretrain": "done", "knn": "done", "linear": "not run",
        "attentive": "failed, exit code 2", "finetune": "unfinished",
    }  # fmt: skip
    assert found["unreadable"] == [] and found["stages"]["linear"]["job"] == "5"
    text = capsys.readouterr().out
    assert all(words in text for words in ("short by 1.6", "reached", "not run", "a paper", "wrote "))


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", '{"rows": [{"source": 1}]}', "{", '{"rows": 3}', "[" * 100_000,
        report("knn", row(knn=40.0, step="abc")), report("knn", row(knn=40.0, step=[1])),
        report("knn", row(knn=float("nan"))), report("knn", row(knn=True)), report("knn", row(knn=10**400)),
        report("transfer", row()),
    ],
)  # fmt: skip
def test_what_is_no_report_is_named_and_left_out(
    content: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_dir / "eval" / "other.json").write_text(content)
    found = results(run_dir)
    (line,) = found["unreadable"]
    assert line.startswith("eval/other.json is no report of an evaluation") and len(found["figures"]) == 4
    assert "eval/other.json" in capsys.readouterr().err


def test_of_a_report_of_several_runs_only_the_own_rows_count(run_dir: Path, tmp_path: Path) -> None:
    """`mimscale evaluate knn A B` writes the whole table into both; the folders may have moved since."""
    rows = [
        row(step=9, knn=value) | {"source": f"/scratch/{name}/checkpoints/step-00000009"}
        for name, value in (("seed-0/run", 11.0), ("seed-1/run", 22.0), ("seed-1/other", 33.0))
    ]
    rows.append(row(step=None, knn=44.0) | {"source": "/scratch/clip.safetensors"})
    (tmp_path / "seed-1").mkdir()
    moved = run_dir.rename(tmp_path / "seed-1" / "run")
    (moved / "eval" / "all.json").write_text(report("knn", *rows))
    found = [f["value"] for f in results(moved)["figures"] if f["report"] == "eval/all.json"]
    assert found == [22.0]


def test_a_pipe_and_numbers_that_json_lacks(run_dir: Path) -> None:
    os.mkfifo(run_dir / "eval" / "pipe.json")
    (run_dir / "metrics.jsonl").write_text(
        '{"step": 6, "loss": NaN}\n' + "[" * 100_000 + '\n{"step": [1], "loss": 1}\n'
    )
    found = results(run_dir)
    assert "it is a named pipe" in found["unreadable"][0]
    assert "NaN" not in (run_dir / "results.json").read_text().replace('"NaN"', "")
    assert found["training"] == {"step": 6, "loss": "NaN", "finished": False}


def test_robustness_and_transfer_have_figures(run_dir: Path) -> None:
    val = {"fingerprint": "f"}
    of_sets = {"protocol": {"name": "robustness"}, "columns": ["val", "mCE"], "sets": {"val": val}}
    (run_dir / "eval" / "a.json").write_text(json.dumps({**of_sets, "rows": [row(val=50.0, mCE=70.0)]}))
    one = {"protocol": "knn", "network": "run", "pool": "mean", "values": {"cifar10": 60.0}, "mean": 60.0}
    rows = [one, {**one, "network": "raw pixels", "pool": "pixels"}]
    part = {"set": "cifar10", "val": val, "rows": [row(knn=60.0), {"network": "raw pixels", "pool": "pixels"}]}
    transfer = {"protocol": {"name": "transfer"}, "rows": rows, "parts": [part]}
    (run_dir / "eval" / "b.json").write_text(json.dumps(transfer))
    found = results(run_dir)
    assert found["unreadable"] == []
    assert [(f["protocol"], f["metric"], f["value"], f["step"], f["val"]) for f in found["figures"][:4]] == [
        ("robustness", "val", 50.0, 5, "f"),
        ("robustness", "mCE", 70.0, 5, None),
        ("transfer knn", "cifar10", 60.0, 5, "f"),
        ("transfer knn", "mean", 60.0, 5, None),
    ]


def test_other_options_are_shown_and_not_compared(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for k in (3, 20):
        values = json.loads(report("knn", row(step=9, knn=90.0 - k)))
        values["protocol"]["k"], values["changed"] = k, {} if k == 20 else {"k": k}
        (run_dir / "eval" / f"knn{k}.json").write_text(json.dumps(values))
    short = json.loads(report("attentive", row(attentive=80.0)))
    short["protocol"]["differs_from_paper"] = ["epochs = 1, not 90", "global_batch = 8, not 16384"]
    (run_dir / "eval" / "attentive.json").write_text(json.dumps(short))
    found = {entry["protocol"]: (entry["found"], entry["status"]) for entry in results(run_dir)["expected"]}
    assert found["knn"] == (70.0, "reached")
    assert found["attentive"] == (None, "only with other options (epochs = 1, not 90)")
    printed = capsys.readouterr().out
    assert "k = 3" in printed and "k = 20" in printed


def test_a_run_that_never_began_has_the_recipes_expectations(tmp_path: Path) -> None:
    (tmp_path / "run" / "job").mkdir(parents=True)
    (tmp_path / "run" / "job" / "jobs.txt").write_text("pretrain 3\nknn 4\n")
    (tmp_path / "run" / "job" / "stage-pretrain.txt").write_text("failed, exit code 1\n")
    assert results(tmp_path / "run")["expected"] == []
    found = results(tmp_path / "run", "--recipe", "mae_vit_b16_1600ep")
    assert {entry["status"] for entry in found["expected"]} == {"not run"} and len(found["expected"]) >= 3
    assert found["stages"]["pretrain"]["state"] == "failed, exit code 1"


def test_reports_of_real_evaluations_are_understood(data: tuple[Path, Path], tmp_path: Path) -> None:
    run_dir = save_run(tmp_path / "run", small_run("mae"))
    words = ["--train", str(data[0]), "--val", str(data[1]), *QUICK]
    for protocol in ("knn", "ridge"):
        assert main(["evaluate", protocol, str(run_dir), *words]) == 0
    found = results(run_dir)
    assert {("knn", "knn", 7), ("ridge", "ridge", 7)} <= {
        (f["protocol"], f["metric"], f["step"]) for f in found["figures"]
    }
    assert found["unreadable"] == []
    assert all(len(f["sha256"]) == 64 for f in found["figures"])


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["results", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.strip().endswith("is no folder; name the folder of a run")
    assert main(["results", str(tmp_path)]) == 2
    assert "is no run: it holds none of config.yaml, " in capsys.readouterr().err
    with pytest.raises(UserError, match=r"expected.knn.value = 140: input should be less than or equal to 100"):
        load_recipe("mae_tiny", ["expected.knn={value: 140, source: x}"])
    with pytest.raises(UserError, match=r"expected.knn.source is missing"):
        load_recipe("mae_tiny", ["expected.knn={value: 40}"])


def test_expected_values_name_protocols_and_change_nothing() -> None:
    known = {"knn", "linear", "linear_mae", "attentive", "sweep", "top1"}  # protocols whose metric has their name
    with_values = 0
    for name in recipe_names():
        recipe = load_recipe(name)
        with_values += bool(recipe.expected)
        assert recipe.expected.keys() <= known, name
        plain = recipe.model_copy(update={"expected": {}})
        assert plain.shaping() == recipe.shaping()
    assert with_values >= 8


def test_it_needs_no_torch() -> None:
    code = "import sys, mimscale.evals.results; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
