"""MAE's linear probe against the official numbers, and its statistics over groups of images."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mimscale.convert.formats.finetune import from_official
from mimscale.errors import UserError
from mimscale.methods.linear_probe import LinearProbe
from mimscale.models.probe_head import GroupedBatchNorm, group_statistics
from tests import golden
from tests.golden import batch_of, close, gradient_close, run_config

TINY = {"width": 32, "depth": 2, "heads": 2}
FP32 = {"engine": {"ds_config": "cpu_zero0_fp32"}}


def probe(section: dict[str, Any] | None = None, batch: int = 8, **sections: Any) -> LinearProbe:
    schedule = {"global_batch": batch, "steps": 4, "base_lr": 1e-3}
    values = {"name": "linear_probe", "classes": 5, **(section or {})}
    return LinearProbe(run_config(values, TINY, 32, **{**FP32, "schedule": schedule, **sections}), {})


def test_golden() -> None:
    g = golden.load("ft_head_dev")
    c = g.config
    schedule = {"global_batch": len(g["image"]), "steps": 4, "base_lr": 1e-3}
    section = {"name": "linear_probe", "classes": c["classes"], "pool": "cls"}
    student = {"width": c["embed"], "depth": c["depth"], "heads": c["heads"], "patch": c["patch"]}
    method = LinearProbe(run_config(section, student, c["img"], **FP32, schedule=schedule), {})
    state = dict(from_official(g.part("state_cls")).weights)
    layer = {f"head.1.{part}": state.pop(f"head.{part}") for part in ("weight", "bias")}
    statistics = {name: t for name, t in method.state_dict().items() if name.startswith("head.0.")}
    method.load_state_dict({**state, **layer, **statistics})
    batch = batch_of(g["image"])
    batch.labels.copy_(g["label"])  # type: ignore[union-attr]
    features = method.features(batch.images)
    close(features, g["cls/feature"])
    out = method(batch, {})
    golden.loss_close(out["loss"].detach(), g["lp/loss_train"])
    out["loss"].backward()
    for name in ("head.1.weight", "head.1.bias"):
        gradient_close(method.get_parameter(name).grad, g[f"lp/grad/{name}"])
    close(method.head[0].running_mean, g["lp/bn_running_mean"])  # type: ignore[arg-type]
    close(method.head[0].running_var, g["lp/bn_running_var"])  # type: ignore[arg-type]
    method.eval()
    close(method.logits(batch.images), g["lp/logits_eval"])
    method.train()
    close(method.classify(features, batch.positions), g["lp/logits_train"])


def test_golden_mean() -> None:
    """The frozen norm after the mean is the checkpoint's, where it has one."""
    g = golden.load("ft_head_dev")
    c = g.config
    section = {"name": "linear_probe", "classes": c["classes"], "pool": "mean"}
    student = {"width": c["embed"], "depth": c["depth"], "heads": c["heads"], "patch": c["patch"]}
    method = LinearProbe(run_config(section, student, c["img"], **FP32), {})
    state = {n: t for n, t in from_official(g.part("state_gap")).weights.items() if not n.startswith("head.")}
    method.load_state_dict({**method.state_dict(), **state})
    close(method.features(g["image"]), g["gap/feature"])


def test_only_the_layer_is_trained_and_the_encoder_is_kept_with_it() -> None:
    method = probe({"pool": "mean"})
    assert [name for name, _ in method.named_parameters()] == ["head.1.weight", "head.1.bias"]
    kept = {name.split(".")[0] for name, _ in method.named_buffers()}
    assert kept == {"student", "fc_norm", "head"}
    assert 0.005 < method.head[1].weight.std() < 0.02 and not method.head[1].bias.any()  # type: ignore[operator]
    method(batch_of(torch.randn(8, 3, 32, 32)), {})["loss"].backward()
    golden.every_parameter_has_a_gradient(method)


def test_one_group_is_torchs_batch_norm() -> None:
    ours, theirs = GroupedBatchNorm(16), torch.nn.BatchNorm1d(16, eps=1e-6, affine=False)
    for _ in range(3):
        x = torch.randn(12, 16) * 3 + 5
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)


def test_groups_are_normalised_and_followed_one_after_the_other() -> None:
    together, apart = GroupedBatchNorm(16), GroupedBatchNorm(16)
    x = torch.randn(24, 16) + torch.arange(24)[:, None]
    group = torch.arange(24) // 8
    torch.testing.assert_close(together(x, group, 3), torch.cat([apart(part) for part in x.split(8)]))
    for name, value in apart.state_dict().items():
        torch.testing.assert_close(together.state_dict()[name], value)


def test_what_is_not_finite_leaves_the_statistics_alone() -> None:
    norm = GroupedBatchNorm(4)
    norm(torch.full((6, 4), torch.nan))
    assert int(norm.num_batches_tracked) == 0 and not norm.running_mean.any()
    mean, variance, count = group_statistics(torch.ones(3, 4), torch.tensor([0, 0, 1]), 2)
    assert torch.equal(mean, torch.ones(2, 4)) and not variance.any() and count.flatten().tolist() == [2, 1]


@pytest.mark.parametrize("micro", [4, 8, 16])
def test_the_micro_batch_changes_nothing(micro: int) -> None:
    """Groups of 4 images in a global batch of 16, whole or in pieces."""
    method = probe({"norm_batch": 4}, batch=16)
    features, positions = torch.randn(16, 32, generator=torch.Generator().manual_seed(1)), torch.arange(32, 48)
    whole = torch.cat(
        [method.classify(f, p) for f, p in zip(features.split(micro), positions.split(micro), strict=True)]
    )
    other = probe({"norm_batch": 4}, batch=16)
    other.head[1].load_state_dict(method.head[1].state_dict())
    expected = torch.cat([other.head(part) for part in features.split(4)])
    torch.testing.assert_close(whole, expected)
    torch.testing.assert_close(method.head.state_dict(), other.head.state_dict())


@pytest.mark.parametrize(
    ("section", "sections", "message"),
    [
        ({}, {"engine": {"ds_config": "zero2_bf16"}}, "engine.ds_config = zero2_bf16: linear_probe trains its head"),
        ({}, {"ema": {}}, "ema averages the student"),
        ({"norm_batch": 3}, {}, "method.norm_batch = 3 does not divide schedule.global_batch = 8"),
        ({"beit": {}, "stages": {}}, {}, "two kinds of encoder"),
    ],
)
def test_refusals(section: dict[str, Any], sections: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        probe(section, **sections)


def test_a_forward_pass_holds_whole_groups() -> None:
    run = run_config(
        {"name": "linear_probe", "classes": 5, "norm_batch": 8},
        TINY,
        32,
        **FP32,
        schedule={"global_batch": 32, "steps": 4, "base_lr": 1e-3},
    )
    LinearProbe.check_batch(run, 16)
    with pytest.raises(UserError, match="method.norm_batch = 8: all ranks together pass 12 images at a time"):
        LinearProbe.check_batch(run, 12)
