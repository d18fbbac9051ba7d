"""The student's moving average is what its definition gives on the weights of each step, wherever the run went on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mimscale.checkpoint import format as checkpoint
from mimscale.config.recipes import load_recipe
from mimscale.config.run import method_class
from tests import ranks

pytestmark = [pytest.mark.multi, pytest.mark.slow]
DECAY, STEPS, CUT = 0.8, 6, 3
ENGINES = {
    "torch": ["engine.backend=torch", "engine.ds_config=cpu_zero2_fp32"],
    **{name: [f"engine.ds_config=cpu_{name}"] for name in ("zero0_fp32", "zero2_fp32", "zero3_fp32", "zero2_bf16")},
}
NEXT = {"torch": "zero3_fp32", "zero0_fp32": "zero2_fp32", "zero3_fp32": "torch", "zero2_bf16": "zero0_fp32"}
Runs = dict[str, Path]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """A checkpoint after every step."""
    return ranks.recipe(
        tmp_path_factory.mktemp("ema"),
        shards,
        data={"workers": 0},
        ema={"decay": DECAY},
        optim={"clip": 0.6},
        schedule={"steps": STEPS},
        checkpoint={"every": 1, "wait_s": 60},
    )


def train_all(count: int, recipe: Path, runs: Sequence[tuple[str, Sequence[str]]], folder: Path) -> None:
    """(name of the engine, further words) of each."""
    listed = folder / "runs.json"
    listed.write_text(json.dumps([[str(recipe), *ENGINES[name], *map(str, words)] for name, words in runs]))
    ranks.run(count, "tests.training.several", listed)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Runs:
    """Two ranks, never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    runs = {name: folder / name for name in ENGINES}
    train_all(2, recipe, [(name, ["--run-dir", str(path)]) for name, path in runs.items()], folder)
    return runs


def initial(recipe: Path, name: str) -> dict[str, Tensor]:
    """The student's weights before the first step. DeepSpeed rounds a model to 16 bit before it copies the masters."""
    run = load_recipe(str(recipe))
    torch.manual_seed(run.seed)
    method = method_class(run.method.name)(run, {})
    if name == "zero2_bf16":
        method = method.bfloat16().float()
    return {name: p.detach().clone() for name, p in method.named_parameters() if name.startswith("student.")}


def saved(run_dir: Path, step: int, kind: str) -> dict[str, Tensor]:
    """The student's numbers of one kind in a checkpoint."""
    reader = checkpoint.CheckpointReader(checkpoint.step_folder(run_dir / "checkpoints", step))
    return {name: reader.full(kind, name) for name in reader.names(kind) if name.startswith("student.")}


def assert_follows(run_dir: Path, average: Mapping[str, Tensor], after: int = 0) -> None:
    """Every checkpoint after step `after`, at which the average was `average`."""
    for step in range(after + 1, STEPS + 1):
        weights = saved(run_dir, step, "fp32")
        average = {name: DECAY * average[name] + (1 - DECAY) * weights[name] for name in weights}
        found = saved(run_dir, step, "ema")
        assert found.keys() == average.keys()
        for name, expected in average.items():
            torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-7, msg=f"{run_dir} {step} {name}")


@pytest.mark.parametrize("name", ENGINES)
def test_equals_a_plain_computation(name: str, recipe: Path, whole: Runs) -> None:
    start = initial(recipe, name)
    assert_follows(whole[name], start)
    ours, weights = saved(whole[name], STEPS, "ema"), saved(whole[name], STEPS, "fp32")
    moved = [n for n in weights if not torch.equal(weights[n], start[n])]
    assert moved and all((ours[n] - weights[n]).abs().max() > 1e-4 for n in moved if n.endswith("fc1.weight"))
    reader = checkpoint.CheckpointReader(checkpoint.step_folder(whole[name] / "checkpoints", STEPS))
    assert all(n.startswith("student.") for n in reader.names("ema"))


def test_goes_on_with_one_rank_elsewhere_and_starts_anew_in_a_fork(recipe: Path, whole: Runs, tmp_path: Path) -> None:
    runs = []
    for before, after in NEXT.items():
        ranks.cut_back(whole[before], tmp_path / before, CUT)
        runs.append((after, ["--run-dir", str(tmp_path / before)]))
    parent = tmp_path / "parent"
    ranks.cut_back(whole["zero2_fp32"], parent, CUT)
    for name in ("torch", "zero3_fp32"):
        runs.append((name, ["--run-dir", str(parent), "--fork", str(tmp_path / f"fork {name}")]))
    train_all(1, recipe, runs, tmp_path)
    for before in NEXT:
        assert_follows(tmp_path / before, saved(whole[before], CUT, "ema"), after=CUT)
    for name in ("torch", "zero3_fp32"):
        assert_follows(tmp_path / f"fork {name}", saved(parent, CUT, "fp32"))


def test_two_ranks_go_on_to_the_bit(recipe: Path, whole: Runs, tmp_path: Path) -> None:
    names = ("torch", "zero2_bf16", "zero3_fp32")
    for name in names:
        ranks.cut_back(whole[name], tmp_path / name, CUT)
    train_all(2, recipe, [(name, ["--run-dir", str(tmp_path / name)]) for name in names], tmp_path)
    assert all(ranks.identical(tmp_path / name, whole[name]) for name in names)


def test_a_skipped_step_leaves_it_alone(recipe: Path, tmp_path: Path) -> None:
    """In the trainer; that nothing of any engine moves in such a step is in tests/engine/cases.py."""
    (tmp_path / "faults.json").write_text(json.dumps({"gradients": [2]}))
    words: list[str | Path] = [tmp_path / "faults.json", "train", recipe, "--run-dir", tmp_path / "run"]
    ranks.run(1, "tests.faulty", *words)
    before, skipped, after = (saved(tmp_path / "run", step, "ema") for step in (2, 3, 4))
    assert all(torch.equal(before[name], skipped[name]) for name in before)
    assert not all(torch.equal(skipped[name], after[name]) for name in before)
    assert any(not torch.equal(before[n], weights) for n, weights in saved(tmp_path / "run", 3, "fp32").items())
