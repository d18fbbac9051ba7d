"""One writer per run folder, real processes on both sides."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mimscale.errors import Stopped, UserError
from mimscale.fault_tolerance.run_lock import RunLock

HOLD = (
    "import sys, time; from pathlib import Path; from mimscale.fault_tolerance.run_lock import RunLock\n"
    "lock = RunLock(Path(sys.argv[1]), beat_s=0.1); print('mine', flush=True); time.sleep(60)"
)


def holder(folder: Path, before: str = "", **environment: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", before + HOLD, str(folder)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})
    assert process.stdout is not None and process.stdout.readline() == "mine\n"
    return process


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def test_a_living_holder_is_respected_and_a_dead_one_is_not(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        with pytest.raises(UserError, match=f"in use by process {process.pid} on"):
            RunLock(tmp_path)
        process.send_signal(signal.SIGKILL)
    lock = RunLock(tmp_path)
    lock.check()
    lock.release()
    assert (tmp_path / "lock").read_bytes() == b""
    RunLock(tmp_path).release()


def test_a_later_restart_of_the_same_job_takes_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The older generation notices it at its next beat, writes no more and ends, although nobody signalled it."""
    with holder(tmp_path, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1") as process:
        monkeypatch.setenv("SLURM_JOB_ID", "8")
        with pytest.raises(UserError, match="in use by job 7 restart 1"):
            RunLock(tmp_path)
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        with pytest.raises(UserError, match="in use"):  # an older restart
            RunLock(tmp_path)
        monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
        lock = RunLock(tmp_path, beat_s=0.1)
        assert process.wait(20) == Stopped.code
        time.sleep(0.3)
        lock.check()
    lock.release()


def test_the_older_generation_cannot_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    lock = RunLock(tmp_path)
    lock.check()
    with holder(tmp_path, SLURM_RESTART_COUNT="1") as process:
        with pytest.raises(Stopped, match="taken over by job 7 restart 1"):
            lock.check()
        lock.release()  # leaves the claim of the other alone
        assert b'"restart": 1' in (tmp_path / "lock").read_bytes()
        process.kill()


def test_a_holder_on_another_host_is_watched(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its POSIX lock may be invisible here: it is alive if its beat moves, whatever any clock says."""
    claim = b'{"job": null, "restart": 0, "host": "elsewhere", "pid": 1, "token": "x"}'
    (tmp_path / "lock").write_bytes(claim.ljust(2048) + b"%020d" % 5)
    alive = subprocess.Popen(["bash", "-c", f"while sleep 0.05; do printf %020d $RANDOM | dd of='{tmp_path}/lock' bs=1 "
                              "seek=2048 conv=notrunc status=none; done"])  # fmt: skip
    try:
        with pytest.raises(UserError, match="in use by process 1 on elsewhere"):
            RunLock(tmp_path, beat_s=0.2)
    finally:
        alive.kill()
        alive.wait()
    time.sleep(0.1)
    RunLock(tmp_path, beat_s=0.2).release()
    assert "process 1 on elsewhere gave no sign of life for 1.2 s; taking over" in capfd.readouterr().err


def test_a_lock_that_a_dead_node_left_on_the_server(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Another host, whose clock is decades behind, holds the POSIX lock and no longer moves; then it comes back."""
    elsewhere = "import platform, time; platform.node = lambda: 'elsewhere'; time.time = lambda: 0.0\n"
    with holder(tmp_path, before=elsewhere) as process:
        with pytest.raises(UserError, match=f"in use by process {process.pid} on elsewhere"):
            RunLock(tmp_path, beat_s=0.3)  # it lives
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.3)
        lock = RunLock(tmp_path, beat_s=0.3)
        assert f"process {process.pid} on elsewhere gave no sign of life" in capfd.readouterr().err
        process.send_signal(signal.SIGCONT)
        assert process.wait(20) == Stopped.code
        lock.check()
    lock.release()


def test_a_machine_of_the_same_name_is_not_this_one(tmp_path: Path) -> None:
    """Two containers called alike, or this one before it was started anew: the free POSIX lock proves nothing."""
    with holder(
        tmp_path, before="from mimscale.fault_tolerance import run_lock; run_lock._boot = lambda: 'other'\n"
    ) as process:
        (tmp_path / "lock.held").unlink()  # so that its POSIX lock cannot be seen
        with pytest.raises(UserError, match=f"in use by process {process.pid}"):
            RunLock(tmp_path, beat_s=0.3)
        process.kill()


def test_a_claim_that_cannot_be_read_is_nobodys_end(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, beat_s=60.0)
    (tmp_path / "lock").write_bytes(b"\0" * 3000)
    with pytest.raises(OSError, match="cannot be read"):
        lock.check()
    lock.release()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        RunLock(tmp_path / "file" / "run")


@pytest.mark.parametrize(
    "content",
    [b"5", b"[]", b"null", b"{}", b"thesis", b"\xff\xfe", b'{"job": 1}', b"[" * 9000, b'{"job": null, "restart": "0"}'],
)
def test_a_lock_that_is_no_claim(content: bytes, tmp_path: Path) -> None:
    """Nobody knows who lives, so a person has to say it."""
    (tmp_path / "lock").write_bytes(content)
    with pytest.raises(UserError, match="lock is damaged and does not say who uses this folder.* remove that file"):
        RunLock(tmp_path, beat_s=0.1)
    assert (tmp_path / "lock").read_bytes() == content
    (tmp_path / "lock").unlink()
    RunLock(tmp_path).release()


def test_a_lock_of_zeros_is_what_a_power_failure_leaves(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "lock").write_bytes(bytes(2068))
    RunLock(tmp_path, beat_s=0.05).release()
    assert "gave no sign of life" in capfd.readouterr().err


def test_a_folder_that_is_removed_and_a_lock_that_is(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "run", beat_s=60.0)
    (tmp_path / "run" / "lock").unlink()
    with pytest.raises(Stopped, match="run has lost its lock file while this run wrote in it"):
        lock.check()
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(Stopped, match="run was removed while this run wrote in it"):
        lock.check()
    lock.release()


def test_processes_that_may_be_meant_as_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two children of one launcher whose variables nobody knows, or two tasks of one job, on one folder."""
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    meant = "they lack RANK and WORLD_SIZE: start them with torchrun or srun"
    with holder(tmp_path, before="import os; os.getppid = lambda: 5\n") as process:
        with pytest.raises(UserError) as refused:
            RunLock(tmp_path)
        assert meant not in str(refused.value)  # two people
        monkeypatch.setattr(os, "getppid", lambda: 5)
        with pytest.raises(UserError, match=meant):
            RunLock(tmp_path)
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(UserError) as refused:
            RunLock(tmp_path)
        assert meant not in str(refused.value)  # rank 0 of a launch that its launcher did start as such
        process.kill()
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with holder(tmp_path / "job", SLURM_JOB_ID="7") as process:
        with pytest.raises(UserError, match=meant):
            RunLock(tmp_path / "job")
        process.kill()
