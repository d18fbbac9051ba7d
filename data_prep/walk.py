"""The files below a folder: each folder is walked once, and what is passed over is counted."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from mimscale.data.sidecars import is_sidecar
from mimscale.errors import UserError
from mimscale.files.progress import no_progress


def files_below(root: Path, skipped: Counter[str], found: Callable[[int], None] = no_progress) -> list[str]:
    """Paths, relative to root, of all files that are not hidden or of the system.

    Each folder (device, inode) is walked once: first the real ones, then those that links lead to. A file that is
    reached by several paths is kept and counted. found: called with the number of files in each folder. Raises
    UserError for a folder that cannot be read: its files would be lost in silence.
    """
    names: list[str] = []
    links, walked, files_seen, again = [str(root)], set[tuple[int, int]](), set[tuple[int, int]](), 0
    while links:
        start, links = links, []
        for top in start:
            for folder, folders, files in os.walk(top, onerror=_refuse):
                if _seen(folder, walked):
                    skipped["folders reached a second time"] += 1
                    folders.clear()
                    continue
                paths = {name: os.path.join(folder, name) for name in sorted(folders) if not is_sidecar(name)}
                skipped["folders that are hidden or of the system"] += len(folders) - len(paths)
                links += [path for path in paths.values() if os.path.islink(path)]
                folders[:] = [name for name, path in paths.items() if not os.path.islink(path)]
                found(len(files))
                for file in files:
                    if is_sidecar(file):
                        skipped["hidden or of the system"] += 1
                    else:
                        path = os.path.join(folder, file)
                        again += os.path.exists(path) and _seen(path, files_seen)
                        names.append(os.path.relpath(path, root))
    if again:
        print(f"'{root}': {again:,} files are reached by a second path too, and are kept twice", file=sys.stderr)
    return names


def _refuse(error: OSError) -> None:
    """Raises UserError."""
    name = str(error.filename)
    shown = name if len(name) <= 200 else f"{name[:100]}...{name[-60:]}"
    raise UserError(f"folder '{shown}' cannot be read: {error.strerror}; repair, rename or remove it")


def _seen(path: str, seen: set[tuple[int, int]]) -> bool:
    """Whether a file or folder was seen by any path; adds it."""
    status = os.stat(path)
    identity = status.st_dev, status.st_ino
    known = identity in seen
    seen.add(identity)
    return known
