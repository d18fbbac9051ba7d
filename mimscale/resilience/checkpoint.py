"""The checkpoint format: one for every ZeRO stage, precision and number of ranks. Knows files, not DeepSpeed.

    <run>/checkpoints/step-00001000/
        shard-00000-of-00008.safetensors ...   one per rank that wrote
        manifest.json                          written last

A *fragment* is a contiguous run of one flattened named parameter, for one kind of number:
    fp32, exp_avg, exp_avg_sq   the master weight and Adam's moments, always float32
    buffer                      a module buffer, whole, in its own dtype
and is stored as the 1-D tensor "kind|name|start". Nothing about stages, groups, padding or ranks is in the key, so any
run can read what any other wrote: it copies the overlapping pieces. 16-bit weights are not stored; they are the
rounded masters.

A folder gets its final name by an atomic rename after every file in it is on disk, so a folder that is there is whole
as far as the writer could see; `Reader` checks sizes, `verify` the sha256 of every file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mimscale.errors import UserError

FORMAT = 1
KINDS = ("fp32", "exp_avg", "exp_avg_sq")
_STEP = re.compile(r"step-(\d{8,})")


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged. The message names the file and what is wrong.

    A file system that fails to answer is no damage: its OSError passes through.
    """


def step_folder(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def complete(root: Path) -> list[Path]:
    """Checkpoint folders under `root` (<run>/checkpoints), oldest first."""
    if not root.is_dir():
        return []
    found = [
        (int(m[1]), p) for p in root.iterdir() if (m := _STEP.fullmatch(p.name)) and (p / "manifest.json").is_file()
    ]
    return [path for _, path in sorted(found)]


def newest(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run, or None."""
    folders = complete(run_dir / "checkpoints")
    return folders[-1] if folders else None


# ------------------------------------------------------------------------------------------------------------ writing


def write_shard(folder: Path, tensors: Mapping[str, Tensor], rank: int, world: int) -> dict[str, Any]:
    """Write one rank's fragments ("kind|name|start" -> 1-D CPU tensor) and return the file's entry for the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"shard-{rank:05d}-of-{world:05d}.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    _fsync(path)
    fragments = []
    for key, tensor in tensors.items():
        kind, name, start = key.split("|")
        fragments.append([kind, name, int(start), tensor.numel()])
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path), "fragments": fragments}


def commit(temporary: Path, final: Path, shards: list[dict[str, Any]], meta: Mapping[str, Any]) -> None:
    """Rank 0, after every shard is on disk: manifest, then the final name."""
    manifest = temporary / "manifest.json"
    manifest.write_text(json.dumps({"format": FORMAT, **meta, "shards": shards}))
    _fsync(manifest)
    _fsync(temporary)
    if final.exists():  # without a manifest, or it would have been resumed from: half of a copy, say
        set_aside(final)
    os.rename(temporary, final)
    _fsync(final.parent)


def set_aside(path: Path) -> None:
    """Move a damaged checkpoint out of the way of the run that will reach its step again; it stays for inspection."""
    os.rename(path, path.with_name(f"damaged-{path.name}-{time.time_ns():x}"))


def damaged(root: Path) -> list[Path]:
    """What `set_aside` moved away."""
    return sorted(root.glob("damaged-step-*"))


def prune(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what killed writers left behind."""
    for path in complete(root)[:-keep]:
        doomed = path.with_name(f".old-{path.name}")
        os.rename(path, doomed)  # a half-deleted folder must not look complete
        shutil.rmtree(doomed)
    for path in root.glob(".*-step-*"):
        shutil.rmtree(path, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------ reading


class Reader:
    """Random access to a checkpoint's fragments. `meta` is the manifest. Raises CheckpointError, UserError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.meta: dict[str, Any] = json.loads((path / "manifest.json").read_text())
        except ValueError as error:
            raise CheckpointError(f"{path}/manifest.json is not JSON: {error}") from None
        if self.meta.get("format") != FORMAT:
            raise UserError(f"{path} has format {self.meta.get('format')}; this version of mimscale reads {FORMAT}")
        self._pieces: dict[tuple[str, str], list[tuple[int, int, str]]] = {}
        for shard in self.meta["shards"]:
            file = path / shard["file"]
            size = file.stat().st_size if file.exists() else None
            if size != shard["bytes"]:
                raise CheckpointError(f"{file}: {'missing' if size is None else f'{size} bytes'}, not {shard['bytes']}")
            for kind, name, start, length in shard["fragments"]:
                self._pieces.setdefault((kind, name), []).append((start, length, shard["file"]))
        for pieces in self._pieces.values():
            pieces.sort()
        self._open: dict[str, Any] = {}

    def verify(self, share: int = 0, of: int = 1) -> None:
        """Recompute the sha256 of every `of`-th file, so that ranks can divide the work."""
        for shard in self.meta["shards"][share::of]:
            if sha256(self.path / shard["file"]) != shard["sha256"]:
                raise CheckpointError(f"{self.path / shard['file']}: sha256 differs from the manifest")

    def kinds(self) -> list[str]:
        return sorted({kind for kind, _ in self._pieces})

    def names(self, kind: str) -> list[str]:
        return [name for k, name in self._pieces if k == kind]

    def into(self, kind: str, name: str, start: int, target: Tensor) -> None:
        """Fill the 1-D `target` with elements [start, start + len(target)) of a parameter, wherever they are stored."""
        end, filled = start + target.numel(), 0
        for first, length, file in self._pieces.get((kind, name), ()):
            low, high = max(first, start), min(first + length, end)
            if low < high:
                piece = self._file(file).get_slice(f"{kind}|{name}|{first}")[low - first : high - first]
                target[low - start : high - start].copy_(piece)
                filled += high - low
        if filled != target.numel():
            raise CheckpointError(f"{self.path}: {kind} of {name}: found {filled} of {target.numel()} elements")

    def full(self, kind: str, name: str) -> Tensor:
        """One whole parameter or buffer in its own shape."""
        shape = self.meta["shapes"][name]
        flat = torch.empty(math.prod(shape), dtype=self._dtype(kind, name))
        self.into(kind, name, 0, flat)
        return flat.view(shape)

    def _dtype(self, kind: str, name: str) -> torch.dtype:
        start, _, file = self._pieces[kind, name][0]
        return self._file(file).get_slice(f"{kind}|{name}|{start}")[:0].dtype

    def _file(self, name: str) -> Any:
        if name not in self._open:
            try:
                self._open[name] = safe_open(self.path / name, framework="pt")
            except SafetensorError as error:
                raise CheckpointError(f"{self.path / name}: {error}") from None
        return self._open[name]


def load_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The method's state dict: fp32 parameters and buffers, whole."""
    reader = Reader(checkpoint)
    kinds: Iterable[str] = ("fp32", "buffer")
    return {name: reader.full(kind, name) for kind in kinds for name in reader.names(kind)}


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
