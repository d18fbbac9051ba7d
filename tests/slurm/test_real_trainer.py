"""The batch scripts with the real programs: 2 x 2 ranks of gloo, DeepSpeed ZeRO-2 in bf16, toy weights on CPUs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from mimscale.checkpoint.format import load_weights, newest, newest_step
from tests.slurm.conftest import JOBS, Site

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.multi]
TINY = Path(__file__).with_name("tiny.yaml")


def real_python(site: Site) -> None:
    site.write_env(MIMSCALE_PYTHON=sys.executable, SITE_LOCAL_DIR=str(site.cluster.local), MIN_FREE_GB="1")


def pretrain(site: Site, shards: Path, run_dir: Path, *trainer: str, options: Sequence[str] = (), **env: str) -> str:
    site.run_dir = run_dir
    real_python(site)
    return site.pretrain(
        *("engine.ds_config=cpu_zero2_bf16", "engine.device=cpu", *trainer),
        options=options,
        env={"RECIPE": str(TINY), "SHARDS": str(shards), **env},
    )


def launches(site: Site) -> list[tuple[int, int]]:
    """(ranks, first step) of each start."""
    lines = map(json.loads, (site.run_dir / "launches.jsonl").read_text().splitlines())
    return [(line["ranks"], line["step"]) for line in lines]


def until_saved(site: Site, after: int = 0) -> None:
    site.cluster.until("a checkpoint", lambda: newest_step(site.run_dir) > after, timeout_s=400)


def prepare(site: Site, seed: int) -> Path:
    """Shards of 20 synthetic images each, written by an array of two tasks."""
    images, shards = site.folder / f"images{seed}", site.folder / f"shards{seed}"
    command = [sys.executable, "-m", "data_prep", "synthetic", str(images), "--per-class=8", f"--seed={seed}"]
    subprocess.run(command, check=True, capture_output=True)
    real_python(site)
    script = (str(JOBS / "prepare_imagenet.sbatch"), "folder", str(images), str(shards), "--shard-samples=20")
    job = site.sbatch("--array=0-1", "--cpus-per-task=1", *script)
    for part in (f"{job}_0", f"{job}_1"):
        assert site.cluster.wait(part, timeout_s=200)["JobState"] == "COMPLETED", site.log(part)
    assert (shards / "manifest.json").exists()
    return shards


def test_an_interrupted_run_equals_an_uninterrupted_one(site: Site) -> None:
    """Preparation, and pre-training with and without a time limit and a lost node."""
    shards = prepare(site, seed=0)
    plain = pretrain(site, shards, site.folder / "plain")
    assert site.cluster.wait(plain, timeout_s=400)["JobState"] == "COMPLETED", site.log(plain)
    assert launches(site) == [(4, 0)]

    # srun ends ranks that still run this long after another has exited; it must be longer than an orderly exit takes
    job = pretrain(site, shards, site.folder / "interrupted", "checkpoint.every=10", SLURM_WAIT="15")
    until_saved(site)
    site.interrupt(job)
    site.cluster.start_now(job, timeout_s=120)
    site.cluster.until("the second start", lambda: len(launches(site)) == 2, timeout_s=400)
    until_saved(site, after=launches(site)[1][1])
    site.cluster.lose("n2")
    # the other ranks crash long before SLURM marks the node as down; the job waits for that
    site.cluster.until("the unreachable node", lambda: "nothing can be started on n2\n" in site.log(job), timeout_s=200)
    site.cluster.declare_down("n2")
    site.cluster.back("n2")
    site.cluster.start_now(job, timeout_s=120)
    end = site.cluster.wait(job, timeout_s=400)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "2"), site.log(job)
    assert [ranks for ranks, _ in launches(site)] == [4, 4, 4]
    first, second, third = (step for _, step in launches(site))
    assert 0 == first < second < third < 120 and third % 10 == 0
    assert (site.run_dir / "done").read_text() == (site.folder / "plain" / "done").read_text()

    weights = []
    for run_dir in (site.folder / "plain", site.run_dir):
        checkpoint = newest(run_dir)
        assert checkpoint is not None
        weights.append(load_weights(checkpoint))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_fewer_nodes_than_before(site: Site, shards: Path) -> None:
    """The run continues with the remaining nodes: micro-batch and accumulation are recomputed, no step is missing."""
    changes = ("schedule.steps=40", "checkpoint.every=5")
    job = pretrain(site, shards, site.folder / "run", *changes, options=["--nodes=1-2"], MIN_NODES="1")
    until_saved(site)
    site.cluster.lose("n2")
    site.cluster.declare_down("n2")  # before SLURM knows that the other ranks have crashed
    site.cluster.start_now(job)
    end = site.cluster.wait(job, timeout_s=400)
    assert (end["JobState"], end["NodeList"]) == ("COMPLETED", "n1"), site.log(job)
    (ranks, _), (fewer, step) = launches(site)
    assert (ranks, fewer) == (4, 2) and 0 < step < 40
    assert "= micro-batch 2 x accumulation 1 x ranks 4" in site.log(job)
    assert "= micro-batch 2 x accumulation 2 x ranks 2" in site.log(job)
    lines = map(json.loads, (site.run_dir / "metrics.jsonl").read_text().splitlines())
    assert {line["step"] for line in lines if "step" in line} == set(range(1, 41))


def test_a_plain_srun_is_one_run(site: Site, shards: Path) -> None:
    """Without jobs/: the ranks read SLURM's own variables."""
    run_dir = site.folder / "bare"
    step = ("srun", "--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1", sys.executable, "-m", "mimscale", "train")
    changes = (f"data.shards={shards}", "schedule.steps=3", "log.every=1", "engine.ds_config=cpu_zero2_fp32")
    done = site.cluster.run(*step, str(TINY), "--run-dir", str(run_dir), *changes, timeout_s=300)
    assert done.returncode == 0, done.stderr
    (launch,) = (json.loads(line) for line in (run_dir / "launches.jsonl").read_text().splitlines())
    assert launch["ranks"] == 4 and (run_dir / "done").exists()


def test_bad_input_is_reported_and_not_requeued(site: Site, tmp_path: Path) -> None:
    one_rank_each = ["--ntasks-per-node=1", "--gpus-per-node=1"]
    job = pretrain(site, tmp_path / "nowhere", site.folder / "run", options=one_rank_each)
    end = site.cluster.wait(job, timeout_s=200)
    assert (end["JobState"], end["Restarts"]) == ("FAILED", "0")
    assert "nowhere" in site.log(job)
