"""Real processes and signals: Ctrl-C, a rank that waits for others, and a launcher that is gone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mimscale.__main__ import answer_early_signals
from mimscale.checkpoint import format as checkpoint
from mimscale.distributed.world import free_port
from tests import forked, ranks

pytestmark = [pytest.mark.multi, pytest.mark.slow]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    folder = tmp_path_factory.mktemp("signals")
    return ranks.recipe(folder, shards, schedule={"steps": 100_000}, checkpoint={"every": 0})


def interrupted(recipe: Path, run_dir: Path, count: int = 1) -> subprocess.CompletedProcess[str]:
    def strike(pids: list[int]) -> None:
        ranks.until(lambda: len(ranks.curve(run_dir)) >= 3, pids)
        for pid in pids:
            os.kill(pid, signal.SIGINT)

    return ranks.run(count, "mimscale", "train", recipe, "--run-dir", run_dir, check=False, meanwhile=strike)


def test_ctrl_c_saves_and_says_so_in_one_line(recipe: Path, tmp_path: Path) -> None:
    done = interrupted(recipe, tmp_path / "run")
    assert done.returncode == 130
    *_, last = done.stderr.strip().splitlines()
    newest = checkpoint.newest(tmp_path / "run")
    assert newest is not None
    assert last == f"stopped at step {checkpoint.step_of(newest)} (SIGINT), saved"
    assert "Traceback" not in done.stderr and "Interrupt" not in done.stderr


def test_ctrl_c_on_two_ranks(recipe: Path, tmp_path: Path) -> None:
    done = interrupted(recipe, tmp_path / "run", count=2)
    assert "(SIGINT), saved" in done.stderr and "Traceback" not in done.stderr


def test_a_second_ctrl_c_leaves_at_once(recipe: Path, tmp_path: Path) -> None:
    """The save after the first would take minutes; what a launcher repeats within a second does not count."""
    faults, run_dir, waited_s = tmp_path / "faults.json", tmp_path / "run", [0.0]
    faults.write_text(json.dumps({"slow_save_s": 300}))

    def strike(pids: list[int]) -> None:
        ranks.until(lambda: len(ranks.curve(run_dir)) >= 3, pids)
        os.kill(pids[0], signal.SIGINT)
        os.kill(pids[0], signal.SIGINT)
        time.sleep(2.0)
        assert Path(f"/proc/{pids[0]}").exists()
        waited_s[0] = time.monotonic()
        os.kill(pids[0], signal.SIGINT)

    words: list[str | Path] = ["tests.faulty", faults, "train", recipe, "--run-dir", run_dir]
    done = ranks.run(1, *words, check=False, meanwhile=strike)
    assert time.monotonic() - waited_s[0] < 60  # not the 300 of the save
    assert done.returncode == 130 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1] == "mimscale train: interrupted"


def test_ctrl_c_while_the_process_ends() -> None:
    """In the seconds that libraries get at the exit."""
    code = (
        "import atexit, os, time; from mimscale.distributed.end_process import end_process; "
        "atexit.register(lambda: [(os.kill(os.getpid(), 2), time.sleep(1.5)) for _ in range(9)]); end_process(0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_rank_that_waits_for_the_others_to_come(
    number: signal.Signals, code: int, recipe: Path, tmp_path: Path
) -> None:
    port = free_port()
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    def strike(pids: list[int]) -> None:
        listening = f"0100007F:{port:04X}", f"00000000:{port:04X}", f"{'0' * 32}:{port:04X}"
        tables = [Path(f"/proc/{pids[0]}/net/{name}") for name in ("tcp", "tcp6")]
        ranks.until(lambda: any(word in table.read_text() for table in tables for word in listening), pids)
        os.kill(pids[0], number)

    words = ["mimscale", "train", str(recipe), "--run-dir", str(tmp_path / "run")]
    done = forked.run(1, words, {**ranks.environment(), **alone}, strike)
    assert done.returncode == code
    assert ("stopped before the first step (SIGTERM)" if code == 143 else "train: interrupted") in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_during_the_imports_ends_with_one_line(number: signal.Signals, recipe: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "mimscale", "train", str(recipe), "--run-dir", str(tmp_path / "run")]
    with subprocess.Popen(words, env=ranks.environment(), stderr=subprocess.PIPE, text=True) as process:
        status = Path(f"/proc/{process.pid}/status")
        caught = f"{1 << (number - 1):x}"

        def handled() -> bool:
            mask = next(line for line in status.read_text().splitlines() if line.startswith("SigCgt"))
            return bool(int(mask.split()[1], 16) & int(caught, 16))

        ranks.until(handled, [process.pid])
        process.send_signal(number)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 143
    assert said == f"stopped before the first step ({number.name})\n"
    assert not (tmp_path / "run").exists()


def test_what_the_batch_script_ignores_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        answer_early_signals(["evaluate", "train"])
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # another verb
        answer_early_signals(["--local_rank=0", "train", "mae_tiny"])
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    finally:
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(
    ("phase", "call"),
    [("open", "open_process_group (number 0)"), ("start", "gather (number 2)"), ("loop", "gather (number 2)")],
)
def test_a_rank_that_waits_in_a_call(phase: str, call: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"

    def strike(pids: list[int]) -> None:
        ranks.until(mark.exists, pids)
        os.kill(pids[0], signal.SIGTERM)
        ranks.until(lambda: not Path(f"/proc/{pids[0]}").exists(), pids[1:])
        os.kill(pids[1], signal.SIGKILL)

    done = ranks.run(2, "tests.fault_tolerance.waits", phase, mark, check=False, meanwhile=strike)
    assert "rank 0 has waited for rank 1 for " in done.stderr and f"in {call}" in done.stderr
    assert "rank 0 leaves without saving: SIGTERM while it waits for rank 1" in done.stderr


def test_ranks_notice_that_their_launcher_is_gone(recipe: Path, tmp_path: Path) -> None:
    """As after `kill -9` of torchrun."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    words = [sys.executable, "-m", "mimscale", "train", str(recipe), "--run-dir", str(run_dir)]
    launcher = (
        "import subprocess, sys, time; child = subprocess.Popen(sys.argv[1:]); print(child.pid, flush=True); "
        "time.sleep(600)"
    )
    environment = {**ranks.environment(), "TORCHELASTIC_RUN_ID": "1"}
    with log.open("wb") as file, subprocess.Popen(
        [sys.executable, "-c", launcher, *words], env=environment, stdout=subprocess.PIPE, stderr=file
    ) as parent:  # fmt: skip
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        ranks.until(lambda: len(ranks.curve(run_dir)) >= 3, [child])
        parent.kill()
    end_s = time.monotonic() + 60
    while Path(f"/proc/{child}").exists() and time.monotonic() < end_s:
        time.sleep(0.1)
    assert "(the launcher of this rank has ended), saved" in log.read_text(), log.read_text()[-2000:]
