"""All ranks of a launch meet before any collective, in a loop that answers signals and says who is missing.

torch's own rendezvous waits inside one call, in which a process neither prints nor hears a signal. This one uses the
same kind of store at MASTER_ADDR:MASTER_PORT, so torch's finds everybody there. The store then serves `Coordinator`.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from mimscale.distributed.launcher import check_address
from mimscale.distributed.world import World
from mimscale.errors import UserError, warn

REPORT_S = 30.0  # of waiting before a line says for whom
AGAIN_S = 300.0  # between further lines
_CONNECT_S = 2.0
_OF_A_PEER = re.compile(r"gloo|nccl|connection|peer|socket|timed? ?out", re.IGNORECASE)


def meet(
    world: World, attend: Callable[[], None] = lambda: None, timeout_s: float = 1800.0, report_s: float = REPORT_S
) -> dist.Store | None:
    """Wait until every rank has come. None for one rank, and where this process already has a process group.

    attend: called several times per second; what it raises ends the wait. Raises UserError where another launch uses
    the same address, where the ranks count differently, and after `timeout_s`.
    """
    if world.size == 1 or dist.is_initialized():
        return None
    check_address()
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    waiting = _Waiting(address, attend, time.monotonic() + timeout_s, report_s)
    store = _store(world, address, waiting)
    try:
        _enter(store, world, address)
        wanted = f"{world.size}"
        while int(store.add("arrived", 0)) < world.size:
            if store.check(["refused"]):
                raise UserError(store.get("refused").decode())
            waiting.pause(lambda: _missing(store, world) if world.rank == 0 else "")
        assert store.get("size").decode() == wanted
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise UserError(
            f"rank 0 at {address} left before all {world.size} ranks had come; its own last line says why"
        ) from error
    return store


@contextmanager
def while_meeting(world: World) -> Iterator[None]:
    """Around the first collectives of a launch: where a rank ends in their midst, the others say so in one line.

    Raises UserError for what the communication library raises then; every other error is left as it is.
    """
    try:
        yield
    except RuntimeError as error:
        text = next(iter(str(error).splitlines()), "")
        if world.size == 1 or not (isinstance(error, dist.DistError) or _OF_A_PEER.search(text)):
            raise
        raise UserError(
            f"a rank left while all {world.size} were meeting, or cannot be reached ({text[:200]}); the log of the one "
            "that ended says why"
        ) from None


def _enter(store: dist.Store, world: World, address: str) -> None:
    """Say that this rank is there. Raises UserError, on all ranks, for what is not one launch."""
    text = ""
    size = store.compare_set("size", "", str(world.size)).decode()
    if size != str(world.size):
        text = f"rank {world.rank} at {address} is one of {world.size} ranks, another is one of {size}"
    elif int(store.add(f"rank/{world.rank}", 1)) > 1:
        text = f"rank {world.rank} came twice to {address}: two launches use one address"
    if text:
        text += "; start all ranks of a launch with one command, and give each launch its own MASTER_PORT"
        store.set("refused", text)
        raise UserError(text)
    store.add("arrived", 1)


def _missing(store: dist.Store, world: World) -> str:
    absent = [rank for rank in range(world.size) if not store.check([f"rank/{rank}"])]
    return f"{len(absent)} of {world.size} ranks, {named(absent)}"


def named(ranks: list[int]) -> str:
    """A few of them in words."""
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


class _Waiting:
    """A wait that is attended to, reports, and has an end."""

    def __init__(self, address: str, attend: Callable[[], None], end_s: float, report_s: float) -> None:
        self._address, self._attend, self._end_s = address, attend, end_s
        self._start_s, self._report_s, self._pause_s = time.monotonic(), time.monotonic() + report_s, 0.01

    def pause(self, missing: Callable[[], str]) -> None:
        """missing: whom to name in a line, "" for none."""
        self._attend()
        now_s = time.monotonic()
        if now_s > self._end_s:
            waited_s = now_s - self._start_s
            raise UserError(f"not all ranks came to {self._address} in {waited_s:.0f} s; start as many as WORLD_SIZE")
        if now_s >= self._report_s:
            self._report_s = now_s + AGAIN_S
            if text := missing():
                warn(f"waiting for {text} at {self._address}")
        time.sleep(self._pause_s)
        self._pause_s = min(2 * self._pause_s, 0.5)


def _store(world: World, address: str, waiting: _Waiting) -> dist.Store:
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun serves it for its ranks
    serves = world.rank == 0 and not of_agent
    while not serves and not _listens(host, port):
        waiting.pause(lambda: "the torchrun that started this rank" if of_agent else "rank 0")
    limit = timedelta(seconds=60)
    try:
        store = dist.TCPStore(host, port, world.size, serves, limit, wait_for_workers=False, multi_tenant=True)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"MASTER_PORT = {port} is in use on {socket.gethostname()}, perhaps by another launch; set another one"
            ) from None
        raise UserError(f"{address} cannot be reached ({next(iter(str(error).splitlines()))})") from None
    return dist.PrefixStore(f"mimscale/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=_CONNECT_S).close()
    except OSError:
        return False
    return True
