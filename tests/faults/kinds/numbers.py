"""Numbers and images that must not reach the weights. The run goes on without their samples, and says so."""

from __future__ import annotations

import shutil
from functools import partial
from typing import Any

from tests.faults.kinds._kind import Moments, fault
from tests.faults.lab import STEPS, Lab, Run
from tests.faulty import plant

SKIPPED = "its step is skipped"


def planted(run: Run, event: str, **faults: Any) -> Moments:
    """In every start: a bad batch is bad again when it comes again."""
    run.plant = partial(plant, faults, 16)
    run.start()
    run.until(lambda: run.events(event), "its effect")
    yield f"step {run.events(event)[-1]['at']}"


def some_batch(lab: Lab) -> int:
    return lab.random.randint(6, STEPS - 12)


@fault(times=3, takes=SKIPPED)
def nan_in_the_data(lab: Lab, run: Run, number: int) -> Moments:
    yield from planted(run, "skipped", images={some_batch(lab): None})


@fault(times=3, takes="jumped over")
def nan_in_many_batches(lab: Lab, run: Run, number: int) -> Moments:
    first = some_batch(lab)
    run.overrides = ("guard.skips=3", "guard.margin=1")
    yield from planted(run, "rollback", images=dict.fromkeys((first, first + 1, first + 2)))


@fault(times=3, takes=SKIPPED)
def infinite_gradients(lab: Lab, run: Run, number: int) -> Moments:
    yield from planted(run, "skipped", gradients=[some_batch(lab)])


@fault(times=3, takes=SKIPPED, worlds=(1,))
def nan_from_the_teacher(lab: Lab, run: Run, number: int) -> Moments:
    run.recipe = lab.taught
    yield from planted(run, "skipped", teacher=[some_batch(lab)])


@fault(times=3, takes="replaced, named")
def corrupted_shard_in_mid_run(lab: Lab, run: Run, number: int) -> Moments:
    """The images of one shard turn to noise: others take their places, counted and named."""
    shards = run.folder.with_name(f"{run.folder.name}-shards")
    shutil.copytree(lab.shards, shards)
    run.overrides = (f"data.shards={shards}", "data.max_damaged=80")
    run.start()
    run.until(run.steps, "a step")
    victim = lab.random.choice(sorted(shards.glob("*.tar")))
    content = bytearray(victim.read_bytes())
    for at in range(1000, len(content), 97):
        content[at] ^= 255
    with victim.open("r+b") as file:
        file.write(content)
    run.until(lambda: run.events("damaged"), "its effect")
    yield f"{victim.name}, step {run.step()}"
