"""Reading a checkpoint of any kind into named tensors, on one CPU and without DeepSpeed."""

from __future__ import annotations

import argparse
import json
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mimscale.checkpoint import format as checkpoint
from mimscale.config.recipes import load_recipe, validate
from mimscale.config.run import RunConfig
from mimscale.convert.names import State
from mimscale.errors import UserError, warn
from mimscale.models.config import StudentConfig

METADATA = "mimscale"
T = TypeVar("T")


@dataclass(frozen=True)
class Loaded:
    """The float32 tensors of a checkpoint and what is known of them.

    path: what was read; of a run folder its newest checkpoint. run: the resolved recipe. student, image_size: of a file
    that holds a student alone. All three are None where the file does not say. digest: the `sha256`, where the
    checkpoint may have been removed since. ema: the student's parameters are those of its exponential moving average.
    """

    path: Path
    weights: State
    run: RunConfig | None = None
    student: StudentConfig | None = None
    image_size: int | None = None
    digest: str | None = None
    ema: bool = False

    def sha256(self) -> str:
        """Hexadecimal sha256 of the file, or of a checkpoint's manifest, which holds the hashes of its shards."""
        return self.digest or checkpoint.sha256(identity_file(self.path))


def identity_file(path: Path) -> Path:
    """The file whose sha256 identifies a checkpoint folder or file."""
    return path / "manifest.json" if path.is_dir() else path


def resolve(path: Path) -> Path:
    """The checkpoint folder or file that a path stands for: a run folder's newest checkpoint. Raises UserError."""
    if (path / "config.yaml").is_file():
        newest = checkpoint.newest(path)
        if newest is None:
            raise UserError(f"{path} has no complete checkpoint yet; wait for the first save")
        return newest
    if not path.is_file() and not (path / "manifest.json").is_file():
        raise UserError(f"{path} is neither a run folder, nor a checkpoint folder, nor a file")
    return path


def read(path: Path, ema: bool = False) -> Loaded:
    """Read a run folder (its newest checkpoint), a checkpoint folder, a file that `convert` wrote, or an official file.

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
    return _read_safetensors(path) if path.suffix == ".safetensors" else Loaded(path, _read_pickle(path))


def run_of(folder: Path) -> RunConfig:
    """The recipe of the run that a checkpoint folder belongs to. Raises UserError."""
    path = folder.resolve().parent.parent / "config.yaml"
    if not path.is_file():
        raise UserError(f"{path} is missing; a checkpoint is read inside its run folder")
    return load_recipe(str(path))


def _read_own(folder: Path, ema: bool) -> Loaded:
    try:
        weights, digest = checkpoint.load_weights(folder, ema), checkpoint.sha256(identity_file(folder))
        return Loaded(folder, weights, run_of(folder), digest=digest, ema=ema)
    except checkpoint.CheckpointError as error:
        raise UserError(f"{error}; take an older checkpoint of the run") from None


def _read_safetensors(path: Path) -> Loaded:
    try:
        with safe_open(path, framework="pt") as file:
            carried = json.loads((file.metadata() or {}).get(METADATA, "{}"))
            weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); get it again") from None
    if "run" in carried:
        return Loaded(path, weights, validate(carried["run"], source=str(path)))
    if "student" in carried:
        student = StudentConfig.model_validate(carried["student"])
        return Loaded(path, weights, None, student, carried["image_size"])
    return Loaded(path, weights)


def _read_pickle(path: Path) -> State:
    """A torch file, without running code that may be in it. Training files also hold an argparse or yacs object."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")]):
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that is no pickle fails in as many ways as there are bytes
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        if isinstance(error, pickle.UnpicklingError):  # torch's text asks to trust the file
            reason = "it is cut short, or holds more than tensors"
        raise UserError(f"{path} cannot be read as a torch checkpoint ({reason}); get it again") from None
    for wrapper in ("model", "state_dict"):  # of MAE and timm, of OpenMMLab
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    named = content.items() if isinstance(content, Mapping) else ()
    tensors = {name: value for name, value in named if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path} holds no tensors under names; a state dict is expected, bare or under 'model'")
    return {name: tensor.float() for name, tensor in tensors.items()}
