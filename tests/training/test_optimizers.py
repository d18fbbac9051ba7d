"""An optimiser that is not AdamW: the same curve in both engines and at every ZeRO stage, saved and gone on with.

A run may also go on under the other engine.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mimscale.checkpoint import format as checkpoint
from tests import ranks

pytestmark = [pytest.mark.multi, pytest.mark.slow]
STEPS, CUT = 8, 4
ENGINES = {
    "torch": ["engine.backend=torch", "engine.ds_config=cpu_zero2_fp32"],
    **{f"zero{stage}": [f"engine.ds_config=cpu_zero{stage}_fp32"] for stage in range(4)},
}
NEXT = {"torch": "zero0", "zero0": "zero1", "zero1": "zero2", "zero2": "zero3", "zero3": "torch"}
Runs = dict[str, Path]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    return ranks.recipe(
        tmp_path_factory.mktemp("sgd"),
        shards,
        data={"workers": 0},
        optim={"name": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "clip": 0.5},
        schedule={"steps": STEPS, "base_lr": 3.2},
        checkpoint={"every": CUT},
    )


def train_all(count: int, recipe: Path, runs: Runs) -> None:
    """name of the engine -> run folder."""
    listed = next(iter(runs.values())).parent / "runs.json"
    words = [[str(recipe), *ENGINES[name], "--run-dir", str(folder)] for name, folder in runs.items()]
    listed.write_text(json.dumps(words))
    ranks.run(count, "tests.training.several", listed)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Runs:
    """Two ranks, never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    runs = {name: folder / name for name in ENGINES}
    train_all(2, recipe, runs)
    return runs


def test_one_curve(whole: Runs) -> None:
    expected = list(ranks.curve(whole["torch"]).values())
    assert len(expected) == STEPS and expected[-1] < expected[0] - 0.1
    for name, run_dir in whole.items():
        assert list(ranks.curve(run_dir).values()) == pytest.approx(expected, abs=1e-6), name


def test_a_checkpoint_holds_this_optimisers_state(whole: Runs) -> None:
    for name, run_dir in whole.items():
        path = checkpoint.newest(run_dir)
        assert path is not None
        reader = checkpoint.CheckpointReader(path)
        assert reader.kinds() == ["buffer", "fp32", "momentum_buffer"], name
        assert sorted(reader.names("momentum_buffer")) == sorted(reader.names("fp32"))
        assert all(reader.full("momentum_buffer", parameter).any() for parameter in reader.names("fp32"))
        assert reader.meta["engine"]["optimizer_step"] == STEPS


def test_goes_on_with_one_rank_at_another_stage_and_under_the_other_engine(
    recipe: Path, whole: Runs, tmp_path: Path
) -> None:
    runs = {}
    for before, after in NEXT.items():
        runs[after] = tmp_path / f"{before} {after}"
        ranks.cut_back(whole[before], runs[after], CUT)
    train_all(1, recipe, runs)
    expected = list(ranks.curve(whole["torch"]).values())
    for name, run_dir in runs.items():
        assert list(ranks.curve(run_dir).values()) == pytest.approx(expected, abs=1e-6), name
        assert ranks.difference(run_dir, whole["torch"]) < 1e-5, name
        ours, theirs = ranks.tensors(run_dir), ranks.tensors(whole["torch"])
        for key in ours:
            assert float((ours[key] - theirs[key]).abs().max()) < 1e-5, f"{name}: {key}"
