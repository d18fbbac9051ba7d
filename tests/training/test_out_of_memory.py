"""An error of memory becomes one line with a micro-batch that would fit; allocations that no machine can make."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from mimscale import methods
from mimscale.__main__ import main
from mimscale.config.recipes import load_recipe
from mimscale.cost.devices import GIB
from mimscale.errors import UserError
from mimscale.fault_tolerance.preemption import HANDLED
from mimscale.training.auto_micro_batch import SPARE, most_that_fits, planner_for, smaller_that_fits
from mimscale.training.checked_run import CheckedRun, prepare
from mimscale.training.out_of_memory import (
    change_that_fits,
    explained,
    is_out_of_memory,
    memory_of,
    says_out_of_memory,
    write_snapshot,
)
from tests import ranks

TOO_MUCH = 1 << 60  # bytes
CPU = torch.device("cpu")


@pytest.fixture
def checked(tmp_path: Path, shards: Path) -> CheckedRun:
    return prepare(load_recipe(str(ranks.recipe(tmp_path, shards))), tmp_path / "run", None, ())


def allocation_error() -> Exception:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        torch.empty(TOO_MUCH, dtype=torch.uint8)
    return caught.value


def test_which_errors_are_about_memory() -> None:
    assert is_out_of_memory(allocation_error()) and is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(MemoryError()) and not is_out_of_memory(RuntimeError("shapes do not match"))
    assert says_out_of_memory("std::bad_alloc") and not says_out_of_memory("killed")


def test_an_error_becomes_one_line(checked: CheckedRun) -> None:
    words = f"asked for {TOO_MUCH} bytes; try engine.max_micro_batch=4 .8 too were"
    with pytest.raises(UserError, match=words), explained(checked):
        torch.empty(TOO_MUCH, dtype=torch.uint8)
    with pytest.raises(UserError) as caught, explained(checked):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has\nless.")
    line = str(caught.value)
    assert line.startswith("out of memory on cpu with a micro-batch of 8 images, which asked for 2.50 GiB; ")
    assert "\n" not in line and isinstance(caught.value.__cause__, torch.OutOfMemoryError)


def test_other_errors_pass(checked: CheckedRun) -> None:
    with pytest.raises(RuntimeError, match="a bug"), explained(checked):
        raise RuntimeError("a bug")


def test_a_prediction_that_fails_does_not_hide_the_error(checked: CheckedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    broken = checked.config.model_copy(
        update={"engine": checked.config.engine.model_copy(update={"ds_config": "none"})}
    )
    object.__setattr__(checked, "config", broken)
    with pytest.raises(UserError, match="lower engine.max_micro_batch below 8"), explained(checked):
        raise MemoryError


def test_the_named_micro_batch_fits_by_prediction() -> None:
    """The numbers of test_auto_micro_batch: MAE-L with 8 ranks and 4,096 images."""
    config = load_recipe("mae_vit_l16")
    assert smaller_that_fits(config, 8, 512, 16 * GIB) == (most_that_fits(config, 8, 16 * GIB), False) == (128, False)
    assert smaller_that_fits(config, 8, 64, 79 * GIB) == (32, True)
    assert smaller_that_fits(config, 8, 512, GIB) == (None, False)
    assert smaller_that_fits(config, 8, 1, 79 * GIB) == (None, True)
    assert "try engine.max_micro_batch=128 (predicted to fit in 16.0 GiB)" in change_that_fits(
        config, 8, 512, 16 * GIB, "cuda"
    )
    cpu = planner_for(config, 1, 10 * GIB, "cpu")
    assert cpu.gpu.name == "cpu" and cpu.room == pytest.approx((1 - SPARE) * 10 * GIB)


def test_without_a_smaller_one_other_ways_are_named() -> None:
    config = load_recipe("mae_vit_l16")
    line = change_that_fits(config, 8, 512, 1.0 * GIB, "cuda")
    assert "no smaller micro-batch" in line and "engine.activation_checkpointing=1 or a file of ds_configs/" in line
    line = change_that_fits(load_recipe("mae_vit_l16", ["engine.activation_checkpointing=1"]), 8, 512, GIB, "cuda")
    assert "activation_checkpointing" not in line


def test_memory_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    whole = memory_of(CPU, 1)
    assert memory_of(CPU, 4) == whole / 4 > 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert memory_of(CPU, 4) == whole / 2


def test_a_cpu_has_no_snapshot(tmp_path: Path) -> None:
    assert write_snapshot(tmp_path / "run", 0, CPU) is None and not (tmp_path / "run").exists()


HUNGRY = """
import torch
from mimscale.methods import mae

class Hungry(mae.MAE):
    '''MAE whose third micro-batch wants more than there is.'''

    def forward(self, batch, targets):
        if not batch.images.is_meta and 2 in batch.positions // 8:
            torch.empty(1 << 60, dtype=torch.uint8)
        return super().forward(batch, targets)
"""


@pytest.mark.usefixtures("ended_with_the_test")
def test_a_run_that_runs_out_of_memory(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "hungry.py").write_text(HUNGRY)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path / "methods")])
    engine = {"backend": "torch", "ds_config": "cpu_zero0_fp32"}
    recipe = ranks.recipe(tmp_path, shards, "mae", method={"name": "hungry"}, engine=engine)
    handlers = {number: signal.getsignal(number) for number in HANDLED}
    try:
        assert main(["train", str(recipe), "--run-dir", str(tmp_path / "run")]) == 2
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("mimscale train: out of memory on cpu with a micro-batch of 8 images, which asked for ")
    assert "Traceback" not in "".join(lines) and set(ranks.curve(tmp_path / "run")) == {1}
