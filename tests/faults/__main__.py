"""Faults x outcomes:  python -m tests.faults [--seed S] [--repeat N] [--only NAME,...] [--out tests/FAULTS.md]

Every fault strikes a real run of 24 steps that saves at every fourth. The run is then started again, as SLURM or its
owner would, until it is done, and compared with one that nothing struck.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.__main__ import main as data_prep
from mimscale.bench._report import origin, table
from mimscale.data.synthetic import make_image_folder
from mimscale.engine.world import EMULATE_FP16
from mimscale.resilience import checkpoint
from mimscale.resilience.saver import Saver
from tests import ranks
from tests.faults import lab
from tests.faults.lab import EVERY, STEPS, Run
from tests.faulty import plant

Fault = Callable[["Lab", Run, int], "str | None"]
FAULTS: dict[str, tuple[int, int, Fault]] = {}  # name -> (ranks, times per round, what happens)
GUARD = ("guard.skips=3", "guard.margin=1")


@dataclass
class Row:
    fault: str
    moment: str
    done: bool
    same: bool
    redone: int
    back_s: float
    starts: int


def fault(world: int = 1, times: int = 1) -> Callable[[Fault], Fault]:
    """Register a fault: it starts the run, strikes, and returns its moment; the lab finishes the run."""

    def add(function: Fault) -> Fault:
        FAULTS[function.__name__] = (world, times, function)
        return function

    return add


class Lab:
    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        make_image_folder(folder / "images", classes=4, per_class=20, side=48)
        assert data_prep(["folder", str(folder / "images"), str(folder / "shards"), "--shard-samples", "16"]) == 0
        (folder / "taught").mkdir()
        limits: dict[str, Any] = {"stall_s": 60.0, "startup_s": 600.0}
        sections: dict[str, dict[str, Any]] = {
            "schedule": {"steps": STEPS},
            "checkpoint": {"every": EVERY, "patience_s": 3.0, "keep": 3},
        }
        self.recipe = ranks.recipe(folder, folder / "shards", "mae", **sections, watchdog=limits)
        self.taught = ranks.recipe(folder / "taught", folder / "shards", "maskalign", **sections)
        self.shim = folder / "shim.so"
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-o", str(self.shim), str(Path(__file__).with_name("shim.c")), "-ldl"],
            check=True,
        )
        self.whole = {world: Run(self.recipe, folder / f"whole-{world}", world) for world in (1, 2)}
        for run in self.whole.values():
            run.finish()
            assert run.done, Path(f"{run.folder}.log").read_text()[-3000:]
        (first, *_) = self.whole[1].events("saved")
        self.save_s = first["written_s"]

    def step(self) -> int:
        return self.random.randint(EVERY + 1, STEPS - 4)

    def strike(self, name: str, number: int) -> Row:
        world, _, function = FAULTS[name]
        run = Run(self.recipe, self.folder / f"{name}-{number}", world)
        try:
            moment = function(self, run, number)
            back_s = run.finish()
            same = run.done and ranks.identical(run.folder, self.whole[world].folder)
        except Exception as error:  # a row that fails is shown as failing
            moment, back_s, same = f"{type(error).__name__}: {error}"[:80], 0.0, False
        finally:
            run.kill()
        row = Row(name, moment or "", run.done, same, run.redone(), back_s, run.starts)
        if row.done and row.same:
            shutil.rmtree(run.folder, ignore_errors=True)
        return row


# ------------------------------------------------------------------------------------------------------------ killed


@fault(times=8)
def kill_trainer(lab: Lab, run: Run, number: int) -> str:
    step = lab.step()
    run.start()
    run.until(step)
    run.kill()
    run.end()
    return f"step {step}"


@fault(times=4)
def kill_loader_worker(lab: Lab, run: Run, number: int) -> str:
    """As the out-of-memory killer does."""
    step = lab.step()
    run.start()
    run.until(step)
    run.kill(which=run.workers())
    run.end()
    return f"step {step}"


def _kill_of_two(lab: Lab, run: Run, which: list[int]) -> str:
    step = lab.step()
    run.start()
    run.until(step)
    run.kill(which=[run.pids[rank] for rank in which])
    run.end()
    return f"step {step}"


@fault(world=2, times=3)
def kill_rank_0(lab: Lab, run: Run, number: int) -> str:
    return _kill_of_two(lab, run, [0])


@fault(world=2, times=3)
def kill_rank_1(lab: Lab, run: Run, number: int) -> str:
    """The dead peer: the other rank's collective fails, and it leaves."""
    return _kill_of_two(lab, run, [1])


@fault(world=2, times=3)
def kill_all_ranks(lab: Lab, run: Run, number: int) -> str:
    return _kill_of_two(lab, run, [0, 1])


@fault(times=20)
def kill_inside_a_save(lab: Lab, run: Run, number: int) -> str:
    """At evenly spaced moments from the copy to the commit of the second save."""
    part = number % 20 / 20

    def planted() -> None:
        save = Saver.save

        def doomed(self: Saver, step: int, *rest: object) -> None:
            if step == 2 * EVERY:
                threading.Timer(part * lab.save_s, os.kill, (os.getpid(), signal.SIGKILL)).start()
            save(self, step, *rest)  # type: ignore[arg-type]

        Saver.save = doomed  # type: ignore[method-assign, assignment]

    run.start(planted)
    run.end_after()
    return f"{part:.0%} of the save"


# ------------------------------------------------------------------------------------------------------- damaged files


def _damage(lab: Lab, run: Run, harm: Callable[[Path], object]) -> str:
    run.start()
    run.until_saved(2)
    run.kill()
    run.end()
    assert not run.done and len(checkpoint.steps(run.folder / "checkpoints")) > 1, "not killed between two saves"
    newest = run.newest()
    harm(newest)
    return f"checkpoint of step {checkpoint.step_of(newest)}"


def _flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at % len(content)] ^= 4
    path.write_bytes(content)


def _shard(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


@fault(times=4)
def bit_flip_in_a_shard(lab: Lab, run: Run, number: int) -> str:
    return _damage(lab, run, lambda newest: _flip(_shard(newest), lab.random.randrange(10**6)))


@fault(times=3)
def bit_flip_in_the_manifest(lab: Lab, run: Run, number: int) -> str:
    return _damage(lab, run, lambda newest: _flip(newest / "manifest.json", lab.random.randrange(10**6)))


@fault(times=3)
def truncated_shard(lab: Lab, run: Run, number: int) -> str:
    return _damage(lab, run, lambda newest: os.truncate(_shard(newest), lab.random.randrange(1000)))


@fault(times=2)
def missing_shard(lab: Lab, run: Run, number: int) -> str:
    return _damage(lab, run, lambda newest: _shard(newest).unlink())


@fault(times=2)
def missing_complete_marker(lab: Lab, run: Run, number: int) -> str:
    return _damage(lab, run, lambda newest: (newest / "COMPLETE").unlink())


# ------------------------------------------------------------------------------------------------------------- disks


@fault(times=3)
def disk_full(lab: Lab, run: Run, number: int) -> str:
    """Checkpoints on a tmpfs with room for less than two of them, which grows while the run goes on."""
    size = sum(path.stat().st_size for path in lab.whole[1].newest().iterdir())
    root = run.folder / "checkpoints"
    run.start()
    run.until(1)
    run.kill()
    run.end()
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(1.6 * size) // 1024}k", "tmpfs", str(root)], check=True)
    try:
        run.start()
        run.until(4 * EVERY)
        subprocess.run(["mount", "-o", "remount,size=64m", str(root)], check=True)
        run.end_after()
        failed = len(run.events("save_failed")) + len(run.events("save_skipped"))
        kept = run.folder.with_name(f"{run.folder.name}-kept")
        shutil.copytree(root, kept)
    finally:
        subprocess.run(["umount", str(root)], check=True)
    root.rmdir()
    kept.rename(root)
    return f"{failed} saves left out"


@fault(times=3)
def disk_answers_eio(lab: Lab, run: Run, number: int) -> str:
    return _shimmed(lab, run, FAULT_EIO="3")


@fault(times=2)
def disk_is_slow(lab: Lab, run: Run, number: int) -> str:
    return _shimmed(lab, run, FAULT_SLOW_MS="300")


def _shimmed(lab: Lab, run: Run, **environment: str) -> str:
    """In processes of their own, because a preloaded library must be there from the start."""
    words = ranks.command(1, "mimscale", "train", run.recipe, "--run-dir", run.folder)
    done = subprocess.run(
        words, env={**ranks.environment(), "LD_PRELOAD": str(lab.shim), **environment}, capture_output=True, text=True
    )
    run.starts += 1
    left_out = len(run.events("save_failed")) + len(run.events("save_skipped"))
    return f"{done.stderr.count('trying again')} tries more, {left_out} saves left out"


# ------------------------------------------------------------------------------------------------- signals and clocks


@fault(times=3)
def usr1_at_start_up(lab: Lab, run: Run, number: int) -> str:
    run.start()
    time.sleep(0.3 * number)
    run.kill(signal.SIGUSR1)
    run.end_after()
    return f"after {0.3 * number:.1f} s"


@fault(times=3)
def usr1_inside_a_save(lab: Lab, run: Run, number: int) -> str:
    run.start()
    run.until(EVERY)
    run.kill(signal.SIGUSR1)
    run.end_after()
    return f"step {EVERY}"


@fault(times=2)
def usr1_at_the_end(lab: Lab, run: Run, number: int) -> str:
    run.start()
    run.until(STEPS)
    run.kill(signal.SIGUSR1)
    run.end_after()
    return f"step {STEPS}"


@fault(times=2)
def requeue_storm(lab: Lab, run: Run, number: int) -> str:
    for turn in range(1, 6):
        run.start()
        run.until(3 * turn)
        run.kill(signal.SIGUSR1)
        run.end_after()
    return "five times in a row"


@fault(times=2)
def clock_goes_back_a_day(lab: Lab, run: Run, number: int) -> str:
    def planted() -> None:
        now, now_ns = time.time, time.time_ns
        time.time = lambda: now() - 86400
        time.time_ns = lambda: now_ns() - 86400 * 10**9

    run.start()
    run.until(9)
    run.kill()
    run.end()
    run.start(planted)
    run.until(15)
    run.kill()
    run.end()
    return "between two starts"


@fault(world=2, times=2)
def hung_rank(lab: Lab, run: Run, number: int) -> str:
    run.overrides = ("watchdog.stall_s=10",)
    run.start()
    run.until(lab.step())
    run.kill(signal.SIGSTOP, [run.pids[1]])
    while run.alive() and not (run.folder / "hang" / "rank-0.txt").exists():
        time.sleep(0.05)
    run.end()
    run.overrides = ()
    return "the watchdog barked" if (run.folder / "hang" / "rank-0.txt").exists() else "no report"


# ---------------------------------------------------------------------------------------------------------- bad numbers


def _planted(lab: Lab, run: Run, **faults: object) -> str:
    """A bad batch costs its step: the run ends, but as another one."""
    run.start(lambda: plant(faults, 16))
    run.end_after()
    return f"{len(run.events('skipped'))} steps skipped, {len(run.events('rollback'))} roll-backs"


@fault(times=2)
def nan_in_the_data(lab: Lab, run: Run, number: int) -> str:
    return _planted(lab, run, images={lab.step(): None})


@fault(times=2)
def nan_in_many_batches(lab: Lab, run: Run, number: int) -> str:
    run.overrides = GUARD
    return _planted(lab, run, images=dict.fromkeys((10, 11, 12)))


@fault(times=2)
def infinite_gradients(lab: Lab, run: Run, number: int) -> str:
    return _planted(lab, run, gradients=[lab.step()])


@fault(times=2)
def nan_from_the_teacher(lab: Lab, run: Run, number: int) -> str:
    run.recipe = lab.taught
    return _planted(lab, run, teacher=[lab.step()])


@fault(times=2)
def corrupted_shard_in_mid_run(lab: Lab, run: Run, number: int) -> str:
    """Pictures of one shard turn to noise: others take their places, counted and named."""
    shards = run.folder.with_name(f"{run.folder.name}-shards")
    shutil.copytree(lab.folder / "shards", shards)
    run.overrides = (f"data.shards={shards}", "data.max_damaged=80")
    run.start()
    run.until(5)
    victim = sorted(shards.glob("*.tar"))[2]
    content = bytearray(victim.read_bytes())
    for at in range(1000, len(content), 97):
        content[at] ^= 255
    with victim.open("r+b") as file:
        file.write(content)
    run.end_after()
    return f"{len(run.events('damaged'))} samples replaced"


CHANGED = {  # the run is meant to end, but not as the one that nothing struck: it saw other samples
    *("nan_in_the_data", "nan_in_many_batches", "infinite_gradients", "nan_from_the_teacher"),
    "corrupted_shard_in_mid_run",
}


def report(rows: list[Row]) -> str:
    """The table: one line per kind of fault."""
    lines = []
    for name in FAULTS:
        mine = [row for row in rows if row.fault == name]
        if mine:
            done, same = sum(row.done for row in mine), sum(row.same for row in mine)
            back = sorted(row.back_s for row in mine if row.back_s)
            good = done == len(mine) and (name in CHANGED or same == len(mine))
            lines.append(
                [
                    name.replace("_", " "),
                    f"{done}/{len(mine)}",
                    "other samples" if name in CHANGED else f"{same}/{len(mine)}",
                    f"{max(row.redone for row in mine)}",
                    f"{back[len(back) // 2]:.1f}" if back else "-",
                    "ok" if good else "**FAILS**",
                    "; ".join(dict.fromkeys(row.moment for row in mine))[:90],
                ]
            )
    heads = ["fault", "reached the last step", "bit-identical", "steps redone (most)", "back after (s, median)", "", ""]
    return table(heads, lines)


def failing(rows: list[Row]) -> list[Row]:
    return [row for row in rows if not row.done or (not row.same and row.fault not in CHANGED)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeat", type=int, default=1, help="rounds of all faults")
    parser.add_argument("--only", default="", help=f"some of {', '.join(FAULTS)}")
    parser.add_argument("--quick", action="store_true", help="each fault once")
    parser.add_argument("--out", type=Path, help="write the table there")
    args = parser.parse_args()
    os.environ[EMULATE_FP16] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    lab.prepare_imports()
    chosen = args.only.split(",") if args.only else list(FAULTS)
    folder = Path(tempfile.mkdtemp(prefix="faults-"))  # not one that a forked trainer would tidy up at its exit
    rows: list[Row] = []
    try:
        bench = Lab(folder, args.seed)
        for name in chosen:
            for number in range(1 if args.quick else FAULTS[name][1] * args.repeat):
                rows.append(bench.strike(name, number))
                print(rows[-1], flush=True)
                if args.out:
                    args.out.write_text(text(rows, args))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(report(rows))
    return 1 if failing(rows) else 0


def text(rows: list[Row], args: argparse.Namespace) -> str:
    rounds = "--quick" if args.quick else f"--repeat {args.repeat}"
    return (
        "# Faults and what became of the runs they struck\n\n"
        f"{len(rows)} faults, {len(failing(rows))} of them with a result that is not as promised. Runs of {STEPS} "
        f"steps that save at every {EVERY}th, ZeRO-2, fp32, CPU; compared with runs that nothing struck: weights, "
        "moments, counters. Steps redone come after the last checkpoint and are part of no final state twice. Where a "
        "fault takes samples away, the run ends as another one and only its reaching the last step is checked.\n\n"
        f"{report(rows)}\n\n`python -m tests.faults {rounds} --seed {args.seed}`: {origin().split('`, ')[-1]}.\n"
    )


if __name__ == "__main__":
    sys.exit(main())
