"""A stub for Python that behaves like the trainer towards the batch scripts, without torch, so it starts in 0.1 s.

    python stub.py -m mimscale train RECIPE --run-dir DIR [stub.steps=5] [stub.step_s=0.02] [anything else]
    python stub.py -m mimscale evaluate VERB DIR ...
    python stub.py -m mimscale results DIR ...
    python stub.py -m data_prep ... DESTINATION --part I/N
    python stub.py -m data_prep finish --wait S DESTINATION ...

stub.deaf_s: seconds before the signal handlers are installed.  stub.deaf: ignores signals.
stub.crash_rank: this rank exits with 9 if there is a file `crash`.  stub.exit: exits at once with this code.
stub.frozen: the step number does not increase.  stub.hang_at: at this step of the first start, saves and ends as the
watchdog does.  stub.every: rank 0 saves every this many steps.
evaluate leaves a report; that of STUB_FAILING_VERB fails, those in STUB_SLOW_VERBS never end their first start; knn
stores features before.
results is the real verb.
Every rank makes a file `ready.RESTART.RANK` when its signal handlers are installed.
Rank 0 holds the run lock, and the file `saves` has a line "RESTART STEP" for each of its checkpoints.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from mimscale.errors import Stopped, UserError
from mimscale.fault_tolerance.run_lock import RunLock


def train(arguments: list[str]) -> int:
    run_dir = Path(arguments[arguments.index("--run-dir") + 1])
    pairs = (a.split("=", 1) for a in arguments if "=" in a)
    options = {key.removeprefix("stub."): value for key, value in pairs if key.startswith("stub.")}
    rank, restart = int(os.environ["RANK"]), os.environ.get("SLURM_RESTART_COUNT", "0")
    lock = RunLock(run_dir, beat_s=0.5) if rank == 0 else None
    started = {"arguments": arguments, "environment": dict(os.environ), "pid": os.getpid()}
    (run_dir / f"launch.{restart}.{rank}.json").write_text(json.dumps(started))
    if "exit" in options:
        return int(options["exit"])
    if (run_dir / "done").exists():
        return 0

    def save() -> None:
        if lock is not None:
            lock.check()
            (run_dir / "checkpoints").mkdir(exist_ok=True)
            (run_dir / "checkpoints" / "latest.json").write_text(json.dumps({"folder": f"step-{step:08d}"}))
            with (run_dir / "saves").open("a") as file:
                file.write(f"{restart} {step}\n")

    saves = run_dir / "saves"
    step = int(saves.read_text().split()[-1]) if saves.exists() else 0
    time.sleep(float(options.get("deaf_s", "0")))
    signals: list[int] = []
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN if "deaf" in options else lambda number, frame: signals.append(number))
    (run_dir / f"ready.{restart}.{rank}").touch()
    stop_file = Path(os.environ["MIMSCALE_STOP_FILE"])
    if rank == 0:
        print(f"stub starts at step {step} on {os.environ['WORLD_SIZE']} ranks", flush=True)
    while step < int(options.get("steps", "5")):
        time.sleep(float(options.get("step_s", "0.02")))
        step += "frozen" not in options
        if options.get("crash_rank") == str(rank) and (run_dir / "crash").exists():
            return 9
        if options.get("hang_at") == str(step) and restart == "0":
            save()
            if rank == 0:
                Path(os.environ["MIMSCALE_REQUEUE_FILE"]).write_text(f"{step} hang\n")
            time.sleep(1)
            return 75
        if "every" in options and step % int(options["every"]) == 0:
            save()
        if signals or (stop_file.exists() and "deaf" not in options):
            save()
            if rank == 0:
                Path(os.environ["MIMSCALE_REQUEUE_FILE"]).write_text(f"{step}\n")
            break
    else:
        save()
        if rank == 0:
            (run_dir / "done").write_text(f"{step}\n")
    if lock is not None:
        lock.release()
    return 0


def evaluate(verb: str, run_dir: Path, arguments: list[str]) -> int:
    rank, restart = os.environ["RANK"], os.environ.get("SLURM_RESTART_COUNT", "0")
    (run_dir / f"evaluated.{verb}.{rank}").write_text(json.dumps(arguments))
    if os.environ.get("STUB_FAILING_VERB") == verb:
        return 5
    if verb == "knn" and rank == "0":
        folder = run_dir / "eval" / "features" / "mean-1f0c"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "part-000000.safetensors").write_bytes(bytes(1234))
    while verb in os.environ.get("STUB_SLOW_VERBS", "").split() and restart == "0":
        time.sleep(0.1)
    if rank == "0":
        row = {"network": "stub", "source": str(run_dir), "step": 5, "pool": "mean", verb: 50.0}
        report = {"protocol": {"name": verb}, "metrics": {verb: verb}, "rows": [row]}
        (run_dir / "eval").mkdir(exist_ok=True)
        (run_dir / "eval" / f"{verb}.json").write_text(json.dumps(report))
    return 0


def prepare(arguments: list[str]) -> int:
    if arguments[0] == "finish":
        for folder in arguments[3:]:
            (Path(folder) / "finished").write_text(json.dumps(sorted(p.name for p in Path(folder).iterdir())))
        return 0
    part, of = arguments[arguments.index("--part") + 1].split("/")
    destination = Path(arguments[arguments.index("--part") - 1])
    destination.mkdir(parents=True, exist_ok=True)
    (destination / f"{part}-of-{of}").write_text(json.dumps(arguments))
    return 1 if os.environ.get("STUB_FAILING_PART") == part else 0


def main() -> int:
    match sys.argv[1:]:
        case ["-m", "mimscale", "train", *arguments]:
            try:
                return train(arguments)
            except (UserError, Stopped) as error:
                print(error, file=sys.stderr)
                return 2 if isinstance(error, UserError) else Stopped.code
        case ["-m", "mimscale", "evaluate", verb, run_dir, *arguments]:
            return evaluate(verb, Path(run_dir), arguments)
        case ["-m", "mimscale", "results", *_]:
            os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
        case ["-m", "data_prep", *arguments]:
            return prepare(arguments)
    raise SystemExit(f"stub: unknown arguments: {sys.argv[1:]}")


if __name__ == "__main__":
    sys.exit(main())
