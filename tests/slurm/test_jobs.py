"""jobs/ on a real SLURM of two nodes, with a stub instead of the trainer."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.slurm.conftest import JOBS, SMALL, Site

pytestmark = pytest.mark.slurm


@pytest.mark.parametrize("name", sorted(p.name for p in JOBS.glob("*.sbatch")))
def test_slurm_accepts_every_header(site: Site, name: str) -> None:
    fits = {"pretrain": ["--nodes=2", "--cpus-per-task=2"], "evaluate": ["--cpus-per-task=2"]}
    fits["finetune"] = fits["evaluate"]
    options = fits.get(name.partition(".")[0].partition("_")[0], [])
    done = site.cluster.run("sbatch", "--test-only", *options, str(JOBS / name), env=site.env)
    assert done.returncode == 0, done.stderr


def test_plain_sbatch_from_another_folder(site: Site) -> None:
    """The script finds its own folder although SLURM runs a copy; every rank gets its numbers and the rendezvous."""
    job = site.sbatch(
        "--nodes=2", "--cpus-per-task=1", str(JOBS / "pretrain_vit_h.sbatch")
    )  # 2 x 8 ranks, as in the header
    assert site.cluster.wait(job)["JobState"] == "COMPLETED", site.log(job)
    site.run_dir = next((site.folder / "runs").iterdir())
    assert site.run_dir.name.endswith(job)
    for rank in range(16):
        env = site.launch(rank)["environment"]
        expected = (str(rank), str(rank % 8), "16", "8")
        assert tuple(env[k] for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")) == expected
        assert env["MASTER_ADDR"] == (site.cluster.nodes[0] if site.cluster.isolated else "127.0.0.1")
        assert 10000 <= int(env["MASTER_PORT"]) < 30000
        for cache in ("TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
            assert env[cache].startswith(str(site.cluster.local))


def test_a_path_with_spaces(site: Site) -> None:
    jobs = site.folder / "my project" / "jobs"
    shutil.copytree(JOBS, jobs)
    job = site.sbatch(
        *("--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1"),
        str(jobs / "pretrain_vit_l.sbatch"),
        env={"RUN_DIR": str(site.folder / "my run")},
    )
    assert site.cluster.wait(job)["JobState"] == "COMPLETED", site.log(job)
    assert (site.folder / "my run" / "done").exists()


def test_options_reach_the_trainer(site: Site) -> None:
    job = site.pretrain(
        "data.note=two words",
        "x=*",
        "y=$HOME 'q'",
        env={"PRECISION": "bf16", "ZERO": "3", "ACT_CKPT": "1", "SHARDS": "/a b", "RECIPE": "r.yaml"},
    )
    site.cluster.wait(job)
    assert site.launch()["arguments"] == [
        "r.yaml", "--run-dir", str(site.run_dir), "engine.ds_config=zero3_bf16", "engine.device=cuda",
        "engine.activation_checkpointing=1", "data.shards=/a b", "data.note=two words", "x=*", "y=$HOME 'q'",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("env", "options", "message"),
    [
        ({"PRECISION": "fp8"}, (), "PRECISION='fp8'"),
        ({"ZERO": "5"}, (), "ZERO='5'"),
        ({}, ("--gpus-per-node=4",), "4 GPUs per node"),
        ({}, ("--ntasks=3",), "3 tasks"),
        ({"SITE_ENV": "/nowhere"}, (), "SITE_ENV='/nowhere'"),
    ],
)
def test_bad_input_ends_with_2(site: Site, env: dict[str, str], options: tuple[str, ...], message: str) -> None:
    job = site.pretrain(options=options, env=env)
    assert site.cluster.wait(job)["ExitCode"] == "2:0", site.log(job)
    assert message in site.log(job).splitlines()[-1]
    assert not list(site.folder.glob("run/launch.*"))


@pytest.mark.parametrize("export", ["--export=SITE_ENV,RUN_DIR", "--export=NONE"])
def test_a_bare_environment_at_submission(site: Site, export: str, tmp_path: Path) -> None:
    """As jobs/README.md advises to keep secrets out of a job: every step gets what the job itself exports."""
    jobs = Path(shutil.copytree(JOBS, tmp_path / "project" / "jobs"))
    shutil.copy(site.env["SITE_ENV"], jobs / "site.env")
    script = str(jobs / "pretrain_vit_h.sbatch")
    job = site.sbatch(*SMALL, export, script, env={"RUN_DIR": str(site.run_dir), "SECRET_TOKEN": "abc"})
    assert site.cluster.wait(job)["JobState"] == "COMPLETED", site.log(job)
    run_dir = site.run_dir if "RUN_DIR" in export else next((site.folder / "runs").iterdir())
    for rank in range(4):
        environment = json.loads((run_dir / f"launch.0.{rank}.json").read_text())["environment"]
        assert "SECRET_TOKEN" not in environment
        assert environment["RANK"] == str(rank) and environment["TRITON_CACHE_DIR"].startswith(str(site.cluster.local))


def test_gpus_by_gres_on_the_command_line(site: Site) -> None:
    """Many sites know only --gres; the header's --gpus-per-node stays in a variable that srun reads."""
    options = ("--nodes=2", "--ntasks-per-node=2", "--gres=gpu:2", "--cpus-per-task=1", "--time=10")
    script = str(JOBS / "pretrain_vit_h.sbatch")
    job = site.sbatch(*options, script, env={"RUN_DIR": str(site.run_dir)})
    assert site.cluster.wait(job)["JobState"] == "COMPLETED", site.log(job)
    assert site.launch()["environment"]["WORLD_SIZE"] == "4"


# ------------------------------------------------------------------------------------------------- save and requeue


def test_time_limit_requeues_and_resumes(site: Site) -> None:
    job = site.pretrain("stub.steps=30", "stub.step_s=0.1")
    site.until_ready()
    site.interrupt(job)
    site.cluster.start_now(job)
    end = site.cluster.wait(job)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), site.log(job)
    assert (site.run_dir / "done").read_text() == "30\n"
    starts = [int(n) for n in re.findall(r"stub starts at step (\d+)", site.log(job))]  # one log for both starts
    assert starts[0] == 0 and 0 < starts[1] < 30
    assert f"job {job} restart 0 step {starts[1]}" in (site.run_dir / "job" / "restarts.txt").read_text()
    assert [p.name for p in (site.run_dir / "job").iterdir()] == ["restarts.txt"]


def test_signal_before_the_handlers_are_installed(site: Site) -> None:
    """The signal neither kills the ranks nor is lost."""
    job = site.pretrain("stub.steps=1000", "stub.step_s=0.1", "stub.deaf_s=2")
    site.until_started()
    site.interrupt(job)
    site.cluster.start_now(job)
    assert "stub starts at step 0" in site.log(job)
    assert site.saves() == [(0, 1)]


def test_cancel_saves_and_does_not_requeue(site: Site) -> None:
    job = site.pretrain("stub.steps=1000", "stub.step_s=0.1")
    site.until_ready()
    site.cluster.run("scancel", job)
    end = site.cluster.wait(job)
    assert (end["JobState"], end["Restarts"]) == ("CANCELLED", "0")
    site.until_saved()  # SLURM sets the state before the ranks have ended
    assert site.saves()[-1][1] > 0
    site.cluster.until("the batch script's end", lambda: not list((site.run_dir / "job").iterdir()))


def test_preemption_saves_and_slurm_requeues(site: Site) -> None:
    """A job of higher priority takes the nodes: the first one gets TERM, saves within the grace time and runs again."""
    job = site.pretrain("stub.steps=30", "stub.step_s=0.1", options=["--partition=low"])
    site.until_ready()
    other = site.sbatch("--nodes=2", "--exclusive", "--wrap=sleep 1")
    site.cluster.start_now(job)
    assert site.cluster.wait(other)["JobState"] == "COMPLETED"
    end = site.cluster.wait(job)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), site.log(job)
    starts = [int(n) for n in re.findall(r"stub starts at step (\d+)", site.log(job))]
    assert starts[0] == 0 and 0 < starts[1] < 30


def test_signal_during_the_node_check(site: Site) -> None:
    nvidia_smi, waiting = site.folder / "bin" / "nvidia-smi", site.folder / "waiting"
    nvidia_smi.write_text(nvidia_smi.read_text() + f"touch '{waiting}'; sleep 1\n")
    job = site.pretrain("stub.steps=1000", "stub.step_s=0.1")
    site.cluster.until("the node check", waiting.exists)
    site.interrupt(job)
    site.cluster.start_now(job)
    assert site.saves() == [(0, 1)]


def test_crash_of_one_rank_ends_the_job(site: Site) -> None:
    job = site.pretrain("stub.steps=10000", "stub.step_s=0.05", "stub.crash_rank=2")
    site.until_ready()
    (site.run_dir / "crash").touch()
    end = site.cluster.wait(job, timeout_s=40)
    assert (end["JobState"], end["Restarts"]) == ("FAILED", "0"), site.log(job)


def test_a_hang_is_requeued(site: Site) -> None:
    """The watchdog ends the ranks with a failure, after it has written the requeue file."""
    job = site.pretrain("stub.hang_at=3")
    site.cluster.start_now(job)
    end = site.cluster.wait(job)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), site.log(job)
    assert "stub starts at step 3" in site.log(job)


def test_bad_input_to_the_trainer_is_not_requeued(site: Site) -> None:
    end = site.cluster.wait(site.pretrain("stub.exit=2"))
    assert (end["JobState"], end["Restarts"]) == ("FAILED", "0")


def test_exit_code_0_without_the_file_done_is_a_failure(site: Site) -> None:
    """Otherwise stages that depend on the success of this job would start."""
    job = site.pretrain("stub.exit=0")
    assert site.cluster.wait(job)["ExitCode"] == "1:0"
    assert "without finishing" in site.log(job)


@pytest.mark.parametrize(
    ("trainer", "env", "message"),
    [
        ("stub.steps=1000", {"MAX_RESTARTS": "0"}, "MAX_RESTARTS=0 are used up"),
        ("stub.frozen=1", {}, "no further than before the last restart"),
    ],
)
def test_requeue_has_limits(site: Site, trainer: str, env: dict[str, str], message: str) -> None:
    job = site.pretrain(trainer, "stub.step_s=0.1", env=env)
    site.until_ready()
    site.interrupt(job)
    end = site.cluster.wait(job)
    assert (end["JobState"], end["Restarts"]) == ("FAILED", "0")
    assert message in site.log(job)


def test_a_run_with_a_stop_file_is_not_requeued(site: Site) -> None:
    job = site.pretrain("stub.steps=1000", "stub.step_s=0.1")
    site.until_ready()
    (site.run_dir / "stop").touch()
    site.interrupt(job)
    assert site.cluster.wait(job)["JobState"] == "FAILED"
    assert "remove that file" in site.log(job)


# ------------------------------------------------------------------------------------------------------------ nodes


@pytest.mark.parametrize(
    ("env", "why"),
    [
        ({"FAKE_BAD_NODE": "n2"}, "1 of 2 GPUs answer"),
        ({"FAKE_ECC_NODE": "n2", "CHECK_ECC": "1"}, "7 uncorrected ECC errors"),
    ],
)
def test_bad_node_is_reported(site: Site, env: dict[str, str], why: str) -> None:
    job = site.pretrain(env=env)
    assert site.cluster.wait(job)["ExitCode"] == "3:0", site.log(job)
    assert f"BAD NODE n2: {why}" in site.log(job) and "--exclude=n2 " in site.log(job)
    assert "BAD NODE n1" not in site.log(job)
    assert not list(site.run_dir.glob("launch.*"))


def test_a_node_check_that_cannot_start_blames_no_node(site: Site) -> None:
    """An srun that fails says nothing about the nodes: no list of nodes to exclude."""
    srun = site.folder / "bin" / "srun"
    srun.write_text('#!/bin/sh\necho "srun: error: Invalid generic resource (gres) specification" >&2\nexit 1\n')
    srun.chmod(0o755)
    job = site.pretrain()
    assert site.cluster.wait(job)["ExitCode"] == "1:0"
    assert "Invalid generic resource" in site.log(job) and "did not run on any node" in site.log(job)
    assert "BAD NODE" not in site.log(job) and "--exclude" not in site.log(job)


def test_full_disk_is_a_bad_node(site: Site) -> None:
    site.write_env(
        MIMSCALE_PYTHON=f"{site.folder}/bin/python", SITE_LOCAL_DIR=str(site.cluster.local), MIN_FREE_GB="999999"
    )
    job = site.pretrain()
    assert site.cluster.wait(job)["ExitCode"] == "3:0"
    assert "BAD NODE n1" in site.log(job) and "--exclude=n1,n2 " in site.log(job)


def test_packed_environment_is_unpacked_once_per_node(site: Site) -> None:
    packed, zstd = site.folder / "env.tar.gz", shutil.which("zstd")
    subprocess.run(["tar", "-czf", str(packed), "-C", str(site.folder), "bin"], check=True)
    local = site.cluster.local
    site.write_env(SITE_ENV_TARBALL=str(packed), SITE_LOCAL_DIR=str(local), MIN_FREE_GB="1")
    logs = []
    for _ in range(2):
        job = site.pretrain()
        assert site.cluster.wait(job)["JobState"] == "COMPLETED", site.log(job)
        logs.append(site.log(job))
        (site.run_dir / "done").unlink()
    assert logs[0].count("unpacking") == (2 if site.cluster.isolated else 1)
    assert logs[1].count("unpacking") == 0
    python = Path(site.launch()["environment"]["MIMSCALE_PYTHON"])
    for folder in [local.with_name(f"local.{n}") for n in site.cluster.nodes] if site.cluster.isolated else [local]:
        assert (folder / python.relative_to(local).parents[1] / "COMPLETE").exists()

    if zstd:
        subprocess.run(["tar", "--zstd", "-cf", str(packed), "-C", str(site.folder), "bin/nvidia-smi"], check=True)
        job = site.pretrain()
        assert site.cluster.wait(job)["ExitCode"] == "2:0" and "has no bin/python" in site.log(job)


# ------------------------------------------------------------------------------------------------------ preparation


def test_plain_array(site: Site) -> None:
    """The last task has the job number of the whole array, for which SLURM answers once per task."""
    out = site.folder / "out"
    job = site.sbatch(
        "--array=0-2", "--cpus-per-task=1", str(JOBS / "prepare_imagenet.sbatch"), "folder", "/in", str(out)
    )
    for task in range(3):
        assert site.cluster.wait(f"{job}_{task}")["JobState"] == "COMPLETED", site.log(f"{job}_{task}")
    assert sorted(p.name for p in out.iterdir()) == ["0-of-3", "1-of-3", "2-of-3"]


def test_a_partial_array_needs_the_number_of_parts(site: Site) -> None:
    script, arguments = str(JOBS / "prepare_imagenet.sbatch"), ("folder", "/in", str(site.folder / "out"))
    job = site.sbatch("--array=2", "--cpus-per-task=1", script, *arguments)
    assert site.cluster.wait(job)["ExitCode"] == "2:0"
    job = site.sbatch("--array=2", "--cpus-per-task=1", script, *arguments, env={"PARTS": "5"})
    assert site.cluster.wait(job)["JobState"] == "COMPLETED"
    assert [p.name for p in (site.folder / "out").iterdir()] == ["2-of-5"]


@pytest.mark.slow
def test_communication_check(site: Site) -> None:
    """2 x 2 real ranks over gloo; the factor is so high that a busy host causes no false alarm."""
    job = site.pretrain(env={"COMM_CHECK": "1", "COMM_CHECK_FACTOR": "1000"})
    assert site.cluster.wait(job, timeout_s=300)["JobState"] == "COMPLETED", site.log(job)
    assert "all-reduce of 1 MiB" in site.log(job)
    for node in site.cluster.nodes:
        assert re.search(rf"^  {node} [\d.]+ [\d.]+$", site.log(job), re.MULTILINE)
    assert site.launch()["environment"]["RANK"] == "0"  # the training started


@pytest.mark.slow
def test_communication_check_reports_slow_nodes(site: Site) -> None:
    """With a factor that no node can meet all are reported, and the training does not start."""
    job = site.pretrain(env={"COMM_CHECK": "1", "COMM_CHECK_FACTOR": "0.0001"})
    assert site.cluster.wait(job, timeout_s=300)["ExitCode"] == "3:0", site.log(job)
    assert "BAD NODE n1: all-reduce" in site.log(job) and "--exclude=n1,n2 " in site.log(job)
    assert not list(site.run_dir.glob("launch.*"))
