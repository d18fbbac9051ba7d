"""`log.profile`: a trace and a table of a few steps of a run, which trains bitwise as without; on PyTorch's engine."""

from __future__ import annotations

import gzip
import json
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from mimscale.config.recipes import load_recipe
from mimscale.errors import UserError
from mimscale.fault_tolerance.preemption import HANDLED
from mimscale.monitoring.config import ProfileConfig
from mimscale.monitoring.metrics import StartupTimer
from mimscale.monitoring.profile_window import ProfileWindow
from mimscale.training import recovery, setup
from mimscale.training.checked_run import CheckedRun, prepare
from mimscale.training.loop import train, train_step
from mimscale.training.monitor import Monitor
from tests import ranks


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in HANDLED}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def checked_run_of(folder: Path, shards: Path, profile: dict[str, Any] | None) -> CheckedRun:
    """A run of 6 steps in FOLDER/run."""
    folder.mkdir(exist_ok=True)
    path = ranks.recipe(
        folder,
        shards,
        log={"profile": profile},
        schedule={"steps": 6, "warmup_epochs": 0.2},
        engine={"backend": "torch", "ds_config": "cpu_zero0_fp32"},
        checkpoint={"every": 0},
    )
    return prepare(load_recipe(str(path)), folder / "run", None, ("test",))


def trained(folder: Path, shards: Path, profile: dict[str, Any] | None) -> Path:
    """The folder of the run."""
    with ExitStack() as closing:
        train(checked_run_of(folder, shards, profile), StartupTimer(), closing)
    return folder / "run"


def test_a_window_changes_no_bit_and_leaves_a_trace_and_a_table(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = trained(tmp_path / "plain", shards, None)
    assert not (plain / "profile").exists() and "profile" not in capsys.readouterr().err
    seen = trained(tmp_path / "seen", shards, {"at": 3, "steps": 2})
    assert ranks.curve(seen) == ranks.curve(plain) and ranks.identical(seen, plain)

    assert sorted(p.name for p in (seen / "profile").iterdir()) == [
        f"step-{3:09d}-rank-0.{end}" for end in ("json.gz", "md")
    ]
    trace = json.loads(gzip.decompress((seen / "profile" / f"step-{3:09d}-rank-0.json.gz").read_bytes()))
    names = [event.get("name") for event in trace["traceEvents"]]
    micro_batches = [name for name in names if name == "aten::scaled_dot_product_attention"]
    assert len(micro_batches) >= 2 * 2 * 3  # steps x micro-batches x blocks of the student
    text = (seen / "profile" / f"step-{3:09d}-rank-0.md").read_text()
    assert text.startswith("steps 3 to 4, rank 0, cpu: ") and "| operator | ms per step | calls per step |" in text
    assert " operators take " in text and "kernel" not in text.splitlines()[0]
    (event,) = [line for line in ranks.lines(seen) if line.get("event") == "profile"]
    assert (event["at"], event["steps"]) == (3, 2) and event["kernels"] > 100 and event["kernel_ms"] > 0
    assert "profile of steps 3 to 4, rank 0" in capsys.readouterr().err


def test_a_run_that_ends_inside_the_window_writes_what_it_has(tmp_path: Path, shards: Path) -> None:
    run = trained(tmp_path / "cut", shards, {"at": 5, "steps": 50})
    assert (run / "profile" / f"step-{5:09d}-rank-0.md").read_text().startswith("steps 5 to 6,")
    assert (run / "done").exists()


def test_a_profiler_that_fails_costs_the_profile_only(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ExitStack() as closing:
        run = setup.build(checked_run_of(tmp_path / "bad", shards, {"at": 2, "steps": 2}), StartupTimer(), closing)
        state = recovery.restore(run).launched()
        monitor = Monitor(run, state)
        (run.checked.run_dir / "profile").write_text("not a folder")
        while state.step < 6:
            state = monitor.after_step(state, train_step(run, state.step))
        monitor.finish(state)
    (event,) = [line for line in ranks.lines(run.checked.run_dir) if line.get("event") == "profile_failed"]
    assert "FileExistsError" in event["error"]
    assert "log.profile failed, training goes on: FileExistsError" in capsys.readouterr().err
    assert (run.checked.run_dir / "done").exists() and len(ranks.curve(run.checked.run_dir)) == 6


def window(run_dir: Path, said: list[str], rank: int = 0, **values: int) -> ProfileWindow:
    config = ProfileConfig(**{"at": 3, "steps": 2, **values})
    return ProfileWindow(run_dir, config, rank, torch.device("cpu"), said.append, lambda *a, **k: None)


def test_a_roll_back_starts_the_window_anew(tmp_path: Path) -> None:
    said: list[str] = []
    one = window(tmp_path, said)
    one.before_step(3)
    assert one.after_step(3) < 1e9 and not said
    assert one.after_step(1) > 0  # rolled back
    assert not said and not (tmp_path / "profile").exists()
    for step in (2, 3, 4, 5):
        one.before_step(step)
        torch.ones(2).sum()
        one.after_step(step)
    assert len(said) == 1 and len(list((tmp_path / "profile").iterdir())) == 2


def test_only_the_first_ranks_write(tmp_path: Path) -> None:
    said: list[str] = []
    for rank, ranks_ in ((1, 1), (1, 2)):
        one = window(tmp_path, said, rank, ranks=ranks_, steps=1)
        one.before_step(3)
        one.after_step(3)
        assert sorted(p.name for p in tmp_path.glob("profile/*.md")) == [f"step-{3:09d}-rank-1.md"] * (ranks_ - 1)


def test_bad_windows_are_refused() -> None:
    for change, line in (("log.profile.at=0", "log.profile.at = 0"), ("log.profile.step=1", "did you mean 'steps'")):
        with pytest.raises(UserError, match=line):
            load_recipe("mae_tiny", ["log.profile.at=1", change])


def test_a_window_behind_the_last_step_is_refused(tmp_path: Path, shards: Path) -> None:
    with pytest.raises(UserError, match=r"log.profile.at = 50 is behind the last step, 6"):
        checked_run_of(tmp_path / "late", shards, {"at": 50})
