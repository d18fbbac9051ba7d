"""Ranks that the tests fork end as torchrun's do. Run as a module this file is such a rank: number 1 fails."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from tests import forked, ranks


@pytest.mark.multi
def test_a_failed_rank_ends_the_others(tmp_path: Path) -> None:
    done = forked.run(3, ["tests.test_forked", str(tmp_path)], {**ranks.environment(), "MARK": "set"})
    assert done.returncode == 1 and "rank 1 of 3, set" in done.stdout and "ValueError: of rank 1" in done.stderr
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert len(pids) == 3 and os.getpid() not in pids
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.multi
def test_one_process_has_its_own_exit_code_and_no_group(tmp_path: Path) -> None:
    done = forked.run(1, ["tests.test_forked", str(tmp_path)], ranks.environment())
    assert done.returncode == 7 and done.stdout == "" and done.stderr == ""


@pytest.mark.multi
def test_ranks_that_hang_show_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def both_run(pids: list[int]) -> None:
        ranks.until(lambda: len(list(tmp_path.iterdir())) == 2, pids)

    monkeypatch.setattr(forked, "LIMIT_S", 3.0)
    with pytest.raises(TimeoutError, match="not over after 3 s") as caught:
        forked.run(1, ["tests.test_forked", str(tmp_path)], {**ranks.environment(), "HANG": "1"}, both_run)
    assert str(caught.value).count("in wait_for_ever") == 2  # the rank and its child, which are gone: the pipe ended


def wait_for_ever() -> None:
    (Path(sys.argv[1]) / str(os.getpid())).touch()
    time.sleep(600)


if __name__ == "__main__":
    if "HANG" in os.environ:
        os.fork()
        wait_for_ever()
    if "RANK" not in os.environ:
        sys.exit(7)
    (Path(sys.argv[1]) / str(os.getpid())).touch()
    print(f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}, {os.environ['MARK']}", flush=True)
    while len(list(Path(sys.argv[1]).iterdir())) < 3:
        time.sleep(0.01)
    if os.environ["RANK"] == "1":
        raise ValueError("of rank 1")
    time.sleep(600)
