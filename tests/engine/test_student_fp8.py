"""The student's linears in fp8, emulated on a CPU: near bf16, the same parameters, refused where there is none."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from mimscale.config.recipes import load_recipe
from mimscale.config.run import method_class
from mimscale.engine import compile, student_fp8
from mimscale.errors import UserError
from mimscale.models.vit import Linear
from mimscale.teachers import quantise
from mimscale.teachers.quantise import unavailable
from tests import ranks
from tests.engine.test_compile import train

pytestmark = [
    pytest.mark.skipif(bool(quantise.unavailable()), reason="torchao does not fit this torch"),
    pytest.mark.usefixtures("process_group"),
]
BF16 = "engine.ds_config=cpu_zero2_bf16"


def rounded(rows: Tensor, dim: int) -> Tensor:
    """To e4m3 with the largest power of two as scale that keeps each row (`dim` reduced) below 448; in float64."""
    values = rows.double()
    scale = 2.0 ** torch.floor(torch.log2(448 / values.abs().amax(dim, keepdim=True)))
    return (values * scale).float().to(torch.float8_e4m3fn).double() / scale


def test_two_products_are_of_fp8_and_the_weights_gradient_is_not() -> None:
    """Against the definition, in float64; without rounding all three differ by more."""
    torch.manual_seed(0)
    layer: Any = Linear(32, 48).bfloat16()
    layer.__class__ = student_fp8._fp8_class(Linear, True)
    x = torch.randn(64, 32, dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn(64, 48, dtype=torch.bfloat16)
    out = layer(x)
    out.backward(gradient)
    weight, bias = layer.weight.detach(), layer.bias.detach().double()
    exact = {
        "out": rounded(x.detach(), 1) @ rounded(weight, 1).t() + bias,
        "input": rounded(gradient, 1) @ rounded(weight.flatten(), 0).view_as(weight),
        "weight": gradient.double().t() @ x.detach().double(),
    }
    plain = {
        "out": x.detach().double() @ weight.double().t() + bias,
        "input": gradient.double() @ weight.double(),
        "weight": exact["weight"],
    }
    assert x.grad is not None and layer.weight.grad is not None
    for name, ours in {"out": out.detach(), "input": x.grad, "weight": layer.weight.grad}.items():
        error, unrounded = ((ours.double() - each[name]).norm() / each[name].norm() for each in (exact, plain))
        assert error < 5e-3, f"{name}: {error}"
        assert name == "weight" or unrounded > 2e-2, f"{name}: {unrounded}"


@pytest.mark.parametrize(
    ("method", "backend"), [("mae", "deepspeed"), ("mae", "torch"), ("simmim", "deepspeed"), ("convmae", "deepspeed")]
)
def test_losses_stay_near_bf16(method: str, backend: str, tmp_path: Path) -> None:
    recipe = ranks.recipe(tmp_path, tmp_path, method)
    overrides = (BF16, f"engine.backend={backend}")
    bf16, *_ = train(recipe, *overrides, steps=6)
    fp8, _, notes = train(recipe, *overrides, "engine.student_fp8=true", steps=6)
    assert fp8 != bf16 and fp8 == pytest.approx(bf16, rel=5e-2)
    note = next(line for line in notes if line.startswith("student_fp8"))
    assert "emulated on a CPU" in note and not note.startswith("student_fp8: 0 of")


def test_it_is_compiled_without_breaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    recipe = ranks.recipe(tmp_path, tmp_path)
    eager, *_ = train(recipe, BF16, "engine.student_fp8=true")
    losses, graphs, _ = train(recipe, BF16, "engine.student_fp8=true", "engine.compile=blocks")
    assert losses == pytest.approx(eager, rel=2e-2)
    assert graphs[0] > 0 and graphs == [graphs[0]] * 5 and not counters["graph_break"]


def test_parameters_and_their_names_stay(tmp_path: Path) -> None:
    run = load_recipe(str(ranks.recipe(tmp_path, tmp_path, "simmim")))
    method = method_class("simmim")(run, {})
    before = dict(method.named_parameters())
    note = student_fp8.use_fp8(method, torch.device("cpu"))
    after = dict(method.named_parameters())
    assert note.startswith("student_fp8: 12 of 12 linear layers")
    assert list(before) == list(after) and all(before[name] is after[name] for name in before)
    assert not any(type(m).__name__.startswith("Fp8") for n, m in method.named_modules() if "blocks" not in n)


@pytest.mark.parametrize(
    ("ds_config", "line"),
    [
        ("cpu_zero2_fp32", "engine.student_fp8 = true with engine.ds_config in fp32: fp8 products have bf16 results"),
        ("cpu_zero2_fp16", "engine.student_fp8 = true with engine.ds_config in fp16"),
        ("cpu_zero3_bf16", "engine.student_fp8 = true with ZeRO-3: the backward pass would keep every gathered weight"),
    ],
)
def test_refused_with_one_line(ds_config: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)  # the refusal does not wait for its import
    unavailable.cache_clear()
    with pytest.raises(UserError, match=line) as error:
        train(ranks.recipe(tmp_path, tmp_path), f"engine.ds_config={ds_config}", "engine.student_fp8=true")
    assert "\n" not in str(error.value) and not unavailable.cache_info().currsize
