"""A run that goes on with other numbers of ranks, ZeRO stages and precisions is the run that never stopped."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests import ranks

pytestmark = [pytest.mark.multi, pytest.mark.slow]
STEPS, EVERY = 8, 2
CHAIN = ((4, 1, 4, 1), (2, 2, 8, 1), (1, 3, 8, 2), (4, 2, 4, 1))  # ranks, ZeRO stage, micro-batch, accumulation
SECTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "finetune": {"method": {"classes": 4, "head_std": 0.02}, "optim": {"layer_decay": 0.7}},
    "amt": {},
}


def train_all(count: int, *runs: tuple[Path, str, Path]) -> subprocess.CompletedProcess[str]:
    """Runs (recipe, ds_config, folder) one after another in the same processes."""
    listed = runs[0][2].with_suffix(".json")
    words = [[str(recipe), f"engine.ds_config=cpu_{config}", "--run-dir", str(run)] for recipe, config, run in runs]
    listed.write_text(json.dumps(words))
    return ranks.run(count, "tests.training.several", listed)


def test_four_two_one_four_ranks(shards: Path, tmp_path: Path) -> None:
    """With drop path, layer decay and AMT's table; fp16 goes on in bf16. The batch is solved anew each time."""
    common: dict[str, dict[str, Any]] = {
        "data": {"workers": 0},
        "schedule": {"steps": STEPS},
        "checkpoint": {"every": EVERY},
    }
    recipes = {}
    for method, sections in SECTIONS.items():
        (tmp_path / method).mkdir()
        recipes[method] = ranks.recipe(tmp_path / method, shards, method, **{**common, **sections})
    whole = {method: tmp_path / f"{method}-whole" for method in recipes}
    half, on = tmp_path / "fp16", tmp_path / "bf16"

    for turn, (count, stage, micro, accumulation) in enumerate(CHAIN):
        runs = [(recipe, f"zero{stage}_fp32", tmp_path / f"{method}-{turn}") for method, recipe in recipes.items()]
        if turn:
            for method in recipes:
                ranks.cut_back(tmp_path / f"{method}-{turn - 1}", tmp_path / f"{method}-{turn}", EVERY * turn)
        if turn == 1:
            runs += [(recipe, "zero2_fp32", whole[method]) for method, recipe in recipes.items()]
            runs.append((recipes["finetune"], "zero2_fp16", half))
        if turn == 2:
            ranks.cut_back(half, on, EVERY)
            runs.append((recipes["finetune"], "zero3_bf16", on))
        done = train_all(count, *runs)
        batch = f"global batch 16 = micro-batch {micro} x accumulation {accumulation} x ranks {count},"
        assert batch in done.stdout + done.stderr

    for method in recipes:
        last = tmp_path / f"{method}-{len(CHAIN) - 1}"
        launches = [json.loads(line) for line in (last / "launches.jsonl").read_text().splitlines()]
        assert [(launch["ranks"], launch["step"]) for launch in launches] == [
            (count, EVERY * turn) for turn, (count, *_) in enumerate(CHAIN)
        ]
        assert list(ranks.curve(last).values()) == pytest.approx(list(ranks.curve(whole[method]).values()), abs=1e-6)
        assert ranks.difference(last, whole[method]) < 1e-4
    ours, theirs = (ranks.tensors(run)["table|masking"].int() for run in (last, whole["amt"]))
    assert (ours - theirs).abs().max() <= 1  # rounding may tip a byte over

    before, after = ranks.curve(half), ranks.curve(on)
    assert [after[step] for step in (1, 2)] == [before[step] for step in (1, 2)]
    assert list(after.values()) == pytest.approx(list(before.values()), abs=0.02)
    assert ranks.meta(on)["engine"]["optimizer_step"] == STEPS
