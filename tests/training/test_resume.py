"""A run that was stopped and resumed is the run that never stopped."""

from __future__ import annotations

import hashlib
import signal
from pathlib import Path

import pytest

from mimscale.checkpoint import format as checkpoint
from tests import ranks

pytestmark = [pytest.mark.multi, pytest.mark.slow]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    return ranks.recipe(tmp_path_factory.mktemp("resume"), shards)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Path:
    """Two ranks, ZeRO-2, fp32, never stopped."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    ranks.train(2, recipe, run_dir)
    return run_dir


@pytest.mark.parametrize("ds_config", ["cpu_zero2_fp32", "cpu_zero3_fp32", "cpu_zero2_fp16"])
def test_preempted_run_is_bit_identical(ds_config: str, recipe: Path, whole: Path, tmp_path: Path) -> None:
    override = f"engine.ds_config={ds_config}"
    if ds_config == "cpu_zero2_fp32":
        never = whole
    else:
        never = tmp_path / "never"
        ranks.train(2, recipe, never, override)
    stopped = tmp_path / "stopped"
    ranks.train_until(3, 2, recipe, stopped, signal.SIGUSR1, [override])
    halfway = ranks.meta(stopped)["step"]
    assert 3 <= halfway < 12 and not (stopped / "done").exists()
    ranks.train(2, recipe, stopped, override)
    assert (stopped / "done").read_text().strip() == "12"
    assert ranks.identical(stopped, never)
    assert ranks.curve(stopped) == ranks.curve(never)


def test_rank_count_may_change(recipe: Path, whole: Path, tmp_path: Path) -> None:
    ranks.cut_back(whole, tmp_path / "run", 4)
    ranks.train(1, recipe, tmp_path / "run", "schedule.steps=12")
    cut = tmp_path / "again"
    ranks.cut_back(tmp_path / "run", cut, 8)
    ranks.train(2, recipe, cut)
    assert list(ranks.curve(cut).values()) == pytest.approx(list(ranks.curve(whole).values()), abs=1e-6)
    assert ranks.difference(cut, whole) < 2e-5


def test_stage_may_change(recipe: Path, whole: Path, tmp_path: Path) -> None:
    ranks.cut_back(whole, tmp_path / "three", 4)
    ranks.train(2, recipe, tmp_path / "three", "engine.ds_config=cpu_zero3_fp32")
    ranks.cut_back(tmp_path / "three", tmp_path / "two", 8)
    ranks.train(2, recipe, tmp_path / "two", "engine.max_micro_batch=4")
    assert list(ranks.curve(tmp_path / "two").values()) == pytest.approx(list(ranks.curve(whole).values()), abs=1e-6)
    assert ranks.difference(tmp_path / "two", whole) < 2e-5


def test_a_damaged_checkpoint_is_passed_over(recipe: Path, whole: Path, tmp_path: Path) -> None:
    ranks.cut_back(whole, tmp_path / "run", 8)
    shard = next((tmp_path / "run/checkpoints/step-00000008").glob("shard-00001*"))
    flipped = bytearray(shard.read_bytes())
    flipped[-1] ^= 1
    shard.write_bytes(flipped)
    done = ranks.run(2, "mimscale", "train", recipe, "--run-dir", tmp_path / "run")
    assert "passing over step-00000008" in done.stderr and "sha256" in done.stderr
    assert ranks.identical(tmp_path / "run", whole)


def test_only_proven_damage_is_passed_over(recipe: Path, whole: Path, tmp_path: Path) -> None:
    """A checkpoint of another format is refused, and a run whose checkpoints are all damaged does not start at 0."""
    ranks.cut_back(whole, tmp_path / "run", 4)
    root = tmp_path / "run" / "checkpoints"
    manifest = root / "step-00000004" / "manifest.json"
    text, complete = manifest.read_text(), root / "step-00000004" / "COMPLETE"
    other, mark = text.replace(f'"format": {checkpoint.FORMAT}', '"format": 1'), complete.read_text()
    manifest.write_text(other)
    complete.write_text(hashlib.sha256(other.encode()).hexdigest())
    refused = ranks.run(1, "mimscale", "train", recipe, "--run-dir", tmp_path / "run", check=False)
    assert refused.returncode == 2 and "has format 1" in refused.stderr
    manifest.write_text(text[:-10])
    complete.write_text(mark)
    for _ in range(2):
        refused = ranks.run(1, "mimscale", "train", recipe, "--run-dir", tmp_path / "run", check=False)
        assert refused.returncode == 2 and "every checkpoint in" in refused.stderr
    assert [p.name[:21] for p in root.glob("*step*")] == ["damaged-step-00000004"]


def test_a_finished_run_ends_at_once(recipe: Path, whole: Path) -> None:
    before = ranks.lines(whole)
    assert "is finished" in ranks.run(1, "mimscale", "train", recipe, "--run-dir", whole).stderr
    assert ranks.lines(whole) == before


def test_a_changed_recipe_is_refused_and_a_fork_starts_anew(recipe: Path, whole: Path, tmp_path: Path) -> None:
    ranks.cut_back(whole, tmp_path / "run", 8)
    words: list[str | Path] = ["mimscale", "train", recipe, "schedule.base_lr=0.004", "--run-dir", tmp_path / "run"]
    refused = ranks.run(1, *words, check=False)
    assert refused.returncode == 2
    assert "schedule.base_lr: 0.016 -> 0.004" in refused.stderr and "--fork" in refused.stderr
    other = ranks.run(1, *words, "student.depth=2", "--fork", tmp_path / "other", check=False)
    assert other.returncode == 2 and "holds other parameters" in other.stderr
    newest = tmp_path / "run" / "checkpoints" / "step-00000008"
    shard = next(newest.glob("shard-*"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    damaged = ranks.run(1, *words, "--fork", tmp_path / "fork", check=False)
    assert damaged.returncode == 2 and "sha256 differs" in damaged.stderr
    shard.write_bytes(content)
    ranks.run(1, *words, "--fork", tmp_path / "fork")
    first = ranks.curve(tmp_path / "fork")
    assert len(first) == 12 and ranks.meta(tmp_path / "fork")["engine"]["optimizer_step"] == 12
    assert first[1] < ranks.curve(whole)[1]  # it starts from trained weights
