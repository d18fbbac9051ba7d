"""What is no file is refused at once, where opening it would wait for ever."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from mimscale.checkpoint.run_folder import refuse_special_files
from mimscale.errors import UserError
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


def test_the_list_of_damaged_samples_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "damaged.jsonl")
    with pytest.raises(UserError, match="damaged.jsonl cannot be read .it is a named pipe, not a file"):
        DamageLog(tmp_path / "damaged.jsonl", 10)
