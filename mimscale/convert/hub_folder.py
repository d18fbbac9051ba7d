"""Folders as people load them from the Hugging Face Hub: weights, config.json, a model card, the report of the check.

    OUT/model.safetensors     with the student's sizes in its metadata, so that `read` needs nothing else
    OUT/config.json ...       what transformers or timm read
    OUT/README.md             the model card (model_card.py)
    OUT/conversion.json       source, sha256, differences

No path of this machine is written into a folder: it is meant to be published.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimscale.checkpoint import format as checkpoint
from mimscale.convert import check, difference, model_card
from mimscale.convert.difference import Differences, relative_difference
from mimscale.convert.names import State, same
from mimscale.convert.networks import Student, student_of
from mimscale.convert.read import Loaded, read
from mimscale.convert.saved_folder import CONFIG, WEIGHTS
from mimscale.convert.write import identity, save
from mimscale.files.atomic import atomic_folder, atomic_path
from mimscale.types import IMAGENET_MEAN, IMAGENET_STD

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
REPORT = "conversion.json"
CROP_PCT = 0.875  # where no recipe says it: of `mimscale evaluate`


@dataclass(frozen=True)
class HubModel:
    """What a library's folder holds, beside the card.

    library: transformers or timm. weights: under its names, float32. config: config.json. files: further JSON files.
    compare: (folder) -> differences of its network, None where the library is not installed. usage: Python lines that
    load `PATH`. task: the Hub's name of what the network does. left: what the folder leaves out or fills in, a line
    each. unchecked: the line to print where `compare` is None.
    """

    library: str
    weights: State
    config: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]
    compare: Callable[[Path], Differences] | None
    usage: str
    task: str
    left: tuple[str, ...] = ()
    unchecked: str = ""


@dataclass(frozen=True)
class Preprocessing:
    """Of images: short side resized to image_size / crop_pct, centre crop, ImageNet's mean and deviation."""

    image_size: int
    crop_pct: float
    interpolation: str
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


def preprocessing_of(vit: Student, loaded: Loaded) -> Preprocessing:
    """Of the run; without a recipe that of `mimscale evaluate`."""
    size = vit.grid[0] * vit.config.patch
    if loaded.run is None:
        return Preprocessing(size, CROP_PCT, "bicubic")
    return Preprocessing(size, loaded.run.data.eval_crop_pct, loaded.run.data.interpolation)


def rounded(loaded: Loaded, dtype: str) -> tuple[Loaded, tuple[str, ...]]:
    """The weights as they are after a passage through a type of `FLOATS`, and a line that says what that changes."""
    if dtype == "float32":
        return loaded, ()
    weights = {name: tensor.to(FLOATS[dtype]).float() for name, tensor in loaded.weights.items()}
    found = replace(loaded, weights=weights, digest=loaded.sha256())
    before, after = (check.tokens_of(student_of(of)[0]) for of in (loaded, found))
    change = relative_difference(after, before)
    return found, (f"rounded to {dtype}: outputs differ from those in float32 by {change:.1e} of the largest",)


def write_folder(out: Path, loaded: Loaded, vit: Student, to: str, model: HubModel, dtype: str) -> list[str]:
    """Write the folder, all of it or nothing, and return lines for the terminal.

    vit: the student that the folder's network has to equal. Raises UserError where it does not, and OSError.
    """
    carried = {"student": vit.config.model_dump(mode="json"), "image_size": vit.grid[0] * vit.config.patch}
    weights = {name: _in_type(tensor, FLOATS[dtype]) for name, tensor in model.weights.items()}

    notes = (*model.left, *([model.unchecked] if model.compare is None else []))
    with atomic_folder(out) as part:
        with atomic_path(part / WEIGHTS[0]) as file:  # with the permissions of any new file
            save(file, weights, carried)
        for name, values in {CONFIG: model.config, **model.files}.items():
            (part / name).write_text(json.dumps(values, indent=2) + "\n")
        back = read(part)
        if not same(back.weights, {name: tensor.float() for name, tensor in weights.items()}):
            raise RuntimeError(f"{part} does not read back as it was written")
        found = {} if model.compare is None else model.compare(part)
        found["read back"] = relative_difference(check.tokens_of(student_of(back)[0]), check.tokens_of(vit))
        difference.refuse_difference(found, out, difference.HUB_LIMIT)
        report = {
            "to": to,
            **identity(loaded),
            "source": _without_place(loaded.path),
            "sha256": checkpoint.sha256(part / WEIGHTS[0]),
            "compared_with": model.library if model.compare is not None else None,
            **difference.report(found, difference.HUB_LIMIT),
            "notes": list(notes),
        }
        (part / REPORT).write_text(json.dumps(report, indent=2) + "\n")
        about = model_card.Card(out.name, model.library, model.usage, model.task, model.left, report)
        (part / model_card.FILE).write_text(model_card.text(about, loaded, vit), encoding="utf-8")
    return [*notes, model.usage.replace("PATH", str(out)), *difference.lines(found, difference.HUB_LIMIT)]


def _in_type(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _without_place(path: Path) -> str:
    """`RUN/checkpoints/step-...` for a checkpoint, else the file's name."""
    return "/".join(path.resolve().parts[-3:]) if path.is_dir() else path.name
