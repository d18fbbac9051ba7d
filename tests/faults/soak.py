"""Strike runs again and again, compare them once, and write the table."""

from __future__ import annotations

import argparse
import gc
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from mimscale.bench._report import commit, processor, table
from mimscale.distributed.world import EMULATE_FP16
from tests.faults import lab, trail
from tests.faults.kinds import KINDS, Kind
from tests.faults.lab import EVERY, STEPS, Lab, Run
from tests.faults.layer import Layer

ROOM = 18  # steps that must be left for one more fault


@dataclass
class Outcome:
    """What became of a run: whether it reached its last step, and how it compares with the undisturbed one."""

    name: str
    done: bool = False
    same: bool = False
    same_samples: bool = False
    samples: trail.Samples | None = None
    failure: str = ""


@dataclass
class Row:
    """One fault. back_s: from the next start to its first new step, 0 where the run did not end."""

    kind: Kind
    run: Outcome
    moment: str = ""
    back_s: float = 0.0
    redone: int = 0
    failure: str = ""

    @property
    def good(self) -> bool:
        run, samples = self.run, self.run.samples
        if self.failure or run.failure or not run.done or samples is None or samples.repeated or samples.unnamed:
            return False
        if self.kind.takes:
            return bool(samples.lost or samples.replaced)
        return run.same and run.same_samples and samples.all_there


Task = tuple[Kind, int, int]  # kind, number, ranks


def tasks(kinds: Sequence[Kind], faults: int, quick: bool) -> list[Task]:
    """Whole rounds of all kinds, at least so many faults; quick: each kind once."""
    if quick:
        return [(kind, 0, kind.worlds[0]) for kind in kinds]
    planned: list[Task] = []
    counts = dict.fromkeys((kind.name for kind in kinds), 0)
    while len(planned) < faults:
        for kind in kinds:
            for _ in range(kind.times):
                number = counts[kind.name]
                planned.append((kind, number, kind.worlds[number % len(kind.worlds)]))
                counts[kind.name] += 1
    return planned


class Soak:
    """Deals the faults out to runs."""

    def __init__(self, bench: Lab, planned: Sequence[Task]) -> None:
        self.lab, self.rows, self._runs = bench, list[Row](), 0
        self._alone = [task for task in planned if task[0].takes]
        self._last = [task for task in planned if task[0].last]
        self._queue = [task for task in planned if not task[0].takes and not task[0].last]
        bench.random.shuffle(self._queue)

    def next_run(self) -> bool:
        """Strike one run as often as there is room, and check it. False when no faults are left."""
        if self._alone:
            self._strike_alone(self._alone.pop())
        elif self._queue or self._last:
            self._strike_often()
        else:
            return False
        return True

    def _new(self, world: int) -> tuple[Run, Outcome]:
        self._runs += 1
        name = f"run-{self._runs:03d}"
        return self.lab.new_run(name, world), Outcome(name)

    def _strike_alone(self, task: Task) -> None:
        run, outcome = self._new(task[2])
        self._strike(task, run, outcome)
        self._check(run, outcome)

    def _strike_often(self) -> None:
        world = (self._queue or self._last)[0][2]
        run, outcome = self._new(world)
        run.start()
        run.until_step(1)
        try:
            while run.step() < STEPS - ROOM and (task := _next(self._queue, world)) is not None:
                self._strike(task, run, outcome)
                run.recover()  # if it went wrong
            if not run.done and (task := _next(self._last, world)) is not None:
                self._strike(task, run, outcome)
        except Exception as error:
            outcome.failure = f"{type(error).__name__}: {error}"
        self._check(run, outcome)

    def _strike(self, task: Task, run: Run, outcome: Outcome) -> None:
        kind, number, _ = task
        row = Row(kind, outcome)
        self.rows.append(row)
        fault = kind.strike(self.lab, run, number)
        run.mark()
        try:
            row.moment = next(fault)
            row.back_s, row.redone = run.recover()
            next(fault, None)
        except Exception as error:  # a row that fails is shown as failing
            row.failure = f"{type(error).__name__}: {error}"
        finally:
            fault.close()
            self.lab.layer.rest()
        print(f"{outcome.name} ({run.world}): {kind.name}, {row.moment}; {row.back_s:.1f} s {row.failure}", flush=True)
        if row.failure:
            run.down()

    def _check(self, run: Run, outcome: Outcome) -> None:
        try:
            run.finish()
            outcome.done = run.done
            outcome.same, outcome.same_samples, outcome.samples = self.lab.checked(run)
        except Exception as error:
            outcome.failure = outcome.failure or f"{type(error).__name__}: {error}"
        finally:
            run.close()
        bad = [row.kind.name for row in self.rows if row.run is outcome and not row.good]
        if bad:
            print(f"{outcome.name} FAILS: {bad}, {outcome.failure}\n{run.log.read_text()[-3000:]}", flush=True)
        else:
            shutil.rmtree(run.folder, ignore_errors=True)


def _next(queue: list[Task], world: int) -> Task | None:
    task = next((task for task in queue if task[2] == world), None)
    if task is not None:
        queue.remove(task)
    return task


# ------------------------------------------------------------------------------------------------------------ the table


def report(rows: Sequence[Row]) -> str:
    """The table: one line per kind of fault."""
    heads = [
        *("fault", "injected", "finished", "bit-identical", "samples lost", "repeated", "replaced"),
        *("steps redone (max)", "restart (s, median)", "result", "when"),
    ]
    lines = []
    for kind in KINDS.values():
        mine = [row for row in rows if row.kind is kind]
        if not mine:
            continue
        back = sorted(row.back_s for row in mine if row.back_s)
        runs = {row.run.name: row.run for row in mine}.values()
        samples = [run.samples for run in runs if run.samples is not None]
        lost, repeated, replaced = (
            str(sum(getattr(found, name) for found in samples)) for name in ("lost", "repeated", "replaced")
        )
        lines.append(
            [
                kind.name.replace("_", " "),
                f"{sum(not row.failure for row in mine)}/{len(mine)}",
                f"{sum(row.run.done for row in mine)}/{len(mine)}",
                kind.takes or f"{sum(row.run.same and row.run.same_samples for row in mine)}/{len(mine)}",
                *(lost, repeated, replaced),
                str(max(row.redone for row in mine)),
                f"{back[len(back) // 2]:.1f}" if back else "-",
                "ok" if all(row.good for row in mine) else "**FAILS**",
                "; ".join(dict.fromkeys(row.moment for row in mine if row.moment))[:100],
            ]
        )
    return table(heads, lines)


def failures(rows: Sequence[Row]) -> str:
    """A line for each fault with a wrong result."""
    lines = [
        f"- {row.kind.name} in {row.run.name}: {row.failure or row.run.failure or 'wrong result'}"
        for row in rows
        if not row.good
    ]
    return "\n".join(["", "What failed:", "", *lines, ""]) if lines else ""


def text(rows: Sequence[Row], args: argparse.Namespace) -> str:
    """The whole page."""
    words = "--quick" if args.quick else f"--faults {args.faults}"
    words += f" --seed {args.seed}{f' --only {args.only}' if args.only else ''}"
    runs = len({row.run.name for row in rows})
    bad = sum(not row.good for row in rows)
    torch, deepspeed = metadata.version("torch"), metadata.version("deepspeed")
    return f"""# Results of fault injection

{len(rows)} faults in {runs} runs, {bad} with a wrong result.

Every run is a real training of {STEPS} steps that saves every {EVERY} steps (ZeRO-2, fp32, CPU, 1 or 2 ranks). The
suite injects one fault after another and restarts the run, as SLURM or its owner would.

- *injected*: the fault happened and had an effect, of those planned. *finished*: the run reached its last step.
- *bit-identical*: weights, moments, counters and the samples of every step equal those of an undisturbed run. A fault
  that removes samples on purpose has a run of its own; the column then says what the run does with them, and each such
  sample must stand in the run's logs.
- *samples lost, repeated, replaced*: over the steps that led to the last weights, by a list that every checkpoint
  carries.
- *steps redone*: steps after the newest checkpoint. *restart*: from the start of the processes to the first new step;
  the processes are forked with their imports done.

{report(rows)}
{failures(rows)}
`python -m tests.faults {words}`: torch {torch}, deepspeed {deepspeed}, Python {platform.python_version()}, commit
{commit()}, {processor()}, {os.cpu_count()} cores.
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults", description="faults x outcomes, see tests/FAULTS.md"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=1, help="whole rounds of all kinds, at least so many faults")
    parser.add_argument("--only", default="", help=f"some of: {', '.join(KINDS)}")
    parser.add_argument("--quick", action="store_true", help="each kind once")
    parser.add_argument("--out", type=Path, help="write the table there")
    args = parser.parse_args()
    os.environ[EMULATE_FP16] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    lab.import_everything()
    start_s, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="lab-"))
    kinds = [KINDS[name] for name in args.only.split(",")] if args.only else list(KINDS.values())
    planned = tasks(kinds, args.faults, args.quick)
    bench = Lab(folder, args.seed, Layer())
    for world in {1, *(world for _, _, world in planned)}:
        bench.undisturbed(world)
    soak = Soak(bench, planned)
    gc.freeze()  # forks then share these pages
    while soak.next_run():
        if args.out:
            args.out.write_text(text(soak.rows, args))
    bad = [row for row in soak.rows if not row.good]
    print(report(soak.rows), failures(soak.rows))
    print(f"{len(soak.rows)} faults, {len(bad)} with a wrong result, {time.monotonic() - start_s:.0f} s")
    return 1 if bad else 0
