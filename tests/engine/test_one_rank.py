"""The fast path `one_rank`: the bits of DeepSpeed's own way, with fewer copies."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mimscale.bench._operators import count_operators
from mimscale.config.deepspeed import load_ds_config
from mimscale.config.recipes import load_recipe
from mimscale.distributed.world import EMULATE_FP16, from_environment
from mimscale.engine.deepspeed_engine import DeepSpeedEngine

ACCUMULATION = 3


class Branches(nn.Module):
    """Learns with one of two layers, so that a step may leave parameters without a gradient."""

    averaged = ("layers",)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(24, 8) for _ in range(2))

    def forward(self, batch: tuple[Tensor, int], targets: Any) -> dict[str, Tensor]:
        x, which = batch
        layer = self.layers[which]
        assert isinstance(layer, nn.Linear)
        return {"loss": layer(x.to(layer.weight.dtype)).float().square().mean()}

    def no_weight_decay(self) -> frozenset[str]:
        return frozenset()

    @staticmethod
    def layer_of(name: str) -> int:
        return 0


def trained(ds_config: str, plain: str) -> tuple[dict[str, Tensor], list[float], int, str]:
    """Fragments after six steps, the norm of each, operators of the last, and what the engine says of its paths. The
    first uses both layers, the next ones one; the fourth has a NaN.
    """
    words = ["engine.device=cpu", f"engine.ds_config={ds_config}", f"engine.plain={plain}", "optim.clip=0"]
    config, world = load_recipe("mae_tiny", words), from_environment("cpu")
    engine = DeepSpeedEngine(
        Branches(), config, world, micro_batch=2, accumulation=ACCUMULATION, ds_config=load_ds_config(ds_config)
    )
    random = torch.Generator().manual_seed(1)
    norms = []

    def step(number: int) -> None:
        for micro in range(ACCUMULATION):
            x = torch.randn(2, 24, generator=random)
            x[0, 0] = math.nan if number == 3 else 1.0
            engine.forward_backward((x, micro % 2 if number == 0 else number % 2), {})  # type: ignore[arg-type]
        skipped = engine.step(1e-2, 0.0)
        assert skipped is (number == 3)
        norms.append(engine.gradient_norm())

    for number in range(5):
        step(number)
    _, operators = count_operators(lambda: step(5))
    fragments = {name: tensor.clone() for name, tensor in engine.fragments().items()}
    engine.close()
    return fragments, norms, operators, engine.notes[0]


@pytest.mark.parametrize("ds_config", ["cpu_zero1_fp32", "cpu_zero2_fp32", "cpu_zero2_bf16", "cpu_zero2_fp16"])
def test_gradients_are_those_of_deepspeeds_buckets(
    ds_config: str, process_group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(EMULATE_FP16, "1")
    ours, norms, operators, said = trained(ds_config, "[]")
    theirs, their_norms, more, twin = trained(ds_config, "[one_rank]")
    assert "one_rank" in said.partition("plain:")[0] and "one_rank (engine.plain)" in twin
    assert norms == pytest.approx(their_norms, rel=1e-6) and norms[3] == math.inf
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert operators < more
