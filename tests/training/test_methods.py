"""Every method in the real trainer: one loss curve under ZeRO 0, 2 and 3, resume to the bit, no idle parameter.

A method joins by a row in tests/ranks.py. All runs share two starts of two processes.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import ranks

pytestmark = [pytest.mark.multi, pytest.mark.slow]
METHODS, STAGES, STEPS, CUT = sorted(ranks.METHODS), (0, 2, 3), 8, 4
CHANGES = {  # what must not change a number: one stage of a method has it, the others have not
    ("maskalign", 3): ["teachers.tiny.shard=true"],
    ("mrmae", 2): ["teachers.tiny.shard=true"],
    ("mrmae", 0): ["engine.teachers_ahead=true"],
    ("maskalign", 2): ["engine.teachers_ahead=true"],
}
Runs = dict[tuple[str, int], Path]


def train_all(recipes: dict[str, Path], runs: Runs) -> None:
    """Each run to its last step, resuming what its folder holds."""
    words = [
        [
            str(recipes[method]),
            f"engine.ds_config=cpu_zero{stage}_fp32",
            *CHANGES.get((method, stage), []),
            "--run-dir",
            str(run_dir),
        ]
        for (method, stage), run_dir in runs.items()
    ]
    listed = next(iter(runs.values())).parent / "runs.json"
    listed.write_text(json.dumps(words))
    ranks.run(2, "tests.training.several", listed)


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> dict[str, Path]:
    sections = {"data": {"workers": 0}, "schedule": {"steps": STEPS}, "checkpoint": {"every": CUT}}
    return {m: ranks.recipe(tmp_path_factory.mktemp(m), shards, m, **sections) for m in METHODS}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, recipes: dict[str, Path]) -> Runs:
    """Runs that never stopped; drop path is on in all of them."""
    folder = tmp_path_factory.mktemp("whole")
    runs = {(m, stage): folder / f"{m}-{stage}" for m in METHODS for stage in STAGES}
    train_all(recipes, runs)
    return runs


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory, recipes: dict[str, Path], whole: Runs) -> Runs:
    """The same runs, gone on with from their middle by new processes."""
    folder = tmp_path_factory.mktemp("resumed")
    runs = {key: folder / run_dir.name for key, run_dir in whole.items()}
    for key, run_dir in runs.items():
        ranks.cut_back(whole[key], run_dir, CUT)
        (run_dir / "metrics.jsonl").unlink()
    train_all(recipes, runs)
    return runs


@pytest.mark.parametrize("method", METHODS)
def test_loss_curve_is_the_same_at_every_stage(method: str, whole: Runs) -> None:
    zero0, zero2, zero3 = (list(ranks.curve(whole[method, stage]).values()) for stage in STAGES)
    assert len(zero2) == STEPS and zero2[-1] < zero2[0]
    assert zero0 == pytest.approx(zero2, abs=1e-6) and zero3 == pytest.approx(zero2, abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_checkpoint_holds_the_same_tensors_at_every_stage(method: str, whole: Runs) -> None:
    """And none of a teacher, whole or split."""
    zero0, zero2, zero3 = (ranks.tensors(whole[method, stage]).keys() for stage in STAGES)
    assert zero0 == zero2 == zero3 and not any("tower" in name for name in zero0)


@pytest.mark.parametrize("method", METHODS)
def test_every_parameter_gets_a_gradient(method: str, whole: Runs) -> None:
    """Adam's second moment is a sum of squared gradients, so it is zero where none ever came."""
    for stage in STAGES:
        moments = {k: t for k, t in ranks.tensors(whole[method, stage]).items() if k.startswith("exp_avg_sq|")}
        assert moments and not [name for name, moment in moments.items() if not moment.any()]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("method", METHODS)
def test_resumed_run_is_bit_identical(method: str, stage: int, whole: Runs, resumed: Runs) -> None:
    never, stopped = whole[method, stage], resumed[method, stage]
    assert ranks.identical(stopped, never)
    curve = ranks.curve(never)
    assert ranks.curve(stopped) == {step: curve[step] for step in range(CUT + 1, STEPS + 1)}
