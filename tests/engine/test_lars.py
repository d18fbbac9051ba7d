"""LARS through every engine: the official program's steps, its buffers and the probe's BatchNorm after each of them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

import pytest
import timm.optim
import torch
from torch import Tensor, nn

from mimscale.config.deepspeed import load_ds_config
from mimscale.config.recipes import validate
from mimscale.distributed.world import from_environment
from mimscale.engine.base import Engine
from mimscale.engine.config import EngineConfig
from mimscale.engine.factory import make_engine
from mimscale.methods.base import Method
from mimscale.optim.lr_schedule import lr_at_step
from mimscale.optim.optimizers.lars import WholeParameterLars
from tests import golden
from tests.engine.test_goldens import build, weights
from tests.golden import batch_of, close
from tests.methods import training_golden

pytestmark = pytest.mark.usefixtures("process_group")
ENGINES = [*(f"cpu_zero{stage}_fp32" for stage in range(4)), "torch"]


RUN = golden.run_config({"name": "finetune", "classes": 2}, {"width": 32, "depth": 1, "heads": 2})


class GivenGradients(Method):
    """A method whose gradients are those that the batch's noise holds."""

    def __init__(self, start: Mapping[str, Tensor]) -> None:
        super().__init__(RUN, {})
        for name, value in start.items():
            self.register_parameter(name, nn.Parameter(value.clone()))

    def forward(self, batch: Any, targets: Any) -> dict[str, Tensor]:
        return {"loss": sum(((p * batch.noise[n]).sum() for n, p in self.named_parameters()), torch.zeros(()))}


def engine_of(name: str, method: nn.Module, optim: dict[str, Any]) -> Engine:
    section = EngineConfig(ds_config="cpu_zero0_fp32" if name == "torch" else name, device="cpu")
    section = section.model_copy(update={"backend": "torch" if name == "torch" else "deepspeed"})
    run = validate({**RUN.dump(), "optim": optim}, "test").model_copy(update={"engine": section})
    ds_config = load_ds_config(section.ds_config)
    return make_engine(method, run, from_environment("cpu"), micro_batch=1, accumulation=1, ds_config=ds_config)


def buffers_of(engine: Engine) -> dict[str, Tensor]:
    """The momentum of each parameter, flat."""
    found = {key.split("|")[1]: t for key, t in engine.fragments().items() if key.startswith("momentum_buffer|")}
    return {name: tensor.clone() for name, tensor in found.items()}


@pytest.mark.parametrize("name", ENGINES)
def test_official_steps(name: str) -> None:
    g = golden.load("lars_dev")
    c = g.config
    names = sorted({key.split("/")[0] for key in g.tensors if not key.startswith(("g", "mu_"))})
    method = GivenGradients({n: g[f"{n}/0"] for n in names})
    options = {key: c[key] for key in ("momentum", "trust_coefficient", "weight_decay")}
    engine = engine_of(name, method, {"name": "lars", **options})
    for step in range(sum(key.startswith("gw/") for key in g.tensors)):
        gradients = {n: g[f"g{n}/{step}"] for n in names}
        engine.forward_backward(batch_of(torch.zeros(1, 3, 4, 4), **gradients), {})
        assert not engine.step(c["lr"], 0.0)
        momenta, values = buffers_of(engine), weights(engine)
        for n in names:
            close(values[n], g[f"{n}/{step + 1}"], 1e-6)
            close(momenta[n], g[f"mu_{n}/{step + 1}"].flatten(), 1e-7)
    engine.close()


@pytest.mark.parametrize("name", ENGINES)
def test_weight_decay_and_three_dimensions(name: str) -> None:
    """Decay is inside of the norm and of the scale, and no vector has either; against the formula in float64."""
    random = torch.Generator().manual_seed(5)
    shapes = {"a": (6, 5), "b": (7,), "c": (2, 3, 4), "d": (1, 9)}
    values = {n: torch.randn(shape, generator=random) for n, shape in shapes.items()}
    engine = engine_of(name, GivenGradients(values), {"name": "lars", "weight_decay": 0.3, "trust_coefficient": 0.02})
    expected = {n: v.double() for n, v in values.items()}
    momenta = {n: torch.zeros_like(v) for n, v in expected.items()}
    for lr in (0.7, 0.2, 0.4):
        gradients = {n: torch.randn(shape, generator=random) for n, shape in shapes.items()}
        engine.forward_backward(batch_of(torch.zeros(1, 3, 4, 4), **gradients), {})
        engine.step(lr, 0.0)
        for n, value in expected.items():
            update = gradients[n].double()
            if value.dim() > 1:
                update = update + 0.3 * value
                update = update * 0.02 * value.norm() / update.norm()
            momenta[n] = 0.9 * momenta[n] + update
            value -= lr * momenta[n]
    found = weights(engine)
    for n, value in expected.items():
        close(found[n], value.float(), 1e-6)
    engine.close()


@pytest.mark.parametrize("name", ENGINES)
def test_official_linear_probe_step_by_step(name: str) -> None:
    """The buffers of LARS and the statistics of BatchNorm after every step; rates, losses and weights: test_goldens."""
    g, t = golden.load("mae_linprobe_train_dev"), training_golden.linear_probe()
    engine = build(t, name)
    micro_steps = zip(t.batches, t.targets, strict=True)
    for step in range(len(t.lrs)):
        for batch, targets in islice(micro_steps, t.accumulation):
            engine.forward_backward(batch, targets)
        engine.step(lr_at_step(t.run.schedule, step, t.steps_per_epoch, len(t.lrs)), 0.0)
        momenta, values = buffers_of(engine), weights(engine)
        for part in ("weight", "bias"):
            close(momenta[f"head.1.{part}"], g[f"momentum/head.1.{part}"][step].flatten(), 1e-5)
            close(values[f"head.1.{part}"], g[f"history/head.1.{part}"][step + 1], 1e-5)
        for part in ("running_mean", "running_var"):
            close(values[f"head.0.{part}"], g[f"history/head.0.{part}"][step + 1], 1e-5)
        assert values["head.0.num_batches_tracked"] == g["history/head.0.num_batches_tracked"][step + 1]
    t.method.eval()
    state = {n: v for n, v in weights(engine).items() if n.startswith("head.")}
    t.method.head.load_state_dict({n.removeprefix("head."): v for n, v in state.items()})  # type: ignore[union-attr]
    close(t.method.features(g["images"]), g["features_eval"])  # type: ignore[operator]
    close(t.method.logits(g["images"]), g["logits_eval"])  # type: ignore[operator]
    engine.close()


@pytest.mark.parametrize("name", ENGINES)
def test_accumulation_as_in_the_official_program(name: str) -> None:
    """Its loop with accum_iter = 2, in plain torch on the stored features: each micro-batch has statistics of its own,
    and its loss is halved. No golden file of the probe accumulates."""
    g, t = golden.load("mae_linprobe_train_dev"), training_golden.linear_probe(accumulation=2)
    head = nn.Sequential(nn.BatchNorm1d(g.config["embed"], eps=1e-6, affine=False), nn.Linear(g.config["embed"], 10))
    head.load_state_dict({key: g[f"history/head.{key}"][0] for key in head.state_dict()})
    momenta = {key: torch.zeros_like(p) for key, p in head.named_parameters()}
    engine = build(t, name)
    pairs = zip(t.batches, g["features_per_microstep"], strict=True)
    for lr in (3.2, 6.4, 4.8, 1.6):
        head.zero_grad()
        for batch, features in islice(pairs, 2):
            engine.forward_backward(batch, {})
            (nn.functional.cross_entropy(head(features), batch.labels) / 2).backward()  # type: ignore[arg-type]
        engine.step(lr, 0.0)
        for key, p in head.named_parameters():
            assert p.grad is not None
            scale = 1e-3 * p.data.norm() / p.grad.norm() if p.dim() > 1 else 1.0
            momenta[key] = 0.9 * momenta[key] + scale * p.grad
            p.data -= lr * momenta[key]
        values, found = weights(engine), buffers_of(engine)
        for key, expected in head.state_dict().items():
            close(values[f"head.{key}"].float(), expected.float(), 1e-5)
        for key, expected in momenta.items():
            close(found[f"head.{key}"], expected.flatten(), 1e-5)
    engine.close()


@pytest.mark.parametrize("shape", [(10, 64), (3, 5, 7)])
def test_is_timms_with_its_two_groups(shape: tuple[int, ...]) -> None:
    """timm's default leaves the trust ratio out where there is no weight decay; a group of its own brings it back."""
    random = torch.Generator().manual_seed(3)
    weight, bias = torch.randn(shape, generator=random), torch.randn(10, generator=random)
    ours, theirs, plain = ([weight.clone(), bias.clone()] for _ in range(3))
    optimizers = [
        WholeParameterLars(ours, lr=6.4),
        timm.optim.Lars(
            [{"params": [theirs[0]], "always_adapt": True}, {"params": [theirs[1]], "always_adapt": False}],
            lr=6.4,
            momentum=0.9,
        ),
        timm.optim.Lars(plain, lr=6.4, momentum=0.9),
    ]
    for _ in range(10):
        gradients = [torch.randn(shape, generator=random), torch.randn(10, generator=random)]
        for tensors, optimizer in zip((ours, theirs, plain), optimizers, strict=True):
            for tensor, gradient in zip(tensors, gradients, strict=True):
                tensor.grad = gradient.clone()
            optimizer.step()
    for mine, timms in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, timms, rtol=1e-5, atol=1e-5)
    assert (plain[0] - ours[0]).norm() > ours[0].norm()
