"""The checkpoint format: one for every ZeRO stage, precision and number of ranks. Knows files, not DeepSpeed.

    <run>/checkpoints/step-00001000/
        shard-00000-of-00008.safetensors ...   one per rank that wrote
        manifest.json                          every file's size and sha256, every fragment's place, the train state
        COMPLETE                               the sha256 of manifest.json; written last
    <run>/checkpoints/latest.json              names the newest; for people and scripts; a resume lists the folder

A *fragment* is a contiguous run of one flattened named parameter, for one kind of number:
    fp32      the master weight, float32
    buffer    a module buffer, whole, in its own dtype
    ema       the moving average of a master weight, float32, where the run keeps one
    table     what a method learned between steps, cut over the ranks, in its own dtype
    others    the optimiser's state, float32, under its own names: AdamW's exp_avg and exp_avg_sq
and is stored as the 1-D tensor "kind|name|start". Nothing about stages, groups, padding or ranks is in the key, so any
run can read what any other wrote: it copies the overlapping pieces. 16-bit weights are not stored; they are the
rounded masters. All is data: safetensors and JSON, no pickle.

Training writes checkpoints with async_writer.py, which calls `commit` here; this file defines the format and reads it.
A folder gets its final name by an atomic rename after every file in it is on disk, so a folder that is there is whole
as far as the writer could see; `CheckpointReader` checks the manifest and the sizes, `verify` the sha256 of every file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import shutil
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mimscale.errors import UserError
from mimscale.files.atomic import atomic_write, rename
from mimscale.files.hashing import sha256

FORMAT = 3
_SHARD = re.compile(r"shard-\d+-of-\d+\.safetensors")
_STEP = re.compile(r"step-(\d{8,})")


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged. The message names the file and what is wrong.

    A file system that fails to answer is no damage: its OSError passes through.
    """


def step_folder(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step in a checkpoint folder's name; -1 for any other name."""
    match = _STEP.fullmatch(path.name)
    return int(match[1]) if match else -1


def steps(root: Path) -> list[Path]:
    """Everything under `root` (<run>/checkpoints) that is named like a checkpoint, oldest first.

    Raises UserError where something else than a folder has that name.
    """
    if root.is_dir():
        return sorted((path for path in root.iterdir() if step_of(path) >= 0), key=step_of)
    if os.path.lexists(root):
        raise UserError(f"{root} is not a folder; put the checkpoints back there, or remove it to start at step 0")
    return []


def complete(root: Path) -> list[Path]:
    """The checkpoints under `root` whose writer finished, oldest first."""
    return [path for path in steps(root) if (path / "COMPLETE").is_file()]


def newest(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run, or None."""
    folders = complete(run_dir / "checkpoints")
    return folders[-1] if folders else None


def newest_step(run_dir: Path) -> int:
    """The step that a restart would go on from, as far as can be seen without reading it; 0 where none can be seen."""
    with suppress(OSError):
        path = newest(run_dir)
        return 0 if path is None else step_of(path)
    return 0


# ------------------------------------------------------------------------------------------------------------ writing


def shard_name(rank: int, world: int) -> str:
    return f"shard-{rank:05d}-of-{world:05d}.safetensors"


def fragments(tensors: Mapping[str, Tensor]) -> list[list[Any]]:
    """[kinds, name, start, length] of each fragment in "kind|name|start" -> 1-D tensor; alike ones in one row."""
    rows: dict[tuple[str, int, int], list[str]] = {}
    for key, tensor in tensors.items():
        kind, name, start = key.split("|")
        rows.setdefault((name, int(start), tensor.numel()), []).append(kind)
    return [[kinds, name, start, length] for (name, start, length), kinds in rows.items()]


def commit(temporary: Path, final: Path, shards: list[dict[str, Any]], meta: Mapping[str, Any]) -> None:
    """Rank 0, after every shard is on disk: manifest, COMPLETE, the final name, the pointer.

    What the ranks report is not enough: raises OSError unless each shard is seen here, with its size.
    """
    for shard in shards:
        file = temporary / shard["file"]
        size = file.stat().st_size if file.is_file() else None
        if size != shard["bytes"]:
            found = "is not seen" if size is None else f"has {size} bytes"
            raise OSError(
                f"{file} {found} on {platform.node()}, but its rank wrote {shard['bytes']} bytes; is it one folder?"
            )
    rows = ",\n".join(json.dumps(shard) for shard in shards)  # one by one: the training thread gets its turn between
    text = f'{json.dumps({"format": FORMAT, **meta})[:-1]}, "shards": [\n{rows}\n]}}'.encode()
    digest = hashlib.sha256(text).hexdigest()
    atomic_write(temporary / "manifest.json", text)
    atomic_write(temporary / "COMPLETE", digest.encode())
    if final.exists():  # nobody resumed from it, or its step would not be reached again
        set_aside(final)
    rename(temporary, final)
    latest = json.dumps({"folder": final.name, "manifest_sha256": digest})
    atomic_write(final.with_name("latest.json"), latest.encode())


def set_aside(path: Path) -> None:
    """Move a damaged checkpoint out of the way of the run that will reach its step again; it stays for inspection."""
    os.rename(path, path.with_name(f"damaged-{path.name}-{time.time_ns():x}"))


def damaged(root: Path) -> list[Path]:
    """What `set_aside` moved away."""
    return sorted(root.glob("damaged-step-*"))


def prune(root: Path, keep: int, keep_every: int = 0) -> None:
    """Delete all but the newest `keep` checkpoints and the multiples of `keep_every`, and killed writers' folders."""
    for path in complete(root)[:-keep]:
        if not keep_every or step_of(path) % keep_every:
            remove(path)
    for path in root.glob(".*-step-*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in root.glob(".latest.json.*.tmp*"):
        path.unlink(missing_ok=True)


def forget_after(root: Path, step: int) -> None:
    """Delete the checkpoints beyond a step: the run went back to it and will take another way from there."""
    for path in steps(root):
        if step_of(path) > step:
            remove(path)


def remove(path: Path) -> None:
    """Delete a checkpoint; a half-deleted one must not seem complete."""
    doomed = path.with_name(f".old-{path.name}-{time.time_ns():x}")
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------ reading


class CheckpointReader:
    """Random access to a checkpoint's fragments. Raises CheckpointError, UserError.

    meta: the manifest without its list of shards, which at 512 ranks is long: it is kept as arrays, so one process can
    read it and send the reader to the others.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.meta: dict[str, Any] = _manifest(path)
        self._open: dict[int, Any] = {}
        try:
            shards = self.meta.pop("shards")
            self._files = [(str(shard["file"]), str(shard["sha256"])) for shard in shards]
            sizes = [int(shard["bytes"]) for shard in shards]
            self._pieces = _index(shard["fragments"] for shard in shards)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
            raise CheckpointError(f"{path}/manifest.json is no manifest of ours: {type(error).__name__}") from None
        for (name, _), expected in zip(self._files, sizes, strict=True):
            if not _SHARD.fullmatch(name):
                raise UserError(f"{path}/manifest.json names the file '{name}' outside of its folder; not read")
            file = path / name
            size = file.stat().st_size if file.is_file() else None
            if size != expected:
                raise CheckpointError(f"{file}: {'missing' if size is None else f'{size} bytes'}, not {expected}")

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": {}}

    def verify(self, share: int = 0, of: int = 1) -> None:
        """Recompute the sha256 of every `of`-th file, so that ranks can divide the work."""
        for name, expected in self._files[share::of]:
            if sha256(self.path / name) != expected:
                raise CheckpointError(f"{self.path / name}: sha256 differs from the manifest")

    def kinds(self) -> list[str]:
        return sorted({kind for kind, _ in self._pieces})

    def names(self, kind: str) -> list[str]:
        return [name for k, name in self._pieces if k == kind]

    def into(self, kind: str, name: str, start: int, target: Tensor) -> None:
        """Fill the 1-D `target` with elements [start, start + len(target)) of a parameter, wherever they are stored."""
        end, filled = start + target.numel(), 0
        pieces = self._pieces.get((kind, name), _NO_PIECES)
        before, behind = np.searchsorted(pieces[:, 0], (start + 1, end))
        for first, length, file in pieces[max(0, int(before) - 1) : int(behind)].tolist():
            low, high = max(first, start), min(first + length, end)
            if low < high:
                piece = self._file(file).get_slice(f"{kind}|{name}|{first}")[low - first : high - first]
                target[low - start : high - start].copy_(piece)
                filled += high - low
        if filled != target.numel():
            raise CheckpointError(f"{self.path}: {kind} of {name}: found {filled} of {target.numel()} elements")

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill "kind|name|start" -> 1-D tensors, as `into` does each."""
        for key, tensor in tensors.items():
            kind, name, start = key.split("|")
            self.into(kind, name, int(start), tensor)

    def full(self, kind: str, name: str) -> Tensor:
        """One whole parameter or buffer in its own shape; a table is flat."""
        start, length, _ = self._pieces[kind, name][-1].tolist()
        shape = self.meta["shapes"].get(name, [start + length])
        flat = torch.empty(math.prod(shape), dtype=self._dtype(kind, name))
        self.into(kind, name, 0, flat)
        return flat.view(shape)

    def _dtype(self, kind: str, name: str) -> torch.dtype:
        start, _, file = self._pieces[kind, name][0].tolist()
        return self._file(file).get_slice(f"{kind}|{name}|{start}")[:0].dtype

    def _file(self, number: int) -> Any:
        if number not in self._open:
            path = self.path / self._files[number][0]
            try:
                self._open[number] = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise CheckpointError(f"{path}: {error}") from None
        return self._open[number]


_META = {"shapes", "shards"}  # what this file reads in a manifest
_NO_PIECES = np.zeros((0, 3), np.int64)


def _index(of_shards: Iterable[list[list[Any]]]) -> dict[tuple[str, str], NDArray[np.int64]]:
    """(kind, name) -> start, length and number of the file of each piece, int64 [pieces, 3], in the order of starts."""
    flat: dict[tuple[str, ...], list[int]] = {}
    for number, fragments in enumerate(of_shards):
        for kinds, name, start, length in fragments:
            flat.setdefault((name, *kinds), []).extend((start, length, number))
    index: dict[tuple[str, str], NDArray[np.int64]] = {}
    for (name, *kinds), numbers in flat.items():
        pieces = _sorted(np.array(numbers, np.int64).reshape(-1, 3))  # shared by the kinds that are cut alike
        for kind in kinds:
            known = index.get((kind, name))
            index[kind, name] = pieces if known is None else _sorted(np.concatenate((known, pieces)))
    return index


def _sorted(pieces: NDArray[np.int64]) -> NDArray[np.int64]:
    """By start, and empty ones before the others."""
    return pieces[np.lexsort((pieces[:, 1], pieces[:, 0]))]


def _manifest(path: Path) -> dict[str, Any]:
    """The manifest, proven to be the one that COMPLETE was written for."""
    for name in ("COMPLETE", "manifest.json"):
        if not (path / name).is_file():
            raise CheckpointError(f"{path}/{name} is missing")
    text = (path / "manifest.json").read_bytes()
    if hashlib.sha256(text).hexdigest().encode() != (path / "COMPLETE").read_bytes()[:80].strip():
        raise CheckpointError(f"{path}/manifest.json: sha256 differs from COMPLETE")
    try:  # what follows is as it was written, perhaps by another version, or by somebody else
        meta = json.loads(text)
        written = meta["format"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{path}/manifest.json is not a manifest: {type(error).__name__}") from None
    if written != FORMAT:
        raise UserError(f"{path} has format {written!r}; this version of mimscale reads {FORMAT}")
    missing = sorted(_META - meta.keys())
    if missing:
        raise CheckpointError(f"{path}/manifest.json has no {missing[0]}")
    return meta


def load_weights(checkpoint: Path, ema: bool = False) -> dict[str, Tensor]:
    """The method's state dict: fp32 parameters and buffers, whole.

    ema: the student's parameters are those of its exponential moving average, everything else is as trained. Raises
    UserError where the checkpoint has none, CheckpointError where it is damaged: the sha256 of every file is checked.
    """
    reader = CheckpointReader(checkpoint)
    reader.verify()
    averaged = set(reader.names("ema")) if ema else set()
    if ema and not averaged:
        raise UserError(f"{checkpoint} has no moving average (kind ema); leave --ema out")
    trained: Iterable[str] = ("fp32", "buffer")
    return {
        name: reader.full("ema" if name in averaged else kind, name) for kind in trained for name in reader.names(kind)
    }
