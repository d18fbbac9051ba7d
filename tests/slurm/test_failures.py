"""Failures of nodes and daemons and time limits, on a real SLURM of two nodes, with a stub instead of the trainer."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.slurm.conftest import Site

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
SLOW = ("stub.every=1", "stub.step_s=0.1")  # a checkpoint at every step


def starts(site: Site, job: str) -> list[tuple[int, int]]:
    """(step, ranks) of each start."""
    found = re.findall(r"stub starts at step (\d+) on (\d+) ranks", site.log(job))
    return [(int(step), int(ranks)) for step, ranks in found]


def test_a_lost_node(site: Site) -> None:
    """SLURM marks the node as down, requeues the job, waits until there are enough nodes, and starts it again."""
    job = site.pretrain("stub.steps=10000", *SLOW)
    site.until_saved()
    site.cluster.lose("n2")
    site.cluster.until_down("n2")
    site.cluster.start_now(job)
    assert site.cluster.show(job)["Restarts"] == "1" and len(starts(site, job)) == 1
    last = site.saves()[-1][1]
    site.cluster.back("n2")
    site.until_saved(restart=1)
    assert [ranks for _, ranks in starts(site, job)] == [4, 4]
    assert (1, last + 1) in site.saves()  # from the newest checkpoint


def test_ranks_that_crash_because_a_node_is_lost(site: Site) -> None:
    """Before SLURM marks the node as down: the job does not fail, and continues with the other node."""
    options, env = ["--nodes=1-2"], {"SLURM_WAIT": "1", "MIN_NODES": "1"}
    job = site.pretrain("stub.steps=1000", *SLOW, "stub.crash_rank=1", options=options, env=env)
    site.until_saved()
    site.cluster.lose("n2")
    (site.run_dir / "crash").touch()
    site.cluster.until("the unreachable node", lambda: "nothing can be started on n2\n" in site.log(job), timeout_s=60)
    (site.run_dir / "crash").unlink()
    site.cluster.declare_down("n2")
    site.cluster.start_now(job)
    site.until_saved(restart=1)
    assert [ranks for _, ranks in starts(site, job)] == [4, 2]
    # SLURM may still send the end of the first step to n1, if that was slow to answer
    steps = {site.launch(restart=restart)["environment"]["SLURM_STEP_ID"] for restart in (0, 1)}
    assert len(steps) == 2


def test_ranks_that_survive_their_slurmd(site: Site) -> None:
    """slurmd of the head node dies alone: two starts of one job run at the same time, and only the newer one writes."""
    job = site.pretrain("stub.steps=200", *SLOW, options=["--nodes=1-2"])
    site.until_saved()
    site.cluster.lose_daemon("n1")
    site.cluster.declare_down("n1")
    site.cluster.start_now(job)
    site.cluster.run("scontrol", "update", f"jobid={job}", "numtasks=2")  # the lost head node cannot do this
    site.until_saved(restart=1)
    end = site.cluster.wait(job, timeout_s=90)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), site.log(job)
    assert [ranks for _, ranks in starts(site, job)] == [4, 2]  # on the remaining node
    restarts = [restart for restart, _ in site.saves()]
    assert restarts == sorted(restarts), "the older start has written after the newer one"
    assert "restart 0 ends" in site.log(job)  # the older batch script
    older = site.launch(rank=0, restart=0)["pid"]
    site.cluster.until("the end of the older rank 0", lambda: older not in site.cluster.tasks("n1"))


def test_slurmd_is_restarted(site: Site) -> None:
    job = site.pretrain("stub.steps=20", *SLOW)
    site.until_started()
    site.cluster.lose_daemon("n2")
    site.cluster.back("n2")
    end = site.cluster.wait(job)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "0"), site.log(job)


def test_slurmctld_is_restarted(site: Site) -> None:
    """The job goes on training; requests that fail in the meantime are repeated."""
    job = site.pretrain("stub.steps=60", *SLOW)
    site.until_saved()
    log = Path(site.cluster.show(job)["StdOut"])
    site.cluster.stop_controller()
    (site.run_dir / "job" / f"stop.{job}.0").touch()  # instead of the signal, which only slurmctld could send
    site.cluster.until("a refusal", lambda: "trying again" in log.read_text(), timeout_s=90)
    site.cluster.controller_back()
    site.cluster.start_now(job, timeout_s=120)  # the end of a step is reported to slurmctld once a minute
    end = site.cluster.wait(job)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), site.log(job)


def test_ranks_that_do_not_react_to_the_signal(site: Site) -> None:
    """With a real time limit: the job is requeued before it, and continues from its newest checkpoint."""
    job = site.pretrain("stub.deaf=1", "stub.steps=10000", *SLOW, options=["--time=1", "--signal=B:USR1@30"])
    site.until_saved()
    site.cluster.start_now(job, timeout_s=90)
    assert "have not saved in time" in site.log(job)
    last = site.saves()[-1][1]
    site.until_saved(restart=1)
    assert starts(site, job) == [(0, 4), (last, 4)]


def test_the_time_limit_without_a_signal(site: Site) -> None:
    """SLURM kills the ranks; the job can be submitted again and continues from the newest checkpoint."""
    job = site.pretrain("stub.deaf=1", "stub.steps=1000", *SLOW)
    site.until_saved()
    site.cluster.end_in(job, 1)
    assert site.cluster.wait(job)["JobState"] == "TIMEOUT"
    last = site.saves()[-1][1]
    job = site.pretrain(f"stub.steps={last + 3}", *SLOW)
    assert site.cluster.wait(job)["JobState"] == "COMPLETED", site.log(job)
    assert starts(site, job) == [(last, 4)]
