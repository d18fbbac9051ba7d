"""What wandb wrote of a run: the records of its .wandb file, blocks of 32 KiB framed as LevelDB's log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK, FULL, LAST = 32768, 1, 4


def records(path: Path) -> list[Any]:
    data, at, part, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        part += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (FULL, LAST):
            found.append(wandb_internal_pb2.Record.FromString(part))  # type: ignore[attr-defined]
            part = b""
    return found


def history(path: Path) -> list[dict[str, Any]]:
    """What was logged, in order."""
    return [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records(path)
        if record.HasField("history")
    ]


def config(path: Path) -> dict[str, Any]:
    items = [item for record in records(path) for item in (*record.run.config.update, *record.config.update)]
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
