"""The official training runs, through our engine at every ZeRO stage."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist

from mimscale.distributed.world import close_process_group, from_environment
from mimscale.engine.config import EngineConfig
from mimscale.engine.deepspeed_engine import Engine
from mimscale.engine.deepspeed_runtime import open_process_group
from mimscale.optim.lr_schedule import lr
from tests import golden
from tests.methods import training_golden
from tests.methods.training_golden import TrainingGolden


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    before = dict(os.environ)
    open_process_group(from_environment("cpu"))
    yield
    close_process_group()
    assert not dist.is_initialized()
    os.environ.clear()  # RANK and the like would reach the processes that later tests start
    os.environ.update(before)


def build(t: TrainingGolden, stage: int) -> Engine:
    section = EngineConfig(ds_config=f"cpu_zero{stage}_fp32", device="cpu")
    return Engine(t.method, t.run.model_copy(update={"engine": section}), from_environment("cpu"))


def follow(t: TrainingGolden, engine: Engine) -> None:
    """All steps of the golden run, with its losses, rates and norms; then the end weights."""
    curve = t.run.schedule
    for step, (batch, targets) in enumerate(zip(t.batches, t.targets, strict=True)):
        rate = lr(
            step,
            t.steps_per_epoch,
            peak=curve.peak_lr,
            min_lr=curve.min_lr,
            warmup_epochs=curve.warmup_epochs,
            epochs=curve.epochs or 0,
        )
        assert rate == pytest.approx(t.lrs[step], rel=1e-9, abs=1e-15)
        engine.set_lr(rate)
        loss = engine.micro_step(batch, targets)["loss"]
        golden.loss_close(loss, t.losses[step])
        if t.norms:
            assert engine.gradient_norm() == pytest.approx(t.norms[step], rel=1e-5)
    t.check_weights(weights(engine))


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    """The masters and buffers as a checkpoint would hold them; one rank owns all of it."""
    shapes = engine.meta()["shapes"]
    parts = {key.split("|")[1]: t for key, t in engine.tensors().items() if key.startswith(("fp32|", "buffer|"))}
    return {name: tensor.view(shapes[name]) for name, tensor in parts.items()}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("golden_run", [training_golden.mae, training_golden.maskalign])
def test_official_training_run(golden_run: Callable[[], TrainingGolden], stage: int) -> None:
    t = golden_run()
    engine = build(t, stage)
    decayed = {name for group in engine.groups for name in group["names"] if group["weight_decay"]}
    undecayed = {name for group in engine.groups for name in group["names"] if not group["weight_decay"]}
    assert (decayed, undecayed) == (t.decayed, t.undecayed)
    follow(t, engine)
    engine.close()


def test_a_wrong_group_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    t = training_golden.mae()
    monkeypatch.setattr(t.method, "no_weight_decay", lambda: {"student.cls_token"})
    engine = build(t, 2)
    undecayed = {name for group in engine.groups for name in group["names"] if not group["weight_decay"]}
    assert undecayed - t.undecayed == {"student.cls_token"}
    engine.close()


def test_a_wrong_rate_of_one_group_is_noticed() -> None:
    t = training_golden.mae()
    engine = build(t, 2)
    engine.groups[1]["lr_scale"] = 0.95
    with pytest.raises(AssertionError):
        follow(t, engine)
    engine.close()
