"""The batch scripts with the real programs: 2 x 2 ranks of gloo, DeepSpeed ZeRO-2 in bf16, toy weights on CPUs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mimscale.resilience.checkpoint import load_weights, newest
from tests.slurm.conftest import JOBS, Site

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.multi]
TINY = Path(__file__).with_name("tiny.yaml")


def real_python(site: Site) -> None:
    site.write_env(MIMSCALE_PYTHON=sys.executable, SITE_LOCAL_DIR=str(site.cluster.local), MIN_FREE_GB="1")


def pretrain(site: Site, shards: Path, run_dir: Path) -> str:
    site.run_dir = run_dir
    real_python(site)
    return site.pretrain(
        "engine.ds_config=cpu_zero2_bf16", "engine.device=cpu", env={"RECIPE": str(TINY), "SHARDS": str(shards)}
    )


def launches(site: Site) -> list[dict[str, object]]:
    return [json.loads(line) for line in (site.run_dir / "launches.jsonl").read_text().splitlines()]


def prepare(site: Site, seed: int) -> Path:
    """Shards of 20 made-up pictures each, written by an array of two jobs."""
    pictures, shards = site.folder / f"pictures{seed}", site.folder / f"shards{seed}"
    command = [sys.executable, "-m", "data_prep", "synthetic", str(pictures), "--per-class=8", f"--seed={seed}"]
    subprocess.run(command, check=True, capture_output=True)
    real_python(site)
    script = (str(JOBS / "prepare_imagenet.sbatch"), "folder", str(pictures), str(shards), "--shard-samples=20")
    job = site.sbatch("--array=0-1", "--cpus-per-task=1", *script)
    for part in (f"{job}_0", f"{job}_1"):
        assert site.cluster.wait(part, timeout_s=200)["JobState"] == "COMPLETED", site.log(part)
    assert (shards / "manifest.json").exists()
    return shards


def test_an_interrupted_run_ends_like_an_uninterrupted_one(site: Site) -> None:
    """Preparation, pre-training with and without a requeue, evaluation."""
    shards, other = prepare(site, seed=0), prepare(site, seed=1)
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

    folders = {"RUN_DIR": str(site.run_dir), "SHARDS": str(shards), "VAL_SHARDS": str(other)}
    job = site.sbatch("--cpus-per-task=1", str(JOBS / "evaluate.sbatch"), "--workers=1", env=folders)
    assert site.cluster.wait(job, timeout_s=400)["JobState"] == "COMPLETED", site.log(job)
    assert {"knn", "linear"} <= {path.stem.split("-")[0] for path in (site.run_dir / "eval").iterdir()}


def test_a_bare_srun_is_one_run(site: Site, shards: Path) -> None:
    """Without jobs/: the tasks of a step find each other by SLURM's own variables."""
    run_dir = site.folder / "bare"
    step = ("srun", "--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1", sys.executable, "-m", "mimscale", "train")
    changes = (f"data.shards={shards}", "schedule.steps=3", "log.every=1", "engine.ds_config=cpu_zero2_fp32")
    done = site.cluster.run(*step, str(TINY), "--run-dir", str(run_dir), *changes, timeout_s=300)
    assert done.returncode == 0, done.stderr
    (launch,) = (json.loads(line) for line in (run_dir / "launches.jsonl").read_text().splitlines())
    assert launch["ranks"] == 4 and (run_dir / "done").exists()


def test_bad_input_is_told_and_not_requeued(site: Site, tmp_path: Path) -> None:
    job = pretrain(site, tmp_path / "nowhere", site.folder / "run")
    end = site.cluster.wait(job, timeout_s=200)
    assert (end["JobState"], end["Restarts"]) == ("FAILED", "0")
    assert "nowhere" in site.log(job)
