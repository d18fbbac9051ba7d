"""What is no file is refused at once, where opening it would wait for ever."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from mimscale.checkpoint.run_folder import WRITTEN, refuse_special_files
from mimscale.errors import UserError
from mimscale.fault_tolerance.retrying_writer import RetryingWriter
from mimscale.fault_tolerance.run_lock import RunLock
from mimscale.files.regular import read_regular, special_files
from mimscale.monitoring.damage_log import DamageLog


def test_files_are_read_and_pipes_are_not(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"contents")
    assert read_regular(tmp_path / "file") == b"contents"
    os.mkfifo(tmp_path / "pipe")
    os.symlink("/dev/zero", tmp_path / "zeros")
    for name, kind in (("pipe", "a named pipe"), ("zeros", "a device")):
        with pytest.raises(OSError, match=f"it is {kind}, not a file"):
            read_regular(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["lock", "damaged.jsonl", "checkpoints/step-00000004/COMPLETE", "hang/rank-0.txt"])
def test_a_pipe_anywhere_in_a_run_folder_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "run" / name).parent.mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("")
    os.symlink("nowhere", tmp_path / "run" / "broken")
    os.mkfifo(tmp_path / "run" / "of-others")  # nobody opens it, and the folder may be somebody's home
    refuse_special_files(tmp_path / "run", tmp_path / "absent")
    os.mkfifo(tmp_path / "run" / name)
    with pytest.raises(UserError, match=f"{name} is a named pipe, not a file of a run; remove it"):
        refuse_special_files(tmp_path / "run")


def test_sockets_and_links_to_devices_are_found(tmp_path: Path) -> None:
    os.symlink("/dev/null", tmp_path / "null")
    with socket.socket(socket.AF_UNIX) as server, pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)  # the name of a socket has at most 107 bytes
        server.bind("socket")
        assert sorted((path.name, kind) for path, kind in special_files(tmp_path)) == [
            ("null", "a device"),
            ("socket", "a socket"),
        ]


def linked(folder: Path, name: str) -> tuple[Path, Path]:
    """A link of that name in a folder, and the file of somebody else that it points to."""
    other, link = folder / "of-others", folder / name
    other.write_bytes(b"")
    link.symlink_to(other)
    return link, other


def test_nothing_is_written_through_a_link(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lines that are appended, and the claim on the folder, which would be cut to nothing at the end."""
    link, other = linked(tmp_path, "metrics.jsonl")
    writer = RetryingWriter()
    writer.append(link, "line\n")
    assert writer.flush(patience_s=600.0) == [f"{link} (it is a link, which is not followed)"]
    assert "metrics.jsonl: it is a link, which is not followed" in capsys.readouterr().err
    for name in ("lock", "lock.held"):
        folder = tmp_path / f"with-{name}"
        folder.mkdir()
        _, claimed = linked(folder, name)
        with pytest.raises(UserError, match="cannot be written .it is a link, which is not followed"):
            RunLock(folder)
        assert claimed.read_bytes() == b""
    assert other.read_bytes() == b"" and link.is_symlink()


@pytest.mark.parametrize("name", WRITTEN)
def test_a_link_that_a_run_would_write_through_is_named(name: str, tmp_path: Path) -> None:
    """Also one to a folder, in which it would remove the checkpoints of another run."""
    run_dir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run_dir.mkdir()
    elsewhere.mkdir()
    (run_dir / "latest.log").symlink_to("slurm-7.out")  # a person's own
    (tmp_path / "as-a-whole").symlink_to(run_dir)
    refuse_special_files(tmp_path / "as-a-whole")
    (run_dir / name).symlink_to(elsewhere)
    with pytest.raises(UserError, match=f"{name} is a link, which a run that writes does not follow"):
        refuse_special_files(tmp_path / "as-a-whole")


def test_the_list_of_damaged_samples_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "damaged.jsonl")
    with pytest.raises(UserError, match="damaged.jsonl cannot be read .it is a named pipe, not a file"):
        DamageLog(tmp_path / "damaged.jsonl", 10)
