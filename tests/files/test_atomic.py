"""A file is the old one or the new one, whole, whatever happens to its writer."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mimscale.files.atomic import (
    atomic_folder,
    atomic_path,
    atomic_stream,
    atomic_write,
    remove_leftovers,
    temporary_path,
)
from tests.monitoring.test_run_logger import no_file_may_exceed


def by_bytes(path: Path, data: bytes) -> None:
    atomic_write(path, data)


def by_stream(path: Path, data: bytes) -> None:
    with atomic_stream(path, buffering=16) as file:
        for start in range(0, len(data), 7):
            file.write(data[start : start + 7])


def by_path(path: Path, data: bytes) -> None:
    with atomic_path(path) as part:
        part.write_bytes(data)


Write = Callable[[Path, bytes], None]
writers = pytest.mark.parametrize("write", [by_bytes, by_stream, by_path])


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@writers
def test_content_and_permissions(write: Write, umask: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    for data in (b"old" * 100, b"new"):
        write(path, data)
        assert path.read_bytes() == data and stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    assert os.listdir(tmp_path) == ["file"]


@writers
def test_a_full_disk_leaves_the_old_file(write: Write, tmp_path: Path) -> None:
    path = tmp_path / "file"
    write(path, b"old")
    with no_file_may_exceed(1000), pytest.raises(OSError, match="File too large"):
        write(path, bytes(2000))
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_writer_that_fails_in_the_middle(error: type[BaseException], tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(error), atomic_stream(tmp_path / "file") as file:
        file.write(b"half")
        raise error
    with pytest.raises(error), atomic_path(tmp_path / "file") as part:
        part.write_bytes(b"half")
        raise error
    with pytest.raises(error), atomic_folder(tmp_path / "folder") as part:
        (part / "one").write_bytes(b"half")
        raise error
    assert (tmp_path / "file").read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


@writers
def test_a_link_is_replaced_and_not_followed(write: Write, tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"untouched")
    link.symlink_to(target)
    write(link, b"new")
    assert not link.is_symlink() and link.read_bytes() == b"new" and target.read_bytes() == b"untouched"


def test_a_library_that_opens_the_file_itself(umask: int, tmp_path: Path) -> None:
    """safetensors gives its files permissions of its own."""
    tensors = {"w": torch.arange(5.0)}
    with atomic_path(tmp_path / "w.safetensors") as part:
        save_file(tensors, part)
        assert not (tmp_path / "w.safetensors").exists()
    assert torch.equal(load_file(tmp_path / "w.safetensors")["w"], tensors["w"])
    assert stat.S_IMODE((tmp_path / "w.safetensors").stat().st_mode) == 0o666 & ~umask
    assert os.listdir(tmp_path) == ["w.safetensors"]


def test_a_folder(tmp_path: Path) -> None:
    out = tmp_path / "a" / "folder"
    with atomic_folder(out) as part:
        (part / "inner").mkdir()
        (part / "inner" / "file").write_bytes(b"1")
        assert not out.exists()
    assert (out / "inner" / "file").read_bytes() == b"1" and os.listdir(tmp_path / "a") == ["folder"]
    with pytest.raises(OSError, match="not empty"), atomic_folder(out) as part:
        (part / "other").write_bytes(b"2")
    assert os.listdir(out) == ["inner"] and os.listdir(tmp_path / "a") == ["folder"]


def test_a_temporary_name_of_the_callers(tmp_path: Path) -> None:
    (tmp_path / ".reserved").write_bytes(b"what a dead process left")
    with atomic_stream(tmp_path / "file", tmp_path / ".reserved") as file:
        assert sorted(os.listdir(tmp_path)) == [".reserved"]
        file.write(b"new")
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_bytes() == b"new"


def test_concurrent_writers_leave_one_whole_file(tmp_path: Path) -> None:
    """Four processes write different contents; whoever reads meanwhile finds one of them, whole."""
    path, size, times = tmp_path / "file", 100_000, 50
    code = (
        "import sys; from pathlib import Path; from mimscale.files.atomic import atomic_write\n"
        f"for _ in range({times}): atomic_write(Path(sys.argv[1]), sys.argv[2].encode() * {size})\n"
    )
    atomic_write(path, b"0" * size)
    processes = [subprocess.Popen([sys.executable, "-c", code, str(path), digit]) for digit in "1234"]
    seen = set()
    while any(process.poll() is None for process in processes):
        content = path.read_bytes()
        assert len(content) == size and content == content[:1] * size
        seen.add(content[:1])
    assert [process.returncode for process in processes] == [0] * 4
    assert path.read_bytes()[:1] in (b"1", b"2", b"3", b"4") and len(seen) > 1
    assert os.listdir(tmp_path) == ["file"]


def test_what_a_killed_writer_leaves_is_removed_later(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    atomic_write(path, b"old")
    code = (
        "import sys, time; from pathlib import Path; from mimscale.files.atomic import atomic_stream\n"
        "with atomic_stream(Path(sys.argv[1])) as file:\n"
        "    file.write(b'half'); file.flush(); print(flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"\n"
        remove_leftovers(tmp_path)
        assert len(os.listdir(tmp_path)) == 2  # its writer is alive
        process.kill()
    assert path.read_bytes() == b"old" and len(os.listdir(tmp_path)) == 2
    mine = temporary_path(path)
    mine.touch()
    elsewhere = tmp_path / f".file.json.elsewhere.{process.pid}.0a1b2c3d.tmp.json"
    elsewhere.touch()
    remove_leftovers(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"file.json", mine.name, elsewhere.name}
