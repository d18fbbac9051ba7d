"""What a run does after each step, on PyTorch's engine in this process: nothing is replaced by a stand-in."""

from __future__ import annotations

import gc
import json
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mimscale.bench._operators import counting
from mimscale.checkpoint import format as checkpoint
from mimscale.config.recipes import load_recipe
from mimscale.config.run import method_class
from mimscale.errors import Stopped, UserError
from mimscale.fault_tolerance.preemption import HANDLED
from mimscale.monitoring import panel_files
from mimscale.monitoring.metrics import StartupTimer
from mimscale.monitoring.panels import SAMPLES
from mimscale.runs.summary import summary_of
from mimscale.training import recovery, setup
from mimscale.training.checked_run import prepare
from mimscale.training.context import TrainContext
from mimscale.training.loop import train_step
from mimscale.training.monitor import Monitor
from mimscale.training.panel_inputs import PanelInputs
from mimscale.training.speed import step_cost
from mimscale.training.state import TrainState
from mimscale.types import Damage, StepInfo
from tests import ranks
from tests.monitoring.test_run_logger import no_file_may_exceed

Open = Callable[..., tuple[TrainContext, Monitor, TrainState]]


@pytest.fixture
def start(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Build a run of 12 steps that saves every 4, and its monitor. Everything is closed after the test.

    A signal to the process of the tests, such as that of `timeout`, is for pytest: the run would save one step later.
    """
    handlers = {number: signal.getsignal(number) for number in HANDLED}
    monkeypatch.delenv("MIMSCALE_STOP_FILE", raising=False)
    closing = ExitStack()

    def restore_handlers() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def build(**sections: dict[str, Any]) -> tuple[TrainContext, Monitor, TrainState]:
        sections["engine"] = {"backend": "torch", "ds_config": "cpu_zero0_fp32", **sections.get("engine", {})}
        path = ranks.recipe(tmp_path, shards, **sections)
        checked = prepare(load_recipe(str(path)), tmp_path / "run", None, ("test",))
        run = setup.build(checked, StartupTimer(), closing)
        restore_handlers()
        state = recovery.restore(run).launched()
        return run, Monitor(run, state), state

    yield build
    closing.close()
    restore_handlers()


def advance(run: TrainContext, monitor: Monitor, state: TrainState, steps: int) -> TrainState:
    for _ in range(steps):
        state = monitor.after_step(state, train_step(run, state.step))
    return state


def skipped(run: TrainContext, state: TrainState) -> StepInfo:
    """A step whose loss is not finite, through the run's own guard and engine."""
    scalars = []
    for _ in range(run.checked.accumulation):
        batch, targets = run.inputs.next_batch()
        scalars.append(run.engine.forward_backward(batch, targets, lambda loss: run.check_loss(loss * math.nan)))
    did_skip = run.engine.step(lr=1e-3, clip=0.0)
    assert did_skip
    total = run.checked.total_steps
    return StepInfo(state.step + 1, total, True, tuple(scalars), batch, targets, run.engine.parameters)


def events(run: TrainContext, name: str) -> list[dict[str, Any]]:
    return [line for line in ranks.lines(run.checked.run_dir) if line.get("event") == name]


def weights(run: TrainContext) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.engine.fragments().items() if name.startswith("fp32")}


def test_it_logs_when_due_and_the_start_once(start: Open) -> None:
    run, monitor, state = start(log={"every": 2})
    state = advance(run, monitor, state, 5)
    assert list(ranks.curve(run.checked.run_dir)) == [2, 4]
    assert len(events(run, "first_step")) == 1
    line = next(line for line in ranks.lines(run.checked.run_dir) if line.get("step") == 4)
    assert line["lr"] == run.checked.lr(3) and line["skipped_steps"] == 0 and line["images_per_s"] > 0
    assert state.step == 5 and state.samples == 5 * 16


def test_a_skipped_step_is_explained_and_leaves_the_weights_alone(start: Open) -> None:
    run, monitor, state = start()
    state = advance(run, monitor, state, 1)
    before = weights(run)
    state = monitor.after_step(state, skipped(run, state))
    assert state.step == 2
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(run).items())
    (event,) = events(run, "skipped")
    assert event["at"] == 2 and event["why"] == "the loss is not finite" and len(event["keys"]) == 16


def test_a_row_of_skipped_steps_goes_back_to_the_checkpoint_before_it(start: Open) -> None:
    run, monitor, state = start(guard={"skips": 2, "margin": 0})
    state = advance(run, monitor, state, 4)  # saved
    saved = weights(run)
    state = advance(run, monitor, state, 1)
    state = monitor.after_step(state, skipped(run, state))
    ids = run.inputs.ids
    state = monitor.after_step(state, skipped(run, state))
    assert state.step == 4 and state.rollbacks == 1 and state.jumps == ((5, 2),)
    assert all(torch.equal(saved[name], tensor) for name, tensor in weights(run).items())
    info = train_step(run, state.step)  # step 5 again, on the same samples
    state = monitor.after_step(state, info)
    info = train_step(run, state.step)  # over the two bad ones
    assert not {int(i) for part in run.inputs.ids for i in part} & {int(i) for part in ids for i in part}
    assert [event["to"] for event in events(run, "rollback")] == [4]


def test_without_a_checkpoint_a_row_of_skipped_steps_goes_on(start: Open) -> None:
    run, monitor, state = start(guard={"skips": 1})
    state = monitor.after_step(state, skipped(run, state))
    assert state.step == 1 and state.rollbacks == 1 and state.jumps == ()


def test_panels_are_drawn_when_due_and_at_the_end(start: Open) -> None:
    run, monitor, state = start(log={"panels": 5, "trackers": ["tensorboard"]})
    state = advance(run, monitor, state, 11)
    info = train_step(run, state.step)
    batch, _ = PanelInputs(run).of(info)
    assert batch.positions.tolist() == list(range(SAMPLES))  # so too after a resume, and on any number of ranks
    monitor.finish(monitor.after_step(state, info))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run.checked.run_dir / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert [image.step for image in board.Images("view")] == [5, 10, 12]
    files = panel_files.steps(run.checked.run_dir)
    assert list(files) == [5, 10, 12]
    panels = [np.asarray(Image.open(path)) for path in files.values()]
    side = panels[0].shape[1] // SAMPLES
    assert (panels[0][: 2 * side] == panels[2][: 2 * side]).all()  # the same images and masks, another reconstruction
    assert (panels[0][2 * side :] != panels[2][2 * side :]).any()


def test_trackers_change_no_bit_and_a_resume_continues_their_runs(start: Open, tmp_path: Path) -> None:
    run, monitor, state = start()
    monitor.finish(advance(run, monitor, state, 12))
    plain, expected = ranks.curve(run.checked.run_dir), weights(run)
    run.closing.close()
    run.checked.run_dir.rename(tmp_path / "plain")

    log = {
        "trackers": ["tensorboard", "wandb", "mlflow"],
        "wandb": {"mode": "offline"},
        "mlflow": {"uri": f"file:{tmp_path / 'mlruns'}"},
        "panels": 5,
    }
    run, monitor, state = start(log=log)
    state = advance(run, monitor, state, 4)
    run.preemption.reason = "SIGUSR1"
    monitor.finish(advance(run, monitor, state, 1))
    run.closing.close()
    (known,) = (tmp_path / "mlruns").glob("*/*/metrics/loss")
    assert [line.split()[2] for line in known.read_text().splitlines()] == ["1", "2", "3", "4", "5"]
    run, monitor, state = start(log=log)
    monitor.finish(advance(run, monitor, state, 7))

    assert ranks.curve(run.checked.run_dir) == plain
    assert all(torch.equal(expected[name], tensor) for name, tensor in weights(run).items())
    assert events(run, "tracker_failed") == []
    assert [event["at"] for event in events(run, "start")] == [0, 5]
    identity = json.loads((run.checked.run_dir / "wandb.json").read_text())["id"]
    assert len(list(run.checked.run_dir.glob(f"wandb/offline-run-*-{identity}/run-{identity}.wandb"))) == 2
    (known,) = (tmp_path / "mlruns").glob("*/*/metrics/loss")
    assert [int(line.split()[2]) for line in known.read_text().splitlines()] == list(range(1, 13))
    assert {float(line.split()[1]) for line in known.read_text().splitlines()} == set(plain.values())


def test_a_stop_file_saves_and_stops(start: Open) -> None:
    run, monitor, state = start(checkpoint={"every": 0})
    state = advance(run, monitor, state, 2)
    (run.checked.run_dir / "stop").touch()
    run.preemption._next_poll_s = 0.0  # it is read every few seconds only
    while not monitor.stopped:
        state = advance(run, monitor, state, 1)
    monitor.finish(state)
    assert state.step < 12 and checkpoint.newest_step(run.checked.run_dir) == state.step
    assert not (run.checked.run_dir / "done").exists()
    assert events(run, "stopped")[0]["at"] == state.step
    run.closing.close()
    seen = summary_of(run.checked.run_dir)
    assert (seen.status, seen.step, seen.total_steps) == ("stopped", state.step, 12)
    assert str(run.checked.run_dir / "stop") in seen.reason


def test_the_last_step_is_saved_and_the_folder_marked_done(start: Open) -> None:
    run, monitor, state = start()
    state = advance(run, monitor, state, 12)
    assert not monitor.stopped
    monitor.finish(state)
    assert (run.checked.run_dir / "done").read_text() == "12\n"
    assert summary_of(run.checked.run_dir).status == "running"  # the folder is still held
    run.closing.close()
    seen = summary_of(run.checked.run_dir)
    assert (seen.status, seen.step, seen.total_steps, seen.device) == ("done", 12, 12, "1 x cpu")
    assert seen.loss == ranks.curve(run.checked.run_dir)[12] and seen.epochs == 12 / run.checked.steps_per_epoch
    assert [checkpoint.step_of(path) for path in checkpoint.steps(run.checkpoints)] == [4, 8, 12]


def test_too_many_damaged_samples_end_the_run_with_one_line(start: Open) -> None:
    run, monitor, state = start(data={"max_damaged": 0})
    run.damage_log.add([Damage(3, "shard-0.tar", "a", "cut short")])
    run.damage_log.add([Damage(4, "shard-0.tar", "b", "cut short")])
    while not monitor.stopped:
        state = advance(run, monitor, state, 1)
    with pytest.raises(Stopped, match=r"2 samples cannot be used, data.max_damaged allows 0"):
        monitor.finish(state)
    assert checkpoint.newest_step(run.checked.run_dir) == state.step


def test_a_limit_of_file_sizes_is_noticed_before_the_first_step(start: Open, tmp_path: Path) -> None:
    """ulimit -f: else the run would train for hours and end without a checkpoint."""
    line = r"may write files of 300000 bytes, and a checkpoint needs \d+ on each rank"
    with no_file_may_exceed(300_000), pytest.raises(UserError, match=line):
        start()
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_python_collects_garbage_only_at_set_steps(start: Open) -> None:
    run, monitor, state = start()
    assert not gc.isenabled()
    state = advance(run, monitor, state, 12)
    monitor.finish(state)
    run.closing.close()
    assert gc.isenabled()


def test_a_finished_state_resumes_as_it_was(start: Open) -> None:
    run, monitor, state = start()
    state = advance(run, monitor, state, 4)
    kept = weights(run)
    run.preemption.reason = "SIGUSR1"
    state = advance(run, monitor, state, 1)
    monitor.finish(state)
    run.closing.close()
    again, _, resumed = start()
    assert resumed == replace(state, launches=2, guard=resumed.guard)
    assert kept.keys() == weights(again).keys()


def test_the_start_says_flops_and_peak_and_each_line_the_utilisation(
    start: Open, capsys: pytest.CaptureFixture[str]
) -> None:
    run, monitor, state = start(log={"every": 1})
    shown = capsys.readouterr().err
    assert "peak: " in shown and "TFLOP/s measured with a product of 384 squared" in shown
    assert f"FLOPs per image: {run.cost.flops / 1e9:.4g} G, forward and backward pass (student " in shown
    advance(run, monitor, state, 1)
    (line,) = [line for line in ranks.lines(run.checked.run_dir) if line.get("step") == 1]
    assert run.cost.product is not None
    assert line["mfu_measured"] == pytest.approx(run.cost.flops * line["images_per_s"] / run.cost.product)
    assert line["memory_gib"] > 0 and 0 <= line["data_wait"] <= 1 and "mfu" not in line and "host_share" not in line
    assert "mfu_measured " in capsys.readouterr().err


def test_between_log_lines_only_the_gradient_norm_is_read_from_the_device(start: Open) -> None:
    run, monitor, state = start(log={"every": 4}, checkpoint={"every": 0}, watchdog={"every": 0})
    reads = []
    for _ in range(4):
        with counting() as counter:
            state = advance(run, monitor, state, 1)
        reads.append(counter.reads)
    assert [list(places) for places in reads[1:3]] == [list(reads[1])] * 2
    assert [place.split(":")[0] for place in reads[1]] == ["mimscale/engine/torch_engine.py"]
    assert reads[1].total() == 1 and reads[3].total() > 1


def test_a_method_whose_flops_cannot_be_counted_trains_all_the_same(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reads_a_value(self: Any, batch: Any, targets: Any) -> dict[str, torch.Tensor]:
        assert float(batch.images.mean()) < math.inf
        return {"loss": self.student.cls_token.sum()}

    monkeypatch.setattr(method_class("mae"), "forward", reads_a_value)
    checked = prepare(load_recipe(str(ranks.recipe(tmp_path, shards))), tmp_path / "run", None, ("test",))
    before = torch.get_rng_state()
    cost, lines = step_cost(checked)
    assert torch.equal(torch.get_rng_state(), before)
    assert cost.flops == 0 and cost.mfu(100.0) == {}
    assert lines[1].startswith("FLOPs per image: not counted (") and "no MFU in the log" in lines[1]
