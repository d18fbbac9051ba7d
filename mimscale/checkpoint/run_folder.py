"""The run folder: what is in it, whether a run may start or go on in it, and who started it.

config.yaml       the resolved recipe
launches.jsonl    one line per start: command, versions, commit, ranks
metrics.jsonl     one line per log step
damaged.jsonl     one line per sample that could not be used
tensorboard/      the same as curves and panels
checkpoints/      see format.py
job/              what the batch scripts keep there
lock, lock.held   who writes here: fault_tolerance/run_lock.py
hang/             where each rank stood when the run stood still: fault_tolerance/watchdog.py
guard.json        why the guard ended the run;  left_out.jsonl: samples that a roll-back jumped over
stop              made by you: the run saves at its next step and stops
done              made by the run: it reached its last step
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from mimscale.config.recipes import load_recipe
from mimscale.config.run import RunConfig
from mimscale.errors import UserError
from mimscale.files.atomic import atomic_write

PACKAGES = (
    "mimscale",
    "torch",
    "torchvision",
    "deepspeed",
    "timm",
    "open_clip_torch",
    "webdataset",
    "numpy",
    "pillow",
    "simplejpeg",
)


def existing_run(run_dir: Path) -> RunConfig | None:
    """The configuration of the run that lives in `run_dir`, None for a fresh folder.

    Raises UserError for a folder that holds something else.
    """
    if (run_dir / "config.yaml").is_file():
        return load_recipe(str(run_dir / "config.yaml"))
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"--run-dir {run_dir} is a file; name a folder")
    ours = ("job", "lock", "hang", "slurm-", ".config.yaml.")  # of batch scripts, and of a start that was killed
    others = sorted(p.name for p in run_dir.iterdir() if not p.name.startswith(ours)) if run_dir.is_dir() else []
    if others:
        raise UserError(f"--run-dir {run_dir} holds something that is not a run ({others[0]}); name an empty folder")
    return None


def refuse_changes(stored: RunConfig, wanted: RunConfig, run_dir: Path) -> None:
    """A resume may change ranks, micro-batch, ZeRO stage, workers, saving and logging; anything else is refused."""
    old, new = stored.shaping(), wanted.shaping()
    changed = [
        f"{key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    if changed:
        raise UserError(
            f"{run_dir} was started with other values ({'; '.join(changed[:8])}); undo the change, "
            f"or start a new run from its weights with --fork NEW_RUN_DIR"
        )


def compiled_as_before(stored: RunConfig, wanted: RunConfig) -> RunConfig:
    """`wanted` with each teacher compiled, or not, as when the run began, where the recipe leaves it open: a resume
    then computes the same bits. Runs of older releases began uncompiled.
    """
    teachers = {
        name: teacher.model_copy(update={"compile": stored.teachers[name].compile})
        if teacher.compile == "auto"
        else teacher
        for name, teacher in wanted.teachers.items()
    }
    return wanted.model_copy(update={"teachers": teachers})


def create(run_dir: Path, run: RunConfig) -> None:
    """Write config.yaml, atomically. Raises UserError: a run whose recipe cannot be kept does not begin."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        atomic_write(run_dir / "config.yaml", yaml.safe_dump(run.dump(), sort_keys=False).encode())
    except OSError as error:
        raise UserError(f"{run_dir}/config.yaml: {error.strerror}; make room, or name another --run-dir") from None


def stop_files(run_dir: Path) -> list[Path]:
    """Files that ask a run to save and stop: one for a person, one that a batch script names for this launch."""
    named = os.environ.get("MIMSCALE_STOP_FILE")
    return [stop_wish(run_dir), *([Path(named)] if named else [])]


def stop_wish(run_dir: Path) -> Path:
    """A person's stop file. Unlike a signal it is not answered with a request to run again."""
    return run_dir / "stop"


def launch(command: Sequence[str], **values: Any) -> dict[str, Any]:
    """Who, what and with which versions, for launches.jsonl. Of the environment only SLURM's job number is kept."""
    return {
        "time": round(time.time(), 3),
        "command": list(command),
        "host": platform.node(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": git_commit(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "slurm_restart": os.environ.get("SLURM_RESTART_COUNT"),
        **values,
    }


def git_commit() -> str | None:
    """The commit of the source tree, with "+" where it was changed; None for an installed package."""
    source = Path(__file__).resolve().parent
    if not (source.parent / ".git").exists():
        return None
    try:
        commit = subprocess.run(
            ["git", "-C", str(source), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        dirty = subprocess.run(["git", "-C", str(source), "diff", "--quiet", "HEAD"], check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if dirty else "")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
