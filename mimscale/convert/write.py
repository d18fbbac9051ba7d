"""Writing a converted file. It gets its name only after it was read back and compared; a report lies beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mimscale import __version__
from mimscale.checkpoint import format as checkpoint
from mimscale.convert import difference
from mimscale.convert.difference import Differences
from mimscale.convert.names import State, same
from mimscale.convert.read import METADATA, Loaded, read
from mimscale.files.atomic import atomic_path, atomic_write, sync

Check = Callable[[Path, State], Differences]
"""(the written file, its tensors as they were read back) -> the differences of the networks."""


def report_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def save(path: Path, weights: Mapping[str, Tensor], carried: Mapping[str, Any]) -> None:
    """Write tensors to a file. A .pth file gets MAE's wrapper key `model`; anything else is safetensors.

    carried: JSON for the metadata of a safetensors file, where `read` finds the recipe or the student's sizes. Raises
    OSError.
    """
    try:
        if path.suffix == ".pth":
            with path.open("wb") as file:  # given a path, torch would write its name into the file
                torch.save({"model": dict(weights)}, file)
        else:
            tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
            save_file(tensors, path, metadata={METADATA: json.dumps(carried), "format": "pt"})
    except (SafetensorError, RuntimeError) as error:  # what safetensors and torch raise for a full disk
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(str(reason)) from error


def write(
    out: Path,
    source: Loaded,
    to: str,
    weights: Mapping[str, Tensor],
    carried: Mapping[str, Any],
    check: Check,
    notes: Sequence[str] = (),
    **about: Any,
) -> Differences:
    """Write the weights to `out`, and the report of their check to `out`.json; both or neither.

    to: target or name format. carried: see `save`. about: further entries of the report. Raises UserError where `check`
    finds a difference above the limit, and OSError.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(out) as part:
        save(part, weights, carried)
        back = read(part).weights
        if not same(back, {name: tensor.float() for name, tensor in weights.items()}):
            raise RuntimeError(f"{part} does not read back as it was written")
        found = check(part, back)
        difference.refuse_difference(found, out)
        report = {"to": to, **identity(source), "sha256": checkpoint.sha256(part), **difference.report(found), **about}
        sync(part)  # a disk that refuses the weights says so before the report is there
        atomic_write(report_path(out), (json.dumps({**report, "notes": list(notes)}, indent=2) + "\n").encode())
    return found


def identity(source: Loaded) -> dict[str, Any]:
    """The entries of a report that say what was converted, and by which version."""
    found = {"source": str(source.path), "source_sha256": source.sha256(), "mimscale": __version__}
    return {**found, "ema": True} if source.ema else found
