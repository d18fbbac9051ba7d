"""Parameter groups and the learning-rate curve against the official programs'."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mimscale.errors import UserError
from mimscale.methods.finetune import Finetune
from mimscale.models.layer_order import convvit_layer_of, vit_layer_of
from mimscale.optim.lr_schedule import cosine_at_step, cosine_with_warmup
from mimscale.optim.param_groups import parameter_groups
from tests import golden

CURVES = ("pretrain", "finetune", "linprobe", "tiny")


def by_name(groups: list[dict]) -> dict[str, list[float]]:
    return {name: [group["lr_scale"], group["weight_decay"]] for group in groups for name in group["names"]}


def test_golden_groups_of_a_plain_vit() -> None:
    stored = golden.load_json("schedules_dev.json")["vit_finetune_groups"]
    run = golden.run_config(
        {"name": "finetune", "classes": 10}, {"width": 32, "depth": stored["depth"], "heads": 2}, 32
    )
    method = Finetune(run, {})
    groups = parameter_groups(
        method,
        weight_decay=stored["weight_decay"],
        layer_decay=stored["layer_decay"],
        no_weight_decay=method.no_weight_decay(),
        layer_of=method.layer_of,
    )
    ours = {name.removeprefix("student."): values for name, values in by_name(groups).items()}
    assert ours.keys() == stored["name_to_lrscale_wd"].keys()
    for name, values in stored["name_to_lrscale_wd"].items():
        golden.rates_close(ours[name], values)
    named = dict(method.named_parameters())
    assert all(named[n] is p for g in groups for n, p in zip(g["names"], g["params"], strict=True))
    assert vit_layer_of("mask_token", 4) == 0


def test_golden_groups_of_convmae() -> None:
    stored = golden.load_json("schedules_dev.json")["convvit_finetune_groups"]
    names = stored["name_to_lrscale_wd"]
    parameters = [
        (n, torch.zeros(1 if n.endswith(".bias") or "norm" in n else (2, 2), requires_grad=True)) for n in names
    ]
    groups = parameter_groups(
        parameters,
        weight_decay=stored["weight_decay"],
        layer_decay=stored["layer_decay"],
        no_weight_decay={"pos_embed"},
        layer_of=lambda name: convvit_layer_of(name, stored["depth"][2]),
    )
    ours = by_name(groups)
    assert ours.keys() == names.keys()
    for name, values in names.items():
        golden.rates_close(ours[name], values)


def test_shape_of_a_sharded_parameter_decides() -> None:
    """Under ZeRO-3 every parameter is empty and carries its shape."""
    sharded = nn.Parameter(torch.empty(0))
    sharded.ds_shape = torch.Size([4, 4])  # type: ignore[attr-defined]
    frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)
    groups = parameter_groups([("a.weight", sharded), ("b.weight", frozen)], weight_decay=0.05)
    assert by_name(groups) == {"a.weight": [1.0, 0.05]}


def test_layer_decay_needs_a_layer_order() -> None:
    with pytest.raises(UserError, match="layer_decay = 0.5"):
        parameter_groups(nn.Linear(2, 2), weight_decay=0, layer_decay=0.5)


def test_golden_curve_maskalign() -> None:
    c = golden.load_json("schedules_dev.json")["lr_schedule"]
    values = {"peak": c["peak_lr"], "min_lr": c["min_lr"], "warmup_epochs": c["warmup_epochs"], "epochs": c["epochs"]}
    epochs, stored = zip(*c["epoch_lr"], strict=True)
    golden.rates_close([cosine_with_warmup(epoch, **values) for epoch in epochs], list(stored))


@pytest.mark.parametrize("curve", CURVES)
def test_golden_curve_mae(curve: str) -> None:
    g = golden.load("mae_lr_schedule")
    peak, low, warmup, epochs, steps = g[f"{curve}/params_lr_min_warmup_epochs_steps"].tolist()
    values = {"peak": peak, "min_lr": low, "warmup_epochs": warmup, "epochs": epochs}
    at, stored = g[f"{curve}/epoch"].tolist(), g[f"{curve}/lr"].tolist()
    golden.rates_close([cosine_with_warmup(epoch, **values) for epoch in at], stored)
    scaled = [cosine_with_warmup(epoch, **values) * 0.65**3 for epoch in at]
    golden.rates_close(scaled, g[f"{curve}/lr_scaled_0.65^3"].tolist())
    golden.rates_close([cosine_at_step(round(epoch * steps), steps, **values) for epoch in at], stored)


def test_ends_of_the_curve() -> None:
    values = {"peak": 2.0, "min_lr": 0.5, "epochs": 10.0}
    assert cosine_at_step(0, 5, warmup_epochs=1, **values) == 0
    assert cosine_at_step(0, 5, warmup_epochs=0, **values) == 2
    assert cosine_at_step(50, 5, warmup_epochs=1, **values) == cosine_at_step(90, 5, warmup_epochs=1, **values) == 0.5
    assert cosine_at_step(60, 5, warmup_epochs=10, **values) == 2
