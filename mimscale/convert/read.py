"""Reading a checkpoint of any kind into named tensors, on one CPU and without DeepSpeed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from mimscale.checkpoint import format as checkpoint
from mimscale.config.recipes import load_recipe, validate
from mimscale.config.run import RunConfig
from mimscale.convert.names import State
from mimscale.convert.saved_folder import weights_in
from mimscale.errors import UserError, warn
from mimscale.files.weights_file import read_weights
from mimscale.models.config import StudentConfig

METADATA = "mimscale"
T = TypeVar("T")


@dataclass(frozen=True)
class Loaded:
    """The float32 tensors of a checkpoint and what is known of them.

    path: what was read; of a run folder its newest checkpoint. run: the resolved recipe. student, image_size: of a file
    that holds a student alone. All three are None where the file does not say. digest: the `sha256`, where the
    checkpoint may have been removed since. ema: the student's parameters are those of its exponential moving average.
    notes: a line for each wrapper that was taken off. step, data: of a checkpoint, and the fingerprint of the data set
    that it was trained on.
    """

    path: Path
    weights: State
    run: RunConfig | None = None
    student: StudentConfig | None = None
    image_size: int | None = None
    digest: str | None = None
    ema: bool = False
    notes: tuple[str, ...] = ()
    step: int | None = None
    data: str | None = None

    def sha256(self) -> str:
        """Hexadecimal sha256 of the file, or of a checkpoint's manifest, which holds the hashes of its shards."""
        return self.digest or checkpoint.sha256(identity_file(self.path))


def identity_file(path: Path) -> Path:
    """The file whose sha256 identifies a checkpoint folder or file."""
    return path / "manifest.json" if path.is_dir() else path


def resolve(path: Path) -> Path:
    """The checkpoint folder or file that a path stands for: a run folder's newest checkpoint, the file of weights in a
    folder of transformers or timm. Raises UserError.
    """
    if (path / "config.yaml").is_file():
        newest = checkpoint.newest(path)
        if newest is None:
            raise UserError(f"{path} has no complete checkpoint yet; wait for the first save")
        return newest
    weights = weights_in(path)
    if weights is not None:
        return weights
    if not path.is_file() and not (path / "manifest.json").is_file():
        raise UserError(
            f"{path} is neither a run folder, nor a checkpoint folder, nor a file, nor a folder of transformers or timm"
        )
    return path


def read(path: Path, ema: bool = False) -> Loaded:
    """Read a run folder (its newest checkpoint), a checkpoint folder, a file that `convert` wrote, an official file, or
    a folder that transformers or timm saved.

    ema: read the student's exponential moving average in place of its trained parameters. Raises UserError, also where
    there is none.
    """
    return with_newest(path, lambda found: _read(found, ema))


def with_newest(path: Path, work: Callable[[Path], T]) -> T:
    """Call `work` with what `resolve` finds. Where a live run prunes that checkpoint meanwhile, call it with the next.

    Raises UserError, also where `path` is itself a checkpoint folder and is removed.
    """
    while True:
        found = resolve(path)
        try:
            return work(found)
        except (UserError, OSError, SafetensorError) as error:
            if found.exists():
                raise
            newer = resolve(path) if (path / "config.yaml").is_file() else found
            if newer == found:
                raise UserError(f"{found} was removed while it was read; name its run folder, or keep it") from error
            warn(f"{found} was removed by its run while it was read; reading {newer}")


def _read(path: Path, ema: bool) -> Loaded:
    if path.is_dir():
        return _read_own(path, ema)
    if ema:
        raise UserError(f"{path} is a file of weights and has no moving average (kind ema); leave --ema out")
    return _read_file(path)


def run_of(folder: Path) -> RunConfig:
    """The recipe of the run that a checkpoint folder belongs to. Raises UserError."""
    path = folder.resolve().parent.parent / "config.yaml"
    if not path.is_file():
        raise UserError(f"{path} is missing; a checkpoint is read inside its run folder")
    return load_recipe(str(path))


def _read_own(folder: Path, ema: bool) -> Loaded:
    try:
        weights, digest = checkpoint.load_weights(folder, ema), checkpoint.sha256(identity_file(folder))
        meta = checkpoint.CheckpointReader(folder).meta
        step, data = meta.get("step"), meta.get("data")
        return Loaded(folder, weights, run_of(folder), digest=digest, ema=ema, step=step, data=data)
    except checkpoint.CheckpointError as error:
        raise UserError(f"{error}; take an older checkpoint of the run") from None


def _read_file(path: Path) -> Loaded:
    file = read_weights(path)
    weights = {name: tensor.float() for name, tensor in file.weights.items()}
    notes = tuple(f"read from {path}: {phrase}" for phrase in file.unwrapped)
    try:
        carried = json.loads(file.metadata.get(METADATA, "{}"))
        if "run" in carried:
            return Loaded(path, weights, validate(carried["run"], source=str(path)), notes=notes)
        if "student" in carried:
            student = StudentConfig.model_validate(carried["student"])
            return Loaded(path, weights, None, student, int(carried["image_size"]), notes=notes)
        return Loaded(path, weights, notes=notes)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: its metadata '{METADATA}' is damaged ({reason}); write the file again") from None
