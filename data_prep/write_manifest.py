"""Writes the manifest of a data set from the sidecars of its finished shards. A manifest means that it is complete.

Every writer tries this when it is done, and it may be repeated at any later time, because it needs only the destination
folder. On network file systems that is necessary: two writers that end at the same moment may not see each other's
files yet.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mimscale.data.manifest import MANIFEST, Shard, save_manifest
from mimscale.data.names import Options, Text
from mimscale.errors import UserError
from mimscale.files.atomic import remove_leftovers

PLAN = "plan.json"
POLL_S = 2.0


class PlanFile(BaseModel):
    """plan.json, which reserves a destination for one plan.

    plan: its hash. description: of the source. skipped: reason -> files of the source that are not in the plan.
    left_out: name -> reason of the first of them that were to be images.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    plan: str
    options: dict[str, Any]
    samples: int
    shards: int
    classes: list[Text] | None
    description: Options
    skipped: dict[str, int] = Field(default_factory=dict)
    left_out: dict[Text, Text] = Field(default_factory=dict)


class Sidecar(BaseModel):
    """shard-000000.json. offsets, sizes: of the images. left_out: key -> reason. changed: how -> number of images."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    plan: str
    count: int
    bytes: int
    sha256: str
    offsets: list[int]
    sizes: list[int]
    labels: list[int] | None
    left_out: dict[Text, Text] = Field(default_factory=dict)
    changed: dict[str, int] = Field(default_factory=dict)


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:06d}.tar"


def read_sidecar(folder: Path, number: int, plan_hash: str) -> Sidecar | None:
    """The sidecar of a shard; None unless the shard is complete and belongs to this plan."""
    path = shard_path(folder, number)
    try:
        sidecar = Sidecar.model_validate_json(path.with_suffix(".json").read_bytes())
        return sidecar if sidecar.plan == plan_hash and path.stat().st_size == sidecar.bytes else None
    except (OSError, ValidationError):
        return None


def write_manifest(folder: Path, wait_s: float = 0.0) -> list[int]:
    """Write the manifest if all shards are finished. Returns the numbers of the missing shards, [] if there are none.

    wait_s: how long to poll for missing shards, for file systems that show the files of other nodes late. Raises
    UserError.
    """
    plan = read_plan(folder)
    deadline = time.monotonic() + wait_s
    while True:
        if (folder / MANIFEST).exists():
            remove_leftovers(folder)
            return []
        found = {n: sidecar for n in range(plan.shards) if (sidecar := read_sidecar(folder, n, plan.plan))}
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
        raise UserError(
            f"'{folder}' has no {PLAN}, so no conversion was started there; give the folder of one"
        ) from None
    except (OSError, ValidationError):
        raise UserError(f"'{folder / PLAN}' cannot be read; delete the folder and start again") from None


def _save(folder: Path, plan: PlanFile, sidecars: dict[int, Sidecar]) -> None:
    shards = {number: sidecar for number, sidecar in sorted(sidecars.items()) if sidecar.count}
    if not shards:
        raise UserError(f"none of the {plan.samples:,} images for '{folder}' can be decoded; see its shard-*.json")
    left_out: dict[str, str] = {}
    changed: dict[str, int] = {}
    for sidecar in sidecars.values():
        left_out |= sidecar.left_out
        for how, count in sidecar.changed.items():
            changed[how] = changed.get(how, 0) + count
    index = np.concatenate([np.array([s.offsets, s.sizes], dtype=np.int64).T for s in shards.values()])
    labels = np.array([label for s in shards.values() for label in s.labels or ()], dtype=np.int64)
    save_manifest(
        folder,
        shards=[
            Shard(name=shard_path(folder, number).name, count=s.count, bytes=s.bytes, sha256=s.sha256)
            for number, s in shards.items()
        ],
        index=index,
        labels=labels if plan.classes is not None else None,
        classes=plan.classes,
        seed=plan.options["seed"],
        options=plan.options,
        source=plan.description,
        left_out=left_out,
        changed=changed,
        skipped=plan.skipped,
        skipped_names=plan.left_out,
    )
