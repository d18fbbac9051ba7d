"""The linear probe with LARS: one curve, one head, one set of statistics for any engine, stage and number of ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests import ranks

pytestmark = [pytest.mark.multi, pytest.mark.slow]
STEPS, CUT = 8, 4
TORCH = ["engine.backend=torch", "engine.ds_config=cpu_zero2_fp32"]
STAGES = {f"zero{stage}": [f"engine.ds_config=cpu_zero{stage}_fp32"] for stage in range(4)}


def train_all(count: int, recipe: Path, runs: dict[str, Path]) -> None:
    """name of an engine -> run folder."""
    listed = next(iter(runs.values())).parent / f"{count}.json"
    engines = {"torch": TORCH, **STAGES}
    words = [[str(recipe), *engines[name], "--run-dir", str(folder)] for name, folder in runs.items()]
    listed.write_text(json.dumps(words))
    done = ranks.run(count, "tests.training.several", listed)
    assert "untested" not in done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("probe")


@pytest.fixture(scope="module")
def recipe(folder: Path, shards: Path) -> Path:
    return ranks.recipe(
        folder,
        shards,
        "linear_probe",
        data={"workers": 0},
        student={"drop_path": 0.0},
        method={"classes": 4, "norm_batch": 8},
        optim={"name": "lars", "weight_decay": 1e-4},
        schedule={"steps": STEPS, "base_lr": 0.4, "min_lr": 0.0},
        checkpoint={"every": CUT},
    )


@pytest.fixture(scope="module")
def runs(folder: Path, recipe: Path) -> dict[int, dict[str, Path]]:
    """Ranks -> engine -> run folder."""
    done = {
        count: {name: folder / f"{name} on {count}" for name in names}
        for count, names in {1: ("zero0", "torch"), 2: ("torch", *STAGES), 4: ("zero2",)}.items()
    }
    for count, of_count in done.items():
        train_all(count, recipe, of_count)
    return done


def test_ranks_and_engines_change_nothing(runs: dict[int, dict[str, Path]]) -> None:
    reference = runs[1]["torch"]
    curve, expected = list(ranks.curve(reference).values()), ranks.tensors(reference)
    assert len(curve) == STEPS and curve[-1] < curve[0]
    assert set(expected) > {"fp32|head.1.weight", "momentum_buffer|head.1.bias", "buffer|head.0.running_var"}
    assert int(expected["buffer|head.0.num_batches_tracked"]) == STEPS * 2
    for of_count in runs.values():
        for run_dir in of_count.values():
            assert list(ranks.curve(run_dir).values()) == pytest.approx(curve, abs=1e-5), run_dir.name
            found = ranks.tensors(run_dir)
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=f"{run_dir.name}: {key}")


def test_a_resume_is_exact(recipe: Path, runs: dict[int, dict[str, Path]], folder: Path) -> None:
    again = {name: folder / f"{name} again" for name in ("zero0", "zero2", "zero3")}
    for name, run_dir in again.items():
        ranks.cut_back(runs[2][name], run_dir, CUT)
    train_all(2, recipe, again)
    for name, run_dir in again.items():
        assert ranks.identical(run_dir, runs[2][name]), name
