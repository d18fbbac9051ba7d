"""The official training runs, through DeepSpeed's engine at every ZeRO stage and through plain PyTorch's."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist

from mimscale.config.deepspeed import load_ds_config
from mimscale.distributed.world import close_process_group, from_environment
from mimscale.engine.base import Engine
from mimscale.engine.config import EngineConfig
from mimscale.engine.deepspeed_runtime import open_process_group
from mimscale.engine.factory import make_engine
from mimscale.optim.lr_schedule import cosine_at_step
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


def build(t: TrainingGolden, name: str) -> Engine:
    """name: a file of ds_configs/, or torch."""
    section = EngineConfig(ds_config="cpu_zero0_fp32", device="cpu", backend="torch")
    if name != "torch":
        section = EngineConfig(ds_config=name, device="cpu")
    return make_engine(
        t.method,
        t.run.model_copy(update={"engine": section}),
        from_environment("cpu"),
        micro_batch=len(t.batches[0].ids),
        accumulation=1,
        ds_config=load_ds_config(section.ds_config),
    )


def undecayed_in(engine: Engine) -> set[str]:
    return {name for group in engine.describe()["groups"] for name in group["names"] if not group["weight_decay"]}


def follow(t: TrainingGolden, engine: Engine) -> None:
    """All steps of the golden run, with its losses, rates and norms; then the end weights."""
    curve = t.run.schedule
    for step, (batch, targets) in enumerate(zip(t.batches, t.targets, strict=True)):
        rate = cosine_at_step(
            step,
            t.steps_per_epoch,
            peak=curve.peak_lr,
            min_lr=curve.min_lr,
            warmup_epochs=curve.warmup_epochs,
            epochs=curve.epochs or 0,
        )
        assert rate == pytest.approx(t.lrs[step], rel=1e-9, abs=1e-15)
        loss = engine.forward_backward(batch, targets)["loss"]
        assert not engine.step(rate, t.run.optim.clip)
        golden.loss_close(loss, t.losses[step])
        if t.norms:
            assert engine.gradient_norm() == pytest.approx(t.norms[step], rel=1e-5)
    t.check_weights(weights(engine))


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    """The masters and buffers as a checkpoint would hold them; one rank owns all of it."""
    shapes = engine.describe()["shapes"]
    parts = {key.split("|")[1]: t for key, t in engine.fragments().items() if key.startswith(("fp32|", "buffer|"))}
    return {name: tensor.view(shapes[name]) for name, tensor in parts.items()}


@pytest.mark.parametrize("name", [*(f"cpu_zero{stage}_fp32" for stage in range(4)), "torch"])
@pytest.mark.parametrize("golden_run", [training_golden.mae, training_golden.maskalign])
def test_official_training_run(golden_run: Callable[[], TrainingGolden], name: str) -> None:
    t = golden_run()
    engine = build(t, name)
    names = {name for group in engine.describe()["groups"] for name in group["names"]}
    assert (names - undecayed_in(engine), undecayed_in(engine)) == (t.decayed, t.undecayed)
    follow(t, engine)
    engine.close()


def test_a_wrong_group_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    t = training_golden.mae()
    monkeypatch.setattr(t.method, "no_weight_decay", lambda: {"student.cls_token"})
    engine = build(t, "cpu_zero2_fp32")
    assert undecayed_in(engine) - t.undecayed == {"student.cls_token"}
    engine.close()


@pytest.mark.parametrize("name", ["cpu_zero2_fp32", "torch"])
def test_a_wrong_rate_of_one_group_is_noticed(name: str) -> None:
    t = training_golden.mae()
    engine = build(t, name)
    engine._groups[1]["lr_scale"] = 0.95  # type: ignore[attr-defined]
    with pytest.raises(AssertionError):
        follow(t, engine)
    engine.close()
