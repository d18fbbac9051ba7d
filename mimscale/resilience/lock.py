"""One writer per run folder: who holds it, whether that one still lives, and how an older generation notices its end.

SLURM can start a job again while ranks of its former turn still run on a node it has lost sight of. So a claim is a
*generation*: the job and its restart count. Three rules, none of which trusts a clock:

1. A POSIX lock on RUN/lock proves that its holder lives, wherever the file system has such locks.
2. A later restart of the same job may always take over: SLURM has given the older one up. Anyone else may only when the
   holder left, or is proven dead: by rule 1 on the same host, else because its beat stood still while we watched.
3. The holder reads the file again at every beat and before every rename or removal of a checkpoint. Once another name
   stands in it, the older generation writes nothing more and ends.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from mimscale.errors import Stopped, UserError

BEAT_S = 10.0
_BEAT_AT = 2048  # the claim lies before it, the beat counter behind
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)


class Lock:
    """The claim of this process, rank 0 of its run, on a run folder. Raises UserError where somebody else holds it."""

    def __init__(self, run_dir: Path, beat_s: float = BEAT_S) -> None:
        self.path = run_dir / "lock"
        self._beat_s, self._beats, self._mutex = beat_s, 0, threading.Lock()
        self._claim: dict[str, Any] = {
            "job": os.environ.get("SLURM_JOB_ID"),
            "restart": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
            "host": platform.node(),
            "pid": os.getpid(),
            "token": uuid.uuid4().hex,
        }
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UserError(
                f"{run_dir} cannot be written ({error.strerror}); name a folder of yours on a disk"
            ) from None
        self._locked: bool | None = False
        self._settle_with(self._read())
        os.pwrite(self._file, json.dumps(self._claim).encode().ljust(_BEAT_AT), 0)
        self._left = threading.Event()
        threading.Thread(target=self._beat, name="lock", daemon=True).start()

    def check(self) -> None:
        """Raise Stopped if a later generation has taken the folder over. Called before anything in it is replaced."""
        owner = self._read()
        if owner.get("token") != self._claim["token"]:
            raise Stopped(f"{self.path.parent} was taken over by {_named(owner)}; this older start writes no more")

    def release(self) -> None:
        """Leave the folder to whoever comes next."""
        self._left.set()
        with self._mutex:
            if self._read().get("token") == self._claim["token"]:
                os.ftruncate(self._file, 0)
            os.close(self._file)

    # ------------------------------------------------------------------------------------------------------ claiming

    def _settle_with(self, owner: dict[str, Any]) -> None:
        """Return when this process may write its name; else raise UserError."""
        mine, self._locked = self._claim, self._lock()
        successor = owner.get("job") is not None and owner["job"] == mine["job"] and owner["restart"] < mine["restart"]
        if not owner or successor:
            return
        dead = bool(self._locked) and owner["host"] == mine["host"]
        if self._locked is not False and not dead:  # the file system may not tell us about locks of other hosts
            watched_s = 2.5 * self._beat_s
            print(f"{self.path}: watching for {watched_s:g} s whether {_named(owner)} still lives", file=sys.stderr)
            time.sleep(watched_s)
            dead = self._read() == owner
        if not dead:
            gone = f"; remove {self.path} if that host is dead" if owner["host"] != mine["host"] else ""
            raise UserError(
                f"{self.path.parent} is in use by {_named(owner)}; wait for it, end it, or name another --run-dir{gone}"
            )

    def _lock(self) -> bool | None:
        """Take the POSIX lock. True: taken. False: somebody holds it. None: this file system has none."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            return None if error.errno in _UNSUPPORTED else False

    # Only ever through the one descriptor: closing another one of the same file would drop a POSIX lock.

    def _read(self) -> dict[str, Any]:
        for _ in range(3):
            text = os.pread(self._file, 2 * _BEAT_AT, 0)
            try:
                return {**json.loads(text[:_BEAT_AT]), "beat": text[_BEAT_AT:]} if text.strip() else {}
            except ValueError:  # caught between two pages of a slow file system
                time.sleep(0.05)
        return {}

    def _beat(self) -> None:
        while not self._left.wait(self._beat_s):
            with self._mutex:
                if self._left.is_set():
                    return
                try:
                    self.check()
                    self._locked = self._locked or self._lock()  # a successor gets it when the older one is gone
                    self._beats += 1
                    os.pwrite(self._file, b"%020d" % self._beats, _BEAT_AT)  # not the claim: it may just have changed
                except OSError:  # a full or frozen disk: whoever wants the folder will ask the lock first
                    continue
                except Stopped as stopped:
                    print(stopped, file=sys.stderr, flush=True)
                    os._exit(Stopped.code)


def _named(owner: dict[str, Any]) -> str:
    job = f"job {owner['job']} restart {owner['restart']}, " if owner.get("job") else ""
    return f"{job}process {owner.get('pid')} on {owner.get('host')}"
