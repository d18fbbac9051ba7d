"""Checkpoints written at once and by one process, for tests of what reads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mimscale.checkpoint import format as checkpoint
from mimscale.checkpoint.host_buffer import HostBuffer


def write_shard(folder: Path, tensors: Mapping[str, Tensor], rank: int, world: int) -> dict[str, Any]:
    """Write "kind|name|start" -> 1-D tensor as one rank does, and return the file's entry in the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    name = checkpoint.shard_name(rank, world)
    size, digest = HostBuffer(tensors).fill(tensors).write(folder / name)
    return {"file": name, "bytes": size, "sha256": digest, "fragments": checkpoint.fragments(tensors)}
