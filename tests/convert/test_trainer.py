"""What the real trainer wrote, at each ZeRO stage: converted without DeepSpeed, exported whole, started from."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from mimscale.__main__ import main
from mimscale.checkpoint import format as checkpoint
from mimscale.convert.names import same
from tests import ranks

pytestmark = [pytest.mark.multi, pytest.mark.slow]
STAGES, STEPS, CUT = (0, 1, 2, 3), 4, 2


def train_all(runs: Mapping[Path, list[str]]) -> str:
    """Several runs in one start of two processes; what they printed."""
    listed = next(iter(runs)).parent / "runs.json"
    listed.write_text(json.dumps([[*words, "--run-dir", str(run_dir)] for run_dir, words in runs.items()]))
    done = ranks.run(2, "tests.training.several", listed)
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    sections: dict[str, Any] = {"data": {"workers": 0}, "schedule": {"steps": STEPS}, "checkpoint": {"every": CUT}}
    return ranks.recipe(tmp_path_factory.mktemp("recipe"), shards, **sections)


def words_of(recipe: Path, stage: int) -> list[str]:
    return [str(recipe), f"engine.ds_config=cpu_zero{stage}_fp32"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("runs")
    train_all({folder / f"zero{stage}": words_of(recipe, stage) for stage in STAGES})
    return {stage: folder / f"zero{stage}" for stage in STAGES}


def test_every_stage_without_deepspeed_and_without_a_cluster(runs: dict[int, Path], tmp_path: Path) -> None:
    words = [
        ["convert", str(run_dir), str(tmp_path / f"{stage}-{to}.safetensors"), "--to", to]
        for stage, run_dir in runs.items()
        for to in ("timm", "mimscale", "official")
    ]
    code = (
        "import sys; sys.modules['deepspeed'] = None\n"
        "from mimscale.__main__ import main\n"
        f"assert not any(main(words) for words in {words!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    for stage, run_dir in runs.items():
        stored = {n.partition("|")[2]: t for n, t in ranks.tensors(run_dir).items() if n.startswith(("fp32", "buffer"))}
        assert same(load_file(tmp_path / f"{stage}-mimscale.safetensors"), stored)


def test_full_state_out_and_in_and_on(runs: dict[int, Path], recipe: Path, tmp_path: Path) -> None:
    """Exported in the middle, imported elsewhere, resumed: the run that never stopped. And a start from its weights."""
    source = runs[2]
    ranks.cut_back(source, tmp_path / "half", CUT)
    state, imported, fresh = tmp_path / "state", tmp_path / "imported", tmp_path / "fresh"
    assert main(["convert", str(tmp_path / "half"), str(state), "--to", "state"]) == 0
    assert main(["convert", str(state), str(imported), "--to", "run"]) == 0
    assert ranks.identical(imported, tmp_path / "half")

    still = ["schedule.base_lr=1e-9", "schedule.min_lr=0", "student.drop_path=0"]
    words = [*words_of(recipe, 3), *still, f"init={{weights: {source}, part: method}}"]
    printed = train_all({imported: words_of(recipe, 2), fresh: words})
    assert ranks.identical(imported, source)
    assert f"started from {source}/checkpoints/step-00000004" in printed.replace("\n", "")
    digest = checkpoint.sha256(source / "checkpoints" / "step-00000004" / "manifest.json")
    assert ranks.meta(fresh)["config"]["init"]["sha256"] == digest
    assert ranks.difference(fresh, source) < 1e-6

    resumed = tmp_path / "resumed"  # the file is needed at the first start only
    ranks.cut_back(fresh, resumed, CUT)
    source.rename(tmp_path / "moved")
    train_all({resumed: words})
    (tmp_path / "moved").rename(source)
    assert ranks.identical(resumed, fresh)
