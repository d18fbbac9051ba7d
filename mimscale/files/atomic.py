"""Files that appear under their name whole or not at all, also after a power failure.

Each function writes under a temporary name in the same folder, waits until the bytes are on the disk (fsync), renames,
and waits until the new name is on the disk too. On any failure the temporary file is removed and the old file stays.
Where two writers meet, the last rename wins and the file is whole. A symbolic link at the destination is replaced, not
followed. A new file has the permissions that the umask gives to every new file.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)


def atomic_write(path: Path, data: bytes) -> None:
    """Make `data` the content of a file. Raises OSError."""
    with atomic_stream(path) as file:
        file.write(data)


@contextmanager
def atomic_stream(path: Path, temporary: Path | None = None, buffering: int = -1) -> Iterator[BinaryIO]:
    """A binary stream for what becomes the file when the block ends well. Raises OSError.

    temporary: write under this name, in the folder of `path`; it may exist. buffering: bytes, as for `open`.
    """
    part = temporary or temporary_path(path)
    try:
        with open(part, "xb" if temporary is None else "wb", buffering) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        rename(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path for a library that opens its file itself, as safetensors does. Raises OSError.

    What stands there when the block ends well becomes the file, with the permissions of any new file.
    """
    part = temporary_path(path)
    try:
        with part.open("xb") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
        yield part
        part.chmod(mode)
        sync(part)
        rename(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that gets its name, with all that is in it, when the block ends well. Raises OSError.

    `path` must not exist, or be an empty folder. Its parents are made.
    """
    part = temporary_path(path)
    part.mkdir(parents=True)
    try:
        yield part
        for folder, _, names in os.walk(part):
            for name in names:
                sync(Path(folder, name))
            sync(Path(folder))
        rename(part, path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def rename(temporary: Path, path: Path) -> None:
    """Give a file or folder that is on the disk its name, and wait until the name is there too. Raises OSError."""
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk. Raises OSError.

    Some network and user-space file systems know no fsync of a folder; there nothing can be waited for.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def temporary_path(path: Path) -> Path:
    """A hidden name beside `path` that no other writer takes: .NAME.HOST.PID.RANDOM.tmp.SUFFIX

    Libraries infer the type of a file from its suffix, so that is kept.
    """
    owner = f"{os.uname().nodename}.{os.getpid()}.{secrets.token_hex(4)}"
    return path.with_name(f".{path.name}.{owner}.tmp{path.suffix}")


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders in `folder` whose writer was a process of this host that is no more."""
    ours = re.compile(rf"\..+\.{re.escape(os.uname().nodename)}\.(\d+)\.[0-9a-f]{{8}}\.tmp(\.[^.]+)?")
    for path in folder.glob(".*.tmp*"):
        match = ours.fullmatch(path.name)
        if match and not os.path.exists(f"/proc/{match[1]}"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
