"""Ranks that meet, and all that can keep them from it. Each rank is a thread with a store of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mimscale.distributed import coordination
from mimscale.distributed.coordination import Opening
from mimscale.distributed.rendezvous import meet, named, while_meeting
from mimscale.distributed.world import World, free_port
from mimscale.errors import UserError
from tests import forked
from tests import ranks as launched


class Asked(Exception):
    """What a signal raises in these tests."""


class Launch:
    """Ranks that were started."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool, self.over = pool, threading.Event()

    def rank(self, rank: int, size: int, **options: Any) -> Future[Any]:
        world = World(rank, size, rank, torch.device("cpu"))

        def attend() -> None:
            if self.over.is_set():
                raise Asked

        return self._pool.submit(meet, world, options.pop("attend", attend), **options)


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launch]:
    assert not dist.is_initialized()
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with ThreadPoolExecutor(4) as pool:
        launched = Launch(pool)
        yield launched
        launched.over.set()


def until(what: Callable[[], object]) -> None:
    end_s = time.monotonic() + 60.0
    while not what():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def test_all_meet_and_share_a_store(launch: Launch) -> None:
    ranks = [launch.rank(rank, 3) for rank in (2, 0, 1)]
    stores = [rank.result(60) for rank in ranks]
    stores[0].set("key", "value")
    assert [store.get("key") for store in stores] == [b"value"] * 3


def test_one_rank_waits_for_nobody() -> None:
    assert meet(World(0, 1, 0, torch.device("cpu"))) is None


@pytest.mark.parametrize(
    ("rank", "agent", "whom"),
    [
        (0, "False", "2 of 3 ranks, ranks 1, 2"),
        (1, "False", "rank 0"),
        (0, "True", "the torchrun that started this rank"),  # a variable that was copied from another launch
    ],
)
def test_a_lonely_rank_says_for_whom_and_hears(
    launch: Launch,
    rank: int,
    agent: str,
    whom: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", agent)
    said = ""

    def waits() -> bool:
        nonlocal said
        said += capfd.readouterr().err
        return "waiting for" in said

    alone = launch.rank(rank, 3, report_s=0.2)
    until(waits)
    assert f"waiting for {whom} at 127.0.0.1:" in said
    launch.over.set()
    with pytest.raises(Asked):
        alone.result(5)


def test_a_rank_that_comes_twice_is_two_launches(launch: Launch) -> None:
    ranks = [launch.rank(rank, 3) for rank in (0, 1, 1)]
    for rank in ranks:
        with pytest.raises(UserError, match="rank 1 came twice to .* MASTER_PORT"):
            rank.result(60)


def test_ranks_that_count_differently(launch: Launch) -> None:
    ranks = [launch.rank(0, 2), launch.rank(1, 4)]
    for rank in ranks:
        with pytest.raises(UserError, match="is one of . ranks, another is one of"):
            rank.result(60)


def test_an_end_of_waiting(launch: Launch) -> None:
    with pytest.raises(UserError, match="not all ranks came to 127.0.0.1:.* start as many as WORLD_SIZE"):
        launch.rank(0, 2, timeout_s=0.2).result(60)


def test_rank_0_that_leaves(launch: Launch) -> None:
    gone = threading.Event()

    def leave() -> None:
        if gone.is_set():
            raise Asked

    first, second = launch.rank(0, 3, attend=leave), launch.rank(1, 3)
    time.sleep(0.5)
    gone.set()
    with pytest.raises(Asked):
        first.result(60)
    del first  # and with it the store that it served
    with pytest.raises(UserError, match="left before all 3 ranks had come"):
        second.result(60)


def test_a_port_in_use(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        monkeypatch.setenv("MASTER_PORT", str(other.getsockname()[1]))
        with pytest.raises(UserError, match="MASTER_PORT = .* is in use on"):
            launch.rank(0, 2).result(60)


def test_a_rank_that_opens_no_process_group_is_named(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 reads the signs of life of the others; one that gave some and then fell silent is named too."""
    monkeypatch.setattr(coordination, "OPENS_S", 0.0)
    stores = [rank.result(60) for rank in [launch.rank(rank, 3) for rank in range(3)]]
    first, second, third = (Opening(store, rank, 3) for rank, store in enumerate(stores))
    monkeypatch.setattr(coordination, "GONE_S", 0.0)
    assert second.absent() == [] and third.absent() == []  # only rank 0 reports
    third.absent()
    second.absent()
    assert first.absent() == []  # both have just been seen
    third.absent()
    assert first.absent() == [1]
    time.sleep(0.01)
    assert first.absent() == [1, 2]
    assert Opening(None, 0, 1).waiting is None


def test_names_of_many_ranks() -> None:
    assert named([3]) == "rank 3"
    assert named([1, 2]) == "ranks 1, 2"
    assert named(list(range(20))) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 12 more"


@pytest.mark.multi
def test_a_rank_that_is_killed_while_they_meet() -> None:
    done = forked.run(2, ["tests.distributed.leaves"], launched.environment())
    said = [line for line in done.stderr.splitlines() if "a rank left while all 2 were meeting" in line]
    assert len(said) == 1 and "the log of the one that ended says why" in said[0] and "Traceback" not in done.stderr


def test_other_errors_stay_what_they_are() -> None:
    two, one = (World(0, size, 0, torch.device("cpu")) for size in (2, 1))
    for world, text in ((two, "shapes differ"), (one, "gloo: connection closed by peer")):
        with pytest.raises(RuntimeError, match=text), while_meeting(world):
            raise RuntimeError(text)
