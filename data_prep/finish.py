"""From the sidecars of finished shards to the manifest, which says that a data set is complete.

Every writer tries this when it is done, and any later call may do it again: it needs nothing but the destination. That
matters on network file systems, where two writers that end at the same moment may each not yet see the other's files.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mimscale.data.manifest import MANIFEST, Shard, save_manifest
from mimscale.errors import UserError
from mimscale.files.atomic import remove_leftovers

PLAN = "plan.json"
POLL_S = 2.0


class PlanFile(BaseModel):
    """plan.json: what claims a destination. description: of the source."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    plan: str
    options: dict[str, Any]
    samples: int
    shards: int
    classes: list[str] | None
    description: dict[str, Any]


class Sidecar(BaseModel):
    """shard-000000.json. offsets, sizes: of the pictures. left_out: key -> reason. changed: how -> pictures."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    plan: str
    count: int
    bytes: int
    sha256: str
    offsets: list[int]
    sizes: list[int]
    labels: list[int] | None
    left_out: dict[str, str] = Field(default_factory=dict)
    changed: dict[str, int] = Field(default_factory=dict)


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:06d}.tar"


def finished(folder: Path, number: int, plan_hash: str) -> Sidecar | None:
    """What the sidecar says, if the shard is whole and of this plan."""
    path = shard_path(folder, number)
    try:
        sidecar = Sidecar.model_validate_json(path.with_suffix(".json").read_bytes())
        return sidecar if sidecar.plan == plan_hash and path.stat().st_size == sidecar.bytes else None
    except (OSError, ValidationError):
        return None


def finish(folder: Path, wait_s: float = 0.0) -> list[int]:
    """Write the manifest if all shards are finished; else the numbers of those that are missing.

    wait_s: how long to look again, for a file system that shows other nodes' files late. Raises UserError.
    """
    plan = read_plan(folder)
    deadline = time.monotonic() + wait_s
    while True:
        if (folder / MANIFEST).exists():
            remove_leftovers(folder)
            return []
        found = {number: sidecar for number in range(plan.shards) if (sidecar := finished(folder, number, plan.plan))}
        if len(found) == plan.shards:
            _save(folder, plan, found)
            remove_leftovers(folder)
            return []
        if time.monotonic() >= deadline:
            return sorted(set(range(plan.shards)) - found.keys())
        time.sleep(POLL_S)


def read_plan(folder: Path) -> PlanFile:
    try:
        return PlanFile.model_validate_json((folder / PLAN).read_bytes())
    except FileNotFoundError:
        raise UserError(f"'{folder}' has no {PLAN}, so nothing was begun there; is it the right folder?") from None
    except (OSError, ValidationError):
        raise UserError(f"'{folder / PLAN}' cannot be read; delete the folder and start again") from None


def _save(folder: Path, plan: PlanFile, sidecars: dict[int, Sidecar]) -> None:
    whole = {number: sidecar for number, sidecar in sorted(sidecars.items()) if sidecar.count}
    if not whole:
        raise UserError(f"none of the {plan.samples:,} pictures for '{folder}' can be decoded; see its shard-*.json")
    left_out: dict[str, str] = {}
    changed: dict[str, int] = {}
    for sidecar in sidecars.values():
        left_out |= sidecar.left_out
        for how, count in sidecar.changed.items():
            changed[how] = changed.get(how, 0) + count
    index = np.concatenate([np.array([s.offsets, s.sizes], dtype=np.int64).T for s in whole.values()])
    labels = np.array([label for s in whole.values() for label in s.labels or ()], dtype=np.int64)
    save_manifest(
        folder,
        shards=[
            Shard(name=shard_path(folder, number).name, count=s.count, bytes=s.bytes, sha256=s.sha256)
            for number, s in whole.items()
        ],
        index=index,
        labels=labels if plan.classes is not None else None,
        classes=plan.classes,
        seed=plan.options["seed"],
        options=plan.options,
        source=plan.description,
        left_out=left_out,
        changed=changed,
    )
