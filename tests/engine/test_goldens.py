"""The official training runs, through DeepSpeed's engine at every ZeRO stage and through plain PyTorch's."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import islice

import pytest
import torch

from mimscale.config.deepspeed import load_ds_config
from mimscale.distributed.world import from_environment
from mimscale.engine.base import Engine
from mimscale.engine.config import EngineConfig
from mimscale.engine.factory import make_engine
from mimscale.optim.lr_schedule import lr_at_step
from tests import golden
from tests.methods import training_golden
from tests.methods.training_golden import TrainingGolden

pytestmark = pytest.mark.usefixtures("process_group")

# Official run -> parameters that are moved to the other group of weight decay, one at a time.
WRONG_GROUP: dict[Callable[[], TrainingGolden], tuple[str, ...]] = {
    training_golden.mae: ("student.cls_token", "decoder.mask_token"),
    training_golden.maskalign: ("student.cls_token",),
    training_golden.simmim: ("student.cls_token", "student.mask_token"),
    training_golden.convmae: ("decoder.mask_token", "student.blocks1.0.attn.weight"),
    training_golden.mff: ("student.cls_token", "decoder.mask_token", "fusion.logits"),
    training_golden.pixmim: ("student.cls_token", "decoder.mask_token"),
    training_golden.amt: ("student.cls_token", "decoder.mask_token"),
    training_golden.finetune: ("student.cls_token", "student.pos_embed"),
    training_golden.linear_probe: (),
    training_golden.finetune_soft: ("student.cls_token", "student.pos_embed"),
}


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
        accumulation=t.accumulation,
        ds_config=load_ds_config(section.ds_config),
    )


def undecayed_in(engine: Engine) -> set[str]:
    return {name for group in engine.describe()["groups"] for name in group["names"] if not group["weight_decay"]}


def follow(t: TrainingGolden, engine: Engine) -> None:
    """All steps of the golden run, with its losses, rates and norms; then the end weights."""
    losses, rates, norms = train(t, engine)
    for ours, official in zip(losses, t.losses, strict=True):
        golden.loss_close(ours, official)
    golden.rates_close(rates, t.lrs)
    assert not t.norms or norms == pytest.approx(t.norms, rel=1e-5)
    t.check_weights(weights(engine))


def train(t: TrainingGolden, engine: Engine) -> tuple[list[float], list[float], list[float]]:
    """The losses of all micro-batches, and the learning rates and gradient norms of all steps."""
    losses: list[float] = []
    rates, norms = [], []
    micro_steps = zip(t.batches, t.targets, strict=True)
    total = round(t.steps_per_epoch * (t.run.schedule.epochs or 0))
    for step in range(len(t.lrs)):
        t.before_step(step)
        losses += [float(engine.forward_backward(*data)["loss"]) for data in islice(micro_steps, t.accumulation)]
        rates.append(lr_at_step(t.run.schedule, t.first_step + step, t.steps_per_epoch, total))
        assert not engine.step(rates[-1], t.run.optim.clip)
        norms.append(engine.gradient_norm())
    return losses, rates, norms


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    """The masters and buffers as a checkpoint would hold them; one rank owns all of it."""
    shapes = engine.describe()["shapes"]
    parts = {key.split("|")[1]: t for key, t in engine.fragments().items() if key.startswith(("fp32|", "buffer|"))}
    return {name: tensor.view(shapes[name]) for name, tensor in parts.items()}


@pytest.mark.parametrize("name", [*(f"cpu_zero{stage}_fp32" for stage in range(4)), "torch"])
@pytest.mark.parametrize("golden_run", WRONG_GROUP)
def test_official_training_run(golden_run: Callable[[], TrainingGolden], name: str) -> None:
    t = golden_run()
    engine = build(t, name)
    names = {name for group in engine.describe()["groups"] for name in group["names"]}
    assert (names - undecayed_in(engine), undecayed_in(engine)) == (t.decayed, t.undecayed)
    scales = {name: group["lr_scale"] for group in engine.describe()["groups"] for name in group["names"]}
    assert scales == pytest.approx(t.scales or dict.fromkeys(names, 1.0), rel=1e-12)
    follow(t, engine)
    engine.close()


@pytest.mark.parametrize(("golden_run", "name"), [(run, n) for run, names in WRONG_GROUP.items() for n in names])
def test_a_parameter_in_the_wrong_group_is_noticed(
    golden_run: Callable[[], TrainingGolden], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the weights at the end, not by the names of the groups alone."""
    t = replace(golden_run(), before_step=lambda step: None)
    exempt = t.method.no_weight_decay() ^ {name}
    monkeypatch.setattr(t.method, "no_weight_decay", lambda: exempt)
    engine = build(t, "cpu_zero2_fp32")
    assert undecayed_in(engine) ^ t.undecayed == {name}
    train(t, engine)
    with pytest.raises(AssertionError, match=f"{re.escape(name)}: an error of"):
        t.check_weights(weights(engine))
    engine.close()


@pytest.mark.parametrize("name", ["cpu_zero2_fp32", "torch"])
def test_a_wrong_rate_of_one_group_is_noticed(name: str) -> None:
    t = training_golden.mae()
    engine = build(t, name)
    engine._groups[1]["lr_scale"] = 0.95  # type: ignore[attr-defined]
    with pytest.raises(AssertionError):
        follow(t, engine)
    engine.close()
