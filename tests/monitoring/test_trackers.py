"""TensorBoard, wandb and mlflow themselves, without a network: what they write, and what they cannot do to a run."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mimscale.errors import UserError
from mimscale.fault_tolerance.retrying_writer import RetryingWriter
from mimscale.monitoring import tracker
from mimscale.monitoring.config import LogConfig
from mimscale.monitoring.run_logger import RunLogger
from tests.monitoring import wandb_file

SECRET = "q7kQzD1x"
RECIPE = {"optim": {"lr": 1e-3}, "data": {"shards": f"https://me:{SECRET}@host/part-0.tar"}}


def log_config(tmp_path: Path, *names: str) -> LogConfig:
    return LogConfig.model_validate(
        {
            "trackers": names,
            "wandb": {"mode": "offline", "project": "mim", "tags": ["a"]},
            "mlflow": {"uri": f"file:{tmp_path / 'mlruns'}", "experiment": "mim"},
        }
    )


def launch(run_dir: Path, log: LogConfig, step: int, done: bool) -> None:
    book = RunLogger(run_dir, RetryingWriter(), active=True)
    book.start(total=4, step=step, log=log, recipe=RECIPE)
    book.log_step(step + 1, {"loss": 0.5 + step, "grad_norm": math.nan})
    book.log_evaluation(step + 1, {"knn": 50.0}, seconds=1.0)
    assert book._trackers is not None
    book._trackers.log_image(step + 1, "view", torch.zeros(3, 8, 8, dtype=torch.uint8))
    book.close(done)


def test_two_launches_of_a_folder_are_one_run_of_wandb_and_mlflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["program-of-the-test", "argument-of-the-test"])
    run_dir, log = tmp_path / "run", log_config(tmp_path, "wandb", "mlflow")
    run_dir.mkdir()
    launch(run_dir, log, step=0, done=False)
    (status,) = (tmp_path / "mlruns").glob("*/*/meta.yaml")
    assert "\nstatus: 5\n" in status.read_text()  # killed
    launch(run_dir, log, step=2, done=True)

    identity = json.loads((run_dir / "wandb.json").read_text())["id"]
    first, second = sorted(run_dir.glob(f"wandb/offline-run-*/run-{identity}.wandb"))
    lines = [*wandb_file.history(first), *wandb_file.history(second)]
    assert [(line["step"], line["loss"]) for line in lines if "loss" in line] == [(1, 0.5), (3, 2.5)]
    assert [(line["step"], line["evals/knn"]) for line in lines if "evals/knn" in line] == [(1, 50.0), (3, 50.0)]
    assert [line["step"] for line in lines if "view.path" in line] == [1, 3]
    rows = [line["_step"] for line in lines]
    assert rows == sorted(set(rows))
    assert wandb_file.config(first)["optim.lr"] == 1e-3

    (metrics,) = (tmp_path / "mlruns").glob("*/*/metrics")  # one run
    assert [line.split()[1:] for line in (metrics / "loss").read_text().splitlines()] == [["0.5", "1"], ["2.5", "3"]]
    assert [line.split()[1:] for line in (metrics / "evals" / "knn").read_text().splitlines()][1] == ["50.0", "3"]
    assert (metrics.parent / "params" / "optim.lr").read_text() == "0.001"
    assert len(list(metrics.parent.glob("artifacts/images/view?step?3?*.png"))) == 1
    assert "\nstatus: 3\n" in (metrics.parent / "meta.yaml").read_text()  # finished

    everything = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"part-0.tar" in everything and SECRET.encode() not in everything
    assert b"-of-the-test" not in everything  # no command line

    elsewhere = log.model_copy(update={"wandb": log.wandb.model_copy(update={"project": "other"})})
    launch(run_dir, elsewhere, step=3, done=True)
    assert json.loads((run_dir / "wandb.json").read_text())["id"] != identity


def test_what_fails_is_left_out_with_one_line_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("tensorboard", "mlruns"):
        (tmp_path / name).write_text("a file where a folder should be")
    for name in ("tensorboard", "mlflow"):
        launch(tmp_path, log_config(tmp_path, name), step=0, done=True)
        error = capsys.readouterr().err
        assert error.count(f"{name}: ") == error.count("left out until the next start") == 1
        assert "Traceback" not in error
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["tracker"] for line in lines if line.get("event") == "tracker_failed"] == ["tensorboard", "mlflow"]
    assert [line["loss"] for line in lines if "loss" in line] == [0.5, 0.5]


HANGING = """
import os, socket, sys, threading, time
from pathlib import Path
server, held = socket.create_server(("127.0.0.1", 0)), []
def accept():
    while True: held.append(server.accept())
threading.Thread(target=accept, daemon=True).start()
url = f"http://127.0.0.1:{server.getsockname()[1]}"
os.environ |= {"WANDB_BASE_URL": url, "WANDB_API_KEY": "5" * 40}
os.environ.pop("WANDB_MODE", None)
from mimscale.distributed import end_process
from mimscale.monitoring import tracker
from mimscale.monitoring.config import LogConfig
log = LogConfig.model_validate({"trackers": ["wandb", "mlflow"], "mlflow": {"uri": url}})
tracker.check(log)
trackers = tracker.Trackers(tracker.Start(Path(sys.argv[1]), 0, {}, log))
for step in range(2 * tracker.WAITING):
    trackers.log_scalars(step, {"loss": 1.0})
deadline = time.monotonic() + 30
while not held and time.monotonic() < deadline: time.sleep(0.01)
trackers.close(done=True, patience_s=0.5)
print("answered" if not held else "closed", flush=True)
end_process.EXIT_S = 0.5
end_process.end_process(0)
"""


def test_a_server_that_never_answers_holds_up_neither_the_steps_nor_the_end(tmp_path: Path) -> None:
    words = [sys.executable, "-c", HANGING, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        out, err = process.communicate(timeout=120)
    for pid in own_wandb(process.pid):
        os.kill(pid, signal.SIGKILL)
    assert (process.returncode, out) == (0, "closed\n"), err
    for name in ("wandb", "mlflow"):
        assert err.count(f"{name}: it does not keep up") == err.count(f"{name}: it has not finished after 0.5 s") == 1
    assert "5" * 40 not in err and not [p for p in tmp_path.rglob("*") if p.is_file() and b"5" * 40 in p.read_bytes()]


def own_wandb(parent: int) -> list[int]:
    """wandb's process outlives a parent for whom it still sends."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        if words[0].endswith(b"wandb-core") and str(parent).encode() in words:
            found.append(int(entry.parent.name))
    return found


def test_bad_input_is_refused_before_a_run_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(**values: object) -> None:
        tracker.check(LogConfig.model_validate(values))

    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(UserError, match="there is no API key for it; run `wandb login`"):
        check(trackers=["wandb"])
    check(trackers=["wandb"], wandb={"mode": "offline"})
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x\n")
    (tmp_path / "netrc").chmod(0o600)
    check(trackers=["wandb"])
    with pytest.raises(UserError, match=r"neither log.mlflow.uri nor MLFLOW_TRACKING_URI says where"):
        check(trackers=["mlflow"])
    monkeypatch.setitem(sys.modules, "sqlalchemy", None)
    with pytest.raises(UserError, match=r"needs the whole of mlflow \(pip install mlflow\)"):
        check(trackers=["mlflow"], mlflow={"uri": "sqlite:///mlflow.db"})
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(UserError, match=rf"not installed; pip install -e '.\[{name}\]'"):
            check(trackers=[name])
    check()  # TensorBoard needs nothing


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"trackers": ["mlflow", "mlflow"]}, "'mlflow' is given twice"),
        ({"mlflow": {"uri": "mlruns"}}, "'mlruns' is no place that mlflow knows"),
        ({"mlflow": {"uri": "https://me:pw@host"}}, "a user or a password"),
    ],
)
def test_a_section_that_cannot_be_meant(values: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        LogConfig.model_validate(values)
