"""`bench host`: operators and reads are counted as they are, recipes have a narrow form, engines keep to a limit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mimscale.bench import _narrow, _operators, host
from mimscale.config.recipes import load_recipe
from tests import ranks

LIMITS = {"cpu_zero2_bf16": 2.0, "cpu_zero3_fp32": 3.0}
"""Operators of a step over those of PyTorch by hand."""
ONE_OF_EACH = (
    "amt_mae_vit_b16",
    "amt_simmim_vit_b16",
    "convmae_b",
    "finetune_convmae_b",
    "finetune_simmim_vit_b16",
    "maskalign_clip_dinov2_vit_b16",
    "mff_vit_b16",
    "mrmae_convmae_b",
    "pixmim_attention_vit_b16",
    "simmim_vit_b16",
)


def test_operators_are_counted_by_phase() -> None:
    a = torch.ones(3, requires_grad=True)
    with _operators.counting("forward") as counter:
        loss = (a * 2).sum()
        counter.phase = "backward"
        loss.backward()
    assert counter.operators["forward"] == 2 and counter.names["forward", "aten::mul"] == 1
    assert counter.operators["backward"] >= 2 and not counter.reads


@pytest.mark.parametrize(
    "read",
    [float, bool, torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.numpy, torch.nonzero],
)
def test_each_way_to_read_a_value_is_seen(read: Any) -> None:
    with _operators.counting() as counter:
        read(torch.ones(1))
    assert counter.reads.total() >= 1 and all("test_host.py" in place for place in counter.reads)


def test_the_optimisers_own_counter_is_no_read() -> None:
    parameter = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.AdamW([parameter], foreach=False)
    parameter.sum().backward()
    with _operators.counting() as counter:
        optimizer.step()
    assert counter.operators["step"] > 5 and not counter.reads


@pytest.mark.parametrize("recipe", ONE_OF_EACH)
def test_a_narrow_recipe_keeps_its_structure(recipe: str) -> None:
    whole = load_recipe(recipe)
    narrow = _narrow.narrow(whole, batch=2)
    assert narrow.student.depth == whole.student.depth and narrow.student.width == 32
    assert list(narrow.teachers) == list(whole.teachers) and narrow.method.name == whole.method.name


@pytest.mark.multi
def test_operators_of_each_engine_keep_to_their_limit(tmp_path: Path) -> None:
    """Counts only. One process has both, on the same weights and images: their losses agree."""
    file = tmp_path / "host.json"
    words = ["--eager", "--rounds", "1", "--steps", "1", "--ds-config", *LIMITS, "--out", str(file)]
    printed = ranks.run(1, "mimscale", "bench", "host", "mae_vit_l16", *words).stdout
    values = json.loads(file.read_text())
    rows = {row["case"]: row for row in values["rows"]}
    ratios = {row["engine"]: row["operators_ratio"] for row in values["rows"]}
    assert rows["PyTorch by hand, fp32"]["operators_ratio"] == 1 and not rows["PyTorch by hand, fp32"]["reads"]
    assert {name: ratio for name, ratio in ratios.items() if ratio > LIMITS.get(name, 2.0)} == {}
    losses = [row["loss"] for row in values["rows"]]
    assert max(losses) - min(losses) < 0.02 * max(losses)
    assert "| PyTorch by hand, fp32 |" in printed and set(values["host"]) > {
        "kernel_s",
        "parameter_s",
        "zero3_parameter_s",
    }


@pytest.mark.multi
def test_a_method_with_teachers_is_measured(tmp_path: Path) -> None:
    file = tmp_path / "host.json"
    words = ["--eager", "--rounds", "1", "--steps", "1", "--ds-config", "cpu_zero2_fp32", "--out", str(file)]
    ranks.run(1, "mimscale", "bench", "host", "mrmae_convmae_tiny", *words)
    by_hand, *_, ours = json.loads(file.read_text())["rows"]
    assert ours["loss"] == pytest.approx(by_hand["loss"], rel=1e-4) and ours["parameters"] == by_hand["parameters"]


def test_compiled_twins_follow_the_eager_ones() -> None:
    cases = host.make_cases(["cpu_zero3_fp32"], compiled=True)
    assert [case.compiled for case in cases] == sorted(case.compiled for case in cases)
    assert not any(case.compiled and case.engine == "cpu_zero3_fp32" for case in cases)
