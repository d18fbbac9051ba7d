"""The batch script with the real trainer: 2 nodes x 2 ranks of gloo, DeepSpeed ZeRO-2 in bf16, a toy model on CPUs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mimscale.resilience.checkpoint import load_weights, newest
from tests.slurm.conftest import Site

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.multi]
TINY = Path(__file__).with_name("tiny.yaml")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for arguments in (["synthetic", "pictures", "--per-class=8"], ["folder", "pictures", "shards"]):
        subprocess.run([sys.executable, "-m", "data_prep", *arguments], cwd=folder, check=True, capture_output=True)
    return folder / "shards"


def pretrain(site: Site, shards: Path, run_dir: Path) -> str:
    site.run_dir = run_dir
    site.write_env(MIMSCALE_PYTHON=sys.executable, SITE_LOCAL_DIR=str(site.cluster.local), MIN_FREE_GB="1")
    return site.pretrain("engine.ds_config=cpu_zero2_bf16", env={"RECIPE": str(TINY), "SHARDS": str(shards)})


def launches(site: Site) -> list[dict[str, object]]:
    return [json.loads(line) for line in (site.run_dir / "launches.jsonl").read_text().splitlines()]


def test_an_interrupted_run_ends_like_an_uninterrupted_one(site: Site, shards: Path) -> None:
    plain = pretrain(site, shards, site.folder / "plain")
    assert site.cluster.wait(plain, timeout_s=400)["JobState"] == "COMPLETED", site.log(plain)
    assert [(line["ranks"], line["step"]) for line in launches(site)] == [(4, 0)]

    job = pretrain(site, shards, site.folder / "interrupted")
    site.cluster.until("the first step", (site.run_dir / "metrics.jsonl").exists, timeout_s=400)
    site.interrupt(job)
    site.cluster.start_now(job, timeout_s=120)
    end = site.cluster.wait(job, timeout_s=400)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), site.log(job)
    first, second = launches(site)
    assert first["step"] == 0 and isinstance(second["step"], int) and 0 < second["step"] < 200, second["step"]
    assert (site.run_dir / "done").read_text() == (site.folder / "plain" / "done").read_text()

    weights = []
    for run_dir in (site.folder / "plain", site.run_dir):
        checkpoint = newest(run_dir)
        assert checkpoint is not None
        weights.append(load_weights(checkpoint))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_bad_input_is_told_and_not_requeued(site: Site, tmp_path: Path) -> None:
    job = pretrain(site, tmp_path / "nowhere", site.folder / "run")
    end = site.cluster.wait(job, timeout_s=200)
    assert (end["JobState"], end["Restarts"]) == ("FAILED", "0")
    assert "nowhere" in site.log(job)
