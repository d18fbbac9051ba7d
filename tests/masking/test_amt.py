"""AMT's masks against the release's numbers, and what its table of importance promises."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mimscale import config
from mimscale.contracts import Batch, Masks, Targets
from mimscale.convert import mae_from_official, simmim_from_official
from mimscale.errors import UserError
from mimscale.masking.amt import AMT, UNKNOWN
from mimscale.masking.attention import attentive_order
from mimscale.methods.mae import MAE
from mimscale.methods.simmim import SimMIM
from mimscale.models.importance import importance_of
from mimscale.models.patches import assemble
from tests import golden
from tests.golden import Golden, batch_of, close, gradient_close, run_config

STUDENT = {"width": 32, "depth": 2, "heads": 2}
HALF = {"policy": "amt", "ratio": 0.45, "throw": 0.4, "warmup_epochs": 0}


class Given(AMT):
    """Draws by importance from outside: the goldens have it as floats, after the release's crop."""

    importance: Tensor

    def choose(self, batch: Batch, targets: Mapping[str, Targets]) -> Masks:
        return self.draw(self.importance, batch.noise["mask"])


def with_importance(method: Any, importance_BU: Tensor) -> None:
    run = method.masking.run_for_test
    policy = Given(method.config.masking, run, {})
    policy.importance = importance_BU
    method.masking = policy


def small(masking: dict[str, Any] | None = None, **sections: Any) -> MAE:
    torch.manual_seed(0)
    section = {"name": "mae", "masking": {**HALF, **(masking or {})}, "decoder_width": 32, "decoder_heads": 4}
    return MAE(run_config({**section, "decoder_depth": 1}, STUDENT, **sections), {})


def batch(method: MAE, first: int = 0, count: int = 4, whole: int = 1) -> Batch:
    """Positions first .. of an order in which sample = 3 * position % 10; the first of each 2 brings its whole image."""
    generator = torch.Generator().manual_seed(first)
    images = torch.randn(count, 3, 64, 64, generator=generator)
    noise = torch.empty(count, 16).exponential_(generator=generator)
    positions = torch.arange(first, first + count)
    rows = torch.nonzero(positions % 2 < whole).flatten()
    return replace(
        batch_of(images, mask=noise),
        ids=3 * positions % 10,
        positions=positions,
        whole=torch.randint(0, 256, (len(rows), 3, 64, 64), generator=generator, dtype=torch.uint8),
        whole_rows=rows,
    )


# ------------------------------------------------------------------------------------------------------------- goldens


def test_golden_mae() -> None:
    g = golden.load("amt_mae_dev")
    c = g.config
    run = golden.mae_run(c, {"masking": {**HALF, "ratio": c["mask_ratio"], "throw": c["throw_ratio"]}})
    method = golden.mae_method(run, mae_from_official(g.part("state")).weights)
    policy = Given(method.config.masking, run, {})
    policy.importance = g["patch_weights"]
    method.masking = policy
    batch = batch_of(g["image"], mask=g["exponential_noise"])

    masks = policy.choose(batch, {})
    assert torch.equal(attentive_order(g["patch_weights"], g["exponential_noise"]), g["ids_shuffle"])
    assert torch.equal(masks.masked.sort().values, g["ids_masked"].sort().values)
    assert torch.equal(masks.visible.sort().values, g["ids_visible"].sort().values)
    pred, raster, _ = method.predict(batch, {})
    assert torch.equal(raster.thrown(36), (g["mask_flag"] == -1).float())
    close(pred, g["pred"])
    loss = method(batch, {})["loss"]
    golden.loss_close(loss, g["loss"])
    loss.backward()
    stored = mae_from_official({**g.part("state"), **g.part("grad")}).weights
    named = mae_from_official({name: torch.zeros_like(t) for name, t in g.part("state").items()} | g.part("grad")).weights
    for name, parameter in method.named_parameters():
        if named[name].abs().sum() > 0:
            gradient_close(parameter.grad, stored[name])
    assert sum(float(t.abs().sum()) > 0 for t in named.values()) == len(g.part("grad"))
