"""One writer per run folder: who holds it, whether that one still lives, and how an older generation notices its end.

SLURM can start a job again while ranks of its former turn still run on a node it has lost sight of. So a claim is a
*generation*: the job and its restart count. Three rules, none of which reads a clock of another host:

1. A POSIX lock on RUN/lock.held proves on one host who lives. Between hosts it proves nothing: some file systems do not
   pass it on, and an NFS server may keep it for a node that is gone.
2. A later restart of the same job may always take over: SLURM has given the older one up. Anyone else may only when the
   holder left, or is proven dead: by rule 1 on the same host, else because its beat in RUN/lock stood still while we
   watched for `WATCHED` beats.
3. The holder reads the claim again at every beat and before every rename or removal of a checkpoint. Once another name
   stands in it, the older generation writes nothing more and ends.

RUN/lock is opened anew for each check, because a network file system promises fresh content only then; closing a file
drops the POSIX locks on it, so these are on a file of their own.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import struct
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimscale.errors import Stopped, UserError, warn
from mimscale.files.regular import open_to_write, read_regular

BEAT_S = 10.0
WATCHED = 6  # beats without which a holder on another host counts as dead
_BEAT_AT = 2048  # the claim lies before it, the beat counter behind
SILENT_S = 2 * WATCHED * BEAT_S  # some clocks differ by a minute
_FLOCK = "hhqqi4x"  # Linux's struct flock on 64 bits
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)
_GARBAGE = {"job": None, "host": "an unknown host", "pid": "unknown", "token": "garbage"}


@dataclass(frozen=True)
class Holder:
    """Who says that it writes in a run folder. alive: whether its process is there; None: on another host, or where the
    file system has no locks, so that only its beats speak for it. beat_age_s: since the last of them.
    """

    host: str
    pid: int | str
    alive: bool | None
    beat_age_s: float

    @property
    def silent(self) -> bool:
        return self.beat_age_s > SILENT_S


def holder_of(run_dir: Path) -> Holder | None:
    """Who holds a folder, for those who only read; None: nobody. Takes no lock. Raises OSError."""
    path = run_dir / "lock"
    try:
        text, beat_s = read_regular(path), path.stat().st_mtime
    except FileNotFoundError:
        return None
    if not text.strip():
        return None
    claim: dict[str, Any] = _claim_in(text[:_BEAT_AT]) or {**_GARBAGE}
    here = (claim["host"], claim.get("boot")) == (platform.node(), _boot())
    alive = _is_locked(run_dir / "lock.held", claim["pid"]) if here else None
    return Holder(claim["host"], claim["pid"], alive, max(0.0, time.time() - beat_s))


def _is_locked(path: Path, pid: int) -> bool | None:
    if pid == os.getpid():
        return True  # closing the file here would drop this process's own lock
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        found = fcntl.fcntl(file, fcntl.F_GETLK, struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
        return struct.unpack(_FLOCK, found)[0] != fcntl.F_UNLCK
    except OSError:
        return None
    finally:
        os.close(file)


class RunLock:
    """The claim of this process, rank 0 of its run, on a run folder. Raises UserError where somebody else holds it."""

    def __init__(self, run_dir: Path, beat_s: float | None = None) -> None:
        self.path = run_dir / "lock"
        self._beat_s, self._beats = BEAT_S if beat_s is None else beat_s, 0
        self._claim: dict[str, Any] = {
            "job": os.environ.get("SLURM_JOB_ID"),
            "restart": int(restart) if (restart := os.environ.get("SLURM_RESTART_COUNT", "")).isdecimal() else 0,
            "host": platform.node(),
            "boot": _boot(),
            "pid": os.getpid(),
            "parent": os.getppid(),
            "token": uuid.uuid4().hex,
        }
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._held = open_to_write(run_dir / "lock.held", os.O_RDWR | os.O_CREAT)
            self._locked = self._lock()
            self._resolve_claim(self._read())
            self._write_claim()
        except OSError as error:
            raise UserError(
                f"{run_dir} cannot be written ({error.strerror}); name a folder of yours on a disk"
            ) from None
        self._left, self._mutex = threading.Event(), threading.Lock()
        threading.Thread(target=self._beat, name="lock", daemon=True).start()

    def check(self) -> None:
        """Raise Stopped if a later generation has taken the folder over. Called before anything in it is replaced.

        Raises OSError where the claim cannot be read now.
        """
        owner = self._read()
        if owner.get("token") == _GARBAGE["token"]:
            raise OSError(errno.EIO, "cannot be read", str(self.path))
        if not owner:
            folder = "was removed" if not self.path.parent.exists() else "has lost its lock file"
            raise Stopped(f"{self.path.parent} {folder} while this run wrote in it; it ends, and writes no more")
        if owner.get("token") != self._claim["token"]:
            raise Stopped(f"{self.path.parent} was taken over by {_named(owner)}; this older start writes no more")

    def release(self) -> None:
        """Leave the folder to whoever comes next. Calling it again does nothing."""
        if self._left.is_set():
            return
        self._left.set()
        with self._mutex:
            try:
                if self._read().get("token") == self._claim["token"]:
                    os.truncate(self.path, 0)
            except OSError as error:
                warn(f"{self.path}: {error.strerror}; who starts next on another host has to watch it for a while")
            os.close(self._held)

    # ------------------------------------------------------------------------------------------------------ claiming

    def _resolve_claim(self, owner: dict[str, Any]) -> None:
        """Return when this process may write its name; else raise UserError."""
        if not owner:
            return
        if owner["token"] == _GARBAGE["token"] and owner["beat"].strip(b"\0"):  # zeros: what a power failure leaves
            raise UserError(
                f"{self.path} is damaged and does not say who uses this folder; make sure that no other start of this "
                f"run lives, remove that file, and start again"
            )
        mine = self._claim
        if owner["job"] is not None and owner["job"] == mine["job"] and owner["restart"] < mine["restart"]:
            warn(f"{self.path}: taking over from {_named(owner)}, an earlier start of this job")
            return
        here = (owner["host"], owner.get("boot")) == (mine["host"], mine["boot"])
        if not (self._locked if here and self._locked is not None else self._stands_still(owner)):
            raise UserError(
                f"{self.path.parent} is in use by {_named(owner)}; wait for it, end it, or name another --run-dir"
                f"{self._meant_as_ranks(owner)}"
            )

    def _meant_as_ranks(self, owner: dict[str, Any]) -> str:
        """What several processes of one launcher are told whose variables nobody knows."""
        siblings = (owner["host"], owner.get("boot"), owner.get("parent")) == tuple(
            self._claim[key] for key in ("host", "boot", "parent")
        )
        same_job = owner["job"] is not None and owner["job"] == self._claim["job"]
        alone = os.environ.get("WORLD_SIZE", "1") == "1"
        return "; if both are ranks of one run, they lack RANK and WORLD_SIZE: start them with torchrun or srun" * (
            alone and (siblings or same_job)
        )

    def _stands_still(self, owner: dict[str, Any]) -> bool:
        watched_s = WATCHED * self._beat_s
        warn(f"{self.path}: watching for {watched_s:g} s whether {_named(owner)} still lives")
        for _ in range(WATCHED):
            time.sleep(self._beat_s)
            if self._read() != owner:
                return False
        warn(f"{self.path}: {_named(owner)} gave no sign of life for {watched_s:g} s; taking over")
        return True

    def _lock(self) -> bool | None:
        """Take the POSIX lock. True: taken. False: somebody holds it. None: this file system has none."""
        try:
            fcntl.lockf(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            return None if error.errno in _UNSUPPORTED else False

    def _read(self) -> dict[str, Any]:
        """The claim and its beat; {} where nobody holds the folder."""
        for _ in range(3):
            try:
                text = self.path.read_bytes()
            except FileNotFoundError:
                return {}
            if not text.strip():
                return {}
            claim = _claim_in(text[:_BEAT_AT])
            if claim is not None:
                return {**claim, "beat": text[_BEAT_AT:]}
            time.sleep(0.05)  # caught between two pages of a slow file system
        return {**_GARBAGE, "beat": text}

    def _write_claim(self) -> None:
        self._write(json.dumps(self._claim).encode().ljust(_BEAT_AT), 0)

    def _write(self, content: bytes, at: int) -> None:
        file = open_to_write(self.path, os.O_WRONLY | os.O_CREAT)
        try:
            os.pwrite(file, content, at)
        finally:
            os.close(file)

    def _beat(self) -> None:
        while not self._left.wait(self._beat_s):
            with self._mutex:
                if self._left.is_set():
                    return
                try:
                    self.check()
                    self._locked = self._locked or self._lock()  # a successor gets it when the older one is gone
                    self._beats += 1
                    self._write(b"%020d" % self._beats, _BEAT_AT)  # not the claim: it may just have changed
                except OSError:  # a full or frozen disk: the next beat may get through
                    continue
                except Stopped as stopped:
                    warn(str(stopped))
                    os._exit(Stopped.code)


def _claim_in(text: bytes) -> dict[str, Any] | None:
    """What a start wrote, or None for anything else."""
    try:
        claim = json.loads(text)
    except (ValueError, RecursionError):
        return None
    kinds: dict[str, Any] = {"job": (str, type(None)), "restart": int, "host": str, "pid": int, "token": str}
    whole = isinstance(claim, dict) and all(isinstance(claim.get(key, ()), kind) for key, kind in kinds.items())
    return claim if whole else None


def _boot() -> str | None:
    """Distinguishes this start of this machine's kernel from all others; two machines may have the same name."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else None


def _named(owner: dict[str, Any]) -> str:
    job = f"job {owner['job']} restart {owner['restart']}, " if owner.get("job") else ""
    return f"{job}process {owner.get('pid')} on {owner.get('host')}"
