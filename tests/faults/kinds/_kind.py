"""What a kind of fault is, and how one is registered."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass

from tests.faults.lab import Lab, Run

Moments = Generator[str, None, None]
Strike = Callable[[Lab, Run, int], Moments]


@dataclass(frozen=True)
class Kind:
    """One kind of fault.

    strike(lab, run, number): meets the run on its way, strikes, and yields the moment once the fault has happened. The
    run is then started again if it has ended, and `strike` goes on. Raises Missed where the fault did not strike or
    show. worlds: on how many ranks. times: in a round of all kinds. last: it comes at a run's end. takes: what becomes
    of samples by intention, else ""; such a fault has a run to itself, which it starts.
    """

    name: str
    strike: Strike
    worlds: tuple[int, ...]
    times: int
    takes: str
    last: bool


KINDS: dict[str, Kind] = {}


def fault(
    *, times: int, worlds: tuple[int, ...] = (1, 2), takes: str = "", last: bool = False
) -> Callable[[Strike], Strike]:
    def add(strike: Strike) -> Strike:
        name = strike.__name__
        KINDS[name] = Kind(name, strike, worlds, times, takes, last)
        return strike

    return add


def soon(lab: Lab, run: Run) -> int:
    """Wait for a random step from here on, and a random part of the next one."""
    run.until_step(run.step() + lab.random.randint(1, 4))
    time.sleep(lab.random.uniform(0, 2 * run.step_s))
    return run.step()
