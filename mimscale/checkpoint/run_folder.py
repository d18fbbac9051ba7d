"""The run folder: what is in it, whether a run may start or go on in it, and who started it.

config.yaml       the resolved recipe
launches.jsonl    one line per start: command, versions, commit, ranks
metrics.jsonl     one line per log step
damaged.jsonl     one line per sample that could not be used
evals.jsonl       of metrics.jsonl, the evaluations while it trained
panels/           images of what the method sees and predicts, a PNG per panel: monitoring/panel_files.py
tensorboard/, wandb/   the same as curves and panels
wandb.json, mlflow.json   under which id these know the run
checkpoints/      see format.py
job/              what the batch scripts keep there
lock, lock.held   who writes here: fault_tolerance/run_lock.py
hang/             where each rank stood when the run stood still: fault_tolerance/watchdog.py
guard.json        why the guard ended the run;  left_out.jsonl: samples that a roll-back jumped over
stop              made by you: the run saves at its next step and stops
done              made by the run: it reached its last step
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from mimscale.config.difference import differences
from mimscale.config.recipes import load_recipe
from mimscale.config.run import RunConfig
from mimscale.distributed.coordination import Coordinator
from mimscale.errors import UserError, is_address, printable, without_secrets
from mimscale.files.atomic import atomic_write
from mimscale.files.regular import special_files

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

WRITTEN = (
    *("launches.jsonl", "metrics.jsonl", "damaged.jsonl", "evals.jsonl", "left_out.jsonl", "lock", "lock.held"),
    *("checkpoints", "hang", "job", "panels", "tensorboard", "wandb"),
)
"""What a run appends to or writes in."""
REPLACED = ("config.yaml", "wandb.json", "mlflow.json", "guard.json", "done", "stop")
"""What appears whole, in the place of whatever stood there."""


def check_names(*folders: Path) -> None:
    """Raise UserError for folders that no file system or no library can name."""
    for folder in folders:
        shown = printable(str(folder)) if len(str(folder)) < 300 else f"{printable(str(folder)[:80])}..."
        if is_address(folder):
            raise UserError(f"--run-dir {shown} is an address; name a folder on a disk of this machine")
        try:
            str(folder).encode()
        except UnicodeEncodeError:
            raise UserError(f"--run-dir {shown} is not UTF-8; name a folder in UTF-8") from None
        try:
            os.stat(folder)
        except FileNotFoundError:
            if os.path.islink(folder):
                raise UserError(f"--run-dir {shown} is a link to nothing; make the folder that it points to") from None
        except PermissionError:
            pass  # what it means depends on who asks
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"--run-dir {shown} cannot be used: {why}; name another folder") from None


def refuse_special_files(*folders: Path) -> None:
    """Raise UserError for a named pipe, socket or device in a run folder, which would hang whoever opens it, and for a
    link in the place of what a run goes on writing: it would write, and remove old checkpoints, in another place.

    Nothing else is read: the folder may turn out to be somebody's home.
    """
    for folder in folders:
        for name in WRITTEN:
            if os.path.islink(folder / name):
                raise UserError(
                    f"{folder / name} is a link, which a run that writes does not follow; put in its place what it "
                    f"points to (the run folder as a whole may be a link)"
                )
        for name in (*WRITTEN, *REPLACED):
            for path, kind in special_files(folder / name):
                raise UserError(f"{path} is {kind}, not a file of a run; remove it, and start again")


def existing_run(run_dir: Path) -> RunConfig | None:
    """The configuration of the run that lives in `run_dir`, None for a fresh folder.

    Raises UserError for a folder that holds something else.
    """
    if (run_dir / "config.yaml").is_file():
        return load_recipe(str(run_dir / "config.yaml"))
    if (run_dir / "checkpoints").is_dir() and any((run_dir / "checkpoints").iterdir()):
        raise UserError(
            f"{run_dir}/config.yaml is missing, but there are checkpoints; copy it back (the manifest.json of a "
            f"checkpoint holds it under config), or name another --run-dir"
        )
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"--run-dir {run_dir} is a file; name a folder")
    ours = ("job", "lock", "hang", "slurm-", ".config.yaml.")  # of batch scripts, and of a start that was killed
    others = sorted(p.name for p in run_dir.iterdir() if not p.name.startswith(ours)) if run_dir.is_dir() else []
    if others:
        raise UserError(f"--run-dir {run_dir} holds something that is not a run ({others[0]}); name an empty folder")
    return None


def refuse_changes(stored: RunConfig, wanted: RunConfig, run_dir: Path) -> None:
    """A resume may change ranks, micro-batch, ZeRO stage, workers, saving and logging; anything else is refused."""
    found = differences([stored.shaping(), wanted.shaping()])
    changed = [f"{key}: {old} -> {new}" for key, (old, new) in sorted(found.items())]
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


def prove_shared(run_dir: Path, coordinator: Coordinator, patience_s: float = 60.0) -> None:
    """Raise UserError, on all ranks, unless each of them sees in `run_dir` what rank 0 writes there. Collective.

    patience_s: for a network file system, which may remember for a while that the folder was not there. Ranks of rank
    0's host have no such excuse.
    """
    if coordinator.world == 1:
        return
    name = coordinator.broadcast(f"lock.{uuid.uuid4().hex}")
    here = (platform.node(), os.path.abspath(run_dir))
    path = run_dir / name
    first, failure = coordinator.on_rank0(_write_token, path)
    seen = not failure and _sees(path, patience_s if platform.node() != first else 0.0)
    blind = [(rank, *where) for rank, (there, where) in enumerate(coordinator.gather((seen, here))) if not there]
    if coordinator.rank == 0:
        with suppress(OSError):
            path.unlink()
    if failure:
        raise UserError(f"{run_dir} cannot be written ({failure}); name a folder of yours on a disk", everywhere=True)
    if blind:
        rank, host, folder = blind[0]
        raise UserError(
            f"--run-dir {run_dir} is not shared: rank {rank} on {host} does not see in {folder} what rank 0 on {first} "
            f"wrote there; name a folder on a file system that all nodes share",
            everywhere=True,
        )


def _write_token(path: Path) -> tuple[str, str]:
    try:
        atomic_write(path, b"shared\n")
    except OSError as error:
        return platform.node(), error.strerror or str(error)
    return platform.node(), ""


def _sees(path: Path, patience_s: float) -> bool:
    end_s, pause_s = time.monotonic() + patience_s, 0.05
    while True:
        with suppress(OSError):
            if path.read_bytes() == b"shared\n":
                return True
        if time.monotonic() >= end_s:
            return False
        with suppress(OSError):
            os.listdir(path.parent)  # makes some file systems ask their server again
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 2.0)


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
        "command": [without_secrets(word) for word in command],
        "host": platform.node(),
        "python": platform.python_version(),
        "packages": versions(),
        "commit": git_commit(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "slurm_restart": os.environ.get("SLURM_RESTART_COUNT"),
        **values,
    }


def git_commit() -> str | None:
    """The commit of the source tree, with "+" where it was changed; None for an installed package."""
    source = Path(__file__).resolve().parent.parent  # the package, which stands beside .git
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


def head_commit() -> str | None:
    """The commit that is checked out, read from the repository's files; None for an installed package."""
    git = Path(__file__).resolve().parent.parent.parent / ".git"
    try:
        if git.is_file():  # a work tree beside the repository
            git = git.parent / git.read_text().partition("gitdir:")[2].strip()
        head = (git / "HEAD").read_text().strip()
        name = head.removeprefix("ref: ")
        if name == head:
            return head
        shared = git / "commondir"
        root = git / shared.read_text().strip() if shared.is_file() else git
        if (root / name).is_file():
            return (root / name).read_text().strip()
        packed = (line.split() for line in (root / "packed-refs").read_text().splitlines())
        return next((words[0] for words in packed if words[1:] == [name]), None)
    except (OSError, ValueError):
        return None


def code() -> dict[str, str]:
    """What computes here, for ranks that are to be the same: this package's source, Python and the packages."""
    return {
        "code": f"{head_commit() or 'installed'}, {source_digest()[:12]}",
        "python": platform.python_version(),
        **{name: str(version) for name, version in versions().items()},
    }


def source_digest() -> str:
    """sha256 over this package's modules, whether they are in a repository, changed, or installed."""
    digest, root = hashlib.sha256(), Path(__file__).resolve().parent.parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def versions() -> dict[str, str | None]:
    """The installed version of each package that decides what a run computes."""
    return {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
