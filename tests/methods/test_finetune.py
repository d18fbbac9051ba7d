"""Supervised classification against the official fine-tuning model's numbers."""

from __future__ import annotations

import pytest
import torch

from mimscale.convert.formats.finetune import from_official
from mimscale.errors import UserError
from mimscale.methods.finetune import Finetune
from tests import golden
from tests.golden import batch_of, close, gradient_close, run_config

TINY = {"width": 32, "depth": 2, "heads": 2}


@pytest.mark.parametrize(("name", "pool"), [("gap", "mean"), ("cls", "cls")])
def test_golden(name: str, pool: str) -> None:
    g = golden.load("ft_head_dev")
    c = g.config
    run = run_config(
        {"name": "finetune", "classes": c["classes"], "pool": pool, "label_smoothing": 0},
        {"width": c["embed"], "depth": c["depth"], "heads": c["heads"]},
        c["img"],
    )
    method = Finetune(run, {})
    method.load_state_dict(from_official(g.part(f"state_{name}")).weights)
    close(method.features(g["image"]), g[f"{name}/feature"])
    close(method.head(method.features(g["image"])), g[f"{name}/logits"])
    batch = batch_of(g["image"])
    batch.labels.copy_(g["label"])  # type: ignore[union-attr]
    out = method(batch, {})
    golden.loss_close(out["loss"], g[f"{name}/loss"])
    assert out["top1"] == (g[f"{name}/logits"].argmax(1) == g["label"]).float().mean()
    out["loss"].backward()
    ours = {parameter: p.grad for parameter, p in method.named_parameters()}
    for parameter, gradient in from_official(g.part(f"{name}/grad")).weights.items():
        gradient_close(ours[parameter], gradient)
    golden.every_parameter_has_a_gradient(method)


def test_label_smoothing_and_head() -> None:
    method = Finetune(run_config({"name": "finetune", "classes": 5, "head_std": 1e-3}, TINY), {})
    assert 5e-4 < method.head.weight.std() < 2e-3 and not method.head.bias.any()
    batch = batch_of(torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    logits = method.head(method.features(batch.images)).detach()
    expected = torch.nn.functional.cross_entropy(logits, batch.labels, label_smoothing=0.1)  # type: ignore[arg-type]
    torch.testing.assert_close(method(batch, {})["loss"], expected)
    assert method.needs.labels and not method.needs.noise and not method.needs.teachers


def test_refuses_two_kinds_of_encoder() -> None:
    with pytest.raises(UserError, match="method.stages and method.beit are two kinds of encoder; set one"):
        Finetune(run_config({"name": "finetune", "classes": 5, "beit": {}, "stages": {}}, TINY), {})


def test_refuses_a_teacher() -> None:
    from tests.methods.test_maskalign import INFO

    with pytest.raises(UserError, match="uses no teacher"):
        Finetune(run_config({"name": "finetune", "classes": 5}, TINY), {"t": INFO})
    with pytest.raises(UserError, match="method.classes is missing"):
        run_config({"name": "finetune"}, TINY)


@pytest.mark.parametrize("classes", [4, 6, 20])
def test_a_data_set_with_other_classes_is_refused(classes: int) -> None:
    run = run_config({"name": "finetune", "classes": 5}, TINY)
    Finetune.check_classes(run, 5)
    with pytest.raises(
        UserError, match=rf"method.classes = 5, but .* has {classes} classes; set method.classes={classes}"
    ):
        Finetune.check_classes(run, classes)
