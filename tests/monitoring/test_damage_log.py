"""The list of damaged samples survives the damage it is about."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mimscale.errors import UserError
from mimscale.monitoring.damage_log import DamageLog

ENTRY = {"sample": 5, "shard": "a.tar", "key": "k", "reason": "cut"}


def test_lines_that_are_no_entries_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "damaged.jsonl"
    others = (
        b'{"sample": 6, "shard": "a", "key": "k\xff", "reason": "x"}',
        b'{"samqle": 7, "shard": "a", "key": "k", "reason": "x"}',
        b'{"sample": "8", "shard": "a", "key": "k", "reason": "x"}',
        b'{"sample": true, "shard": "a", "key": "k", "reason": "x"}',
        b'{"sample": 9, "shard": 1, "key": "k", "reason": "x"}',
        b'{"sample": 9}',
        b"5",
        b"[]",
        b"null",
        b"[" * 5000,
        b"\0\0\0",
        b'{"sample": 10, "shard"',
    )
    path.write_bytes(b"\n".join((*others, json.dumps(ENTRY).encode(), b"")))
    log = DamageLog(path, limit=1)
    assert log.total == 1 and not log.full and "a.tar: k (cut)" in log.verdict()
    assert DamageLog(tmp_path / "absent.jsonl", limit=0).total == 0
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder cannot be read"):
        DamageLog(tmp_path / "folder", limit=0)
