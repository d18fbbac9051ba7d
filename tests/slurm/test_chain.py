"""jobs/submit on a real SLURM of two nodes: all stages, the failure of one, preemption of one, and results.json."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from tests.slurm.conftest import JOBS, Site

pytestmark = pytest.mark.slurm
TWO = "--ntasks-per-node=2 --gpus-per-node=2 --cpus-per-task=1"
CHAIN = {
    "ARRAY": "0-2%2",
    "PREP_OPTS": "--cpus-per-task=1",
    "TRAIN_OPTS": f"--nodes=2 {TWO} --comment='two words'",
    "EVAL_OPTS": f"--nodes=2 {TWO}",
    "FINETUNE_OPTS": TWO,
}
STAGES = ["prepare", "finish", "pretrain", "knn", "linear", "attentive", "finetune", "results"]


def submit(site: Site, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    folders = {"IMAGENET": "/in", "SHARDS": f"{site.folder}/train", "VAL_SHARDS": f"{site.folder}/val"}
    everything = {**site.env, **CHAIN, **folders, "RUN_DIR": str(site.run_dir), **env}
    return site.cluster.run(str(JOBS / "submit"), *arguments, env=everything, cwd=site.folder)


def submitted(site: Site, *arguments: str, **env: str) -> dict[str, str]:
    """Stage -> job."""
    done = submit(site, *arguments, **env)
    assert done.returncode == 0, done.stderr
    return dict(line.split() for line in (site.run_dir / "job" / "jobs.txt").read_text().splitlines())


def results(site: Site, jobs: dict[str, str]) -> dict[str, Any]:
    assert site.cluster.wait(jobs["results"], timeout_s=120)["JobState"] == "COMPLETED", site.log(jobs["results"])
    found: dict[str, Any] = json.loads((site.run_dir / "results.json").read_text())
    return found


def states(found: dict[str, Any]) -> dict[str, str]:
    """Without the exit code, which may be that of a rank that srun has ended."""
    return {stage: of["state"].partition(",")[0] for stage, of in found["stages"].items()}


def test_chain(site: Site) -> None:
    """Every stage on several ranks; each protocol is a job of its own; the last one gathers what they found."""
    jobs = submitted(site, "stub.steps=3", "note=two words", FINETUNE_CHANGES="stub.steps=2 'note=two words'")
    assert list(jobs) == STAGES
    found = results(site, jobs)
    assert states(found) == dict.fromkeys(STAGES[:-1], "done")
    assert {f["protocol"]: f["value"] for f in found["figures"]} == {
        "knn": 50.0, "linear": 50.0, "attentive": 50.0, "top1": 50.0
    }  # fmt: skip
    for shards in (site.folder / "train", site.folder / "val"):
        assert json.loads((shards / "finished").read_text()) == ["0-of-3", "1-of-3", "2-of-3"]
    assert site.launch()["arguments"][-3:] == [f"data.shards={site.folder}/train", "stub.steps=3", "note=two words"]
    for verb in ("knn", "linear", "attentive"):
        words = ["--train", f"{site.folder}/train", "--val", f"{site.folder}/val", "--device=cuda", "--workers=1"]
        for rank in range(4):
            assert json.loads((site.run_dir / f"evaluated.{verb}.{rank}").read_text()) == words
        assert site.cluster.show(jobs[verb])["StdOut"] == f"{site.run_dir}/job/{verb}-{jobs[verb]}.out"
    tuned = site.run_dir / "finetune"
    arguments = json.loads((tuned / "launch.0.0.json").read_text())["arguments"]
    assert arguments == [
        "finetune_maskalign_vit_h14", "--run-dir", str(tuned), f"init.weights={site.run_dir}",
        "engine.ds_config=zero2_bf16", "engine.device=cuda", f"data.shards={site.folder}/train", "stub.steps=2",
        "note=two words",
    ]  # fmt: skip
    assert (tuned / "done").read_text() == "2\n" and (tuned / "evaluated.top1.1").exists()


def test_a_failing_evaluation_leaves_the_others(site: Site) -> None:
    jobs = submitted(site, STAGES="pretrain evaluate results", RECIPE="mae_vit_b16_1600ep", STUB_FAILING_VERB="knn")
    found = results(site, jobs)
    assert states(found) == {"pretrain": "done", "knn": "failed", "linear": "done", "attentive": "done"}
    status = {entry["protocol"]: entry["status"] for entry in found["expected"]}
    assert status == {"knn": "failed", "linear_mae": "not run", "attentive": "short by 25.5", "top1": "not run"}


def test_a_failing_training_leaves_results_too(site: Site) -> None:
    found = results(site, submitted(site, "stub.exit=9", STAGES="pretrain evaluate results", VERBS="knn"))
    assert states(found) == {"pretrain": "failed", "knn": "not run"} and found["figures"] == []


def test_a_preempted_evaluation_goes_on(site: Site) -> None:
    """It is requeued under its number; what gathers the results waits for its second start."""
    (site.run_dir / "job").mkdir(parents=True)
    jobs = submitted(site, STAGES="evaluate results", VERBS="knn", STUB_SLOW_VERBS="knn")
    site.cluster.until("the evaluation", (site.run_dir / "evaluated.knn.3").exists)
    done = site.cluster.run("scontrol", "requeue", jobs["knn"])
    assert done.returncode == 0, done.stderr
    site.cluster.start_now(jobs["knn"])
    found = results(site, jobs)
    assert site.cluster.show(jobs["knn"])["Restarts"] == "1"
    assert states(found) == {"knn": "done"} and [f["protocol"] for f in found["figures"]] == ["knn"]


def test_evaluations_near_their_time_limit(site: Site) -> None:
    """One that has stored more than before its last start is requeued; one that has not would never end."""
    (site.run_dir / "job").mkdir(parents=True)
    one = "--nodes=1 --ntasks-per-node=1 --gpus-per-node=1 --cpus-per-task=1"
    verbs = {"STUB_SLOW_VERBS": "knn linear top1", "VERBS": "knn linear", "EVAL_OPTS": one, "FINETUNE_OPTS": one}
    jobs = submitted(site, STAGES="evaluate finetune results", FINETUNE_CHANGES="stub.steps=2", **verbs)
    folders = {"knn": site.run_dir, "linear": site.run_dir, "finetune": site.run_dir / "finetune"}
    for stage, folder in folders.items():
        verb = "top1" if stage == "finetune" else stage
        site.cluster.until(verb, (folder / f"evaluated.{verb}.0").exists)
        if verb == "linear":  # its restart 0, which found the same
            history = site.run_dir / "job" / "restarts-linear.txt"
            history.write_text(f"job {jobs[verb]} restart 0 feature byte 1234\n")
        site.cluster.end_in(jobs[stage], 20)  # of which the ranks get four fifths
        site.interrupt(jobs[stage])
    site.cluster.start_now(jobs["knn"])
    site.cluster.start_now(jobs["finetune"])
    found = results(site, jobs)
    assert states(found) == {"knn": "done", "linear": "failed", "finetune": "done"}
    assert {stage: site.cluster.show(jobs[stage])["Restarts"] for stage in folders} == {
        "knn": "1", "linear": "0", "finetune": "1"
    }  # fmt: skip
    assert (
        "saved at feature byte 1234: requeue 1 of" in (knn := site.log(jobs["knn"])) and "has not ended in time" in knn
    )
    assert "saved at step 2: requeue 1 of" in site.log(jobs["finetune"])
    refused = site.log(jobs["linear"])
    assert "saved at feature byte 1234, no further than before the last restart; not requeued" in refused
    assert f"submit again with RUN_DIR='{site.run_dir}' to go on" in refused


def test_a_preempted_finetuning_goes_on(site: Site) -> None:
    site.run_dir.mkdir()
    jobs = submitted(
        site,
        STAGES="finetune results",
        FINETUNE_CHANGES="stub.steps=60 stub.step_s=0.1 stub.every=1",
        FINETUNE_OPTS=f"--nodes=2 {TWO}",
    )
    tuned = Site(site.cluster, site.folder, site.run_dir / "finetune", site.env)
    tuned.until_saved()
    site.interrupt(jobs["finetune"])
    site.cluster.start_now(jobs["finetune"])
    found = results(site, jobs)
    assert (tuned.run_dir / "done").read_text() == "60\n" and {restart for restart, _ in tuned.saves()} == {0, 1}
    assert states(found) == {"finetune": "done"} and [f["protocol"] for f in found["figures"]] == ["top1"]


def test_failed_preparation_cancels_what_follows(site: Site) -> None:
    jobs = submitted(site, STUB_FAILING_PART="1")
    for stage in STAGES[1:-1]:
        assert site.cluster.wait(jobs[stage])["JobState"] == "CANCELLED"
    assert not list(site.run_dir.glob("launch.*"))
    found = states(results(site, jobs))
    assert found.pop("prepare") == "failed" and set(found.values()) == {"not run"}


def test_dry_run_submits_nothing(site: Site) -> None:
    done = submit(site, "--dry-run", "a=1")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("to start at") == len(STAGES)
    assert not site.run_dir.exists()
    refused = submit(site, "--dry-run", TRAIN_OPTS="--nodes=3")
    assert refused.returncode == 1 and "would refuse stage 'pretrain'" in refused.stderr


def test_a_recipe_without_a_finetuning_of_its_own(site: Site) -> None:
    done = submit(site, "--dry-run", RECIPE="mff_vit_s16", STAGES="pretrain finetune results")
    assert done.returncode == 0 and "no recipe finetune_mff_vit_s16: left out" in done.stdout
    assert "finetune: sbatch" not in done.stdout and "results: sbatch" in done.stdout
    refused = submit(site, "--dry-run", STAGES="pretrain evaluat")
    assert refused.returncode == 2 and "STAGES: 'evaluat' is none of" in refused.stderr
