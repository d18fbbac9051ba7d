"""A converted file, checked after it was written and before it gets its name; the measurement goes beside it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mimscale import __version__
from mimscale.checkpoint import format as checkpoint
from mimscale.convert.check import INPUT, LIMIT, Differences
from mimscale.convert.names import State, same
from mimscale.convert.source import METADATA, Loaded, read
from mimscale.errors import UserError

Check = Callable[[Path, State], Differences]
"""The written file and its tensors, read back -> what differs by how much."""


def report_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def save(path: Path, weights: Mapping[str, Tensor], carried: Mapping[str, Any]) -> None:
    """A .pth file gets MAE's wrapper key `model`; anything else is safetensors, with a line about what it holds."""
    if path.suffix == ".pth":
        torch.save({"model": dict(weights)}, path)
    else:
        tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
        save_file(tensors, path, metadata={METADATA: json.dumps(carried), "format": "pt"})


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
    """Write, read back, check, and only then name the file `out` and its report `out`.json. Raises UserError."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".part-{out.name}")
    try:
        save(part, weights, carried)
        back = read(part).weights
        if not same(back, {name: tensor.float() for name, tensor in weights.items()}):
            raise RuntimeError(f"{part} does not read back as it was written")
        found = check(part, back)
        refuse_difference(found, out)
        report = {"to": to, **identity(source), "sha256": checkpoint.sha256(part), **measured(found), **about}
        part_report = report_path(part)
        part_report.write_text(json.dumps({**report, "notes": list(notes)}, indent=2) + "\n")
        shutil.copymode(part_report, part)  # safetensors' own files are for their writer alone
        os.replace(part_report, report_path(out))
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
        report_path(part).unlink(missing_ok=True)
    return found


def refuse_difference(found: Differences, out: Path) -> None:
    """Raises UserError for a difference above the limit, or a NaN."""
    for name, value in found.items():
        if not value <= LIMIT:
            raise UserError(
                f"{out} is not written: its {name} gives other numbers than the source, by {value:.1e} of the largest "
                f"(limit {LIMIT:.0e}); the weights may not be finite, or the file is of another kind than its names say"
            )


def identity(source: Loaded) -> dict[str, Any]:
    found = {"source": str(source.path), "source_sha256": source.sha256(), "mimscale": __version__}
    return {**found, "ema": True} if source.ema else found


def measured(found: Differences) -> dict[str, Any]:
    return {"differences": found, "limit": LIMIT, "of": "the largest absolute output", "input": INPUT}
