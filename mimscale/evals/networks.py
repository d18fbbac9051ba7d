"""The rows of an evaluation: raw pixels, the networks at random, the trained ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mimscale.checkpoint import format as checkpoint
from mimscale.convert.networks import StudentInfo, student_from
from mimscale.convert.read import identity_file, with_newest
from mimscale.evals.features import (
    Extractor,
    Pooling,
    Student,
    frozen,
    random_like,
    raw_pixel_tokens,
    raw_pixels,
)
from mimscale.models.config import StudentConfig
from mimscale.models.convvit import ConvStages


@dataclass(frozen=True)
class Network:
    """One row of the table. about: where it comes from, for the report."""

    name: str
    image_size: int
    extract: Extractor
    about: Mapping[str, Any] = field(default_factory=dict)


def load_networks(
    paths: Sequence[Path],
    *,
    pools: Sequence[Pooling],
    image_size: int | None,
    seed: int,
    device: torch.device,
    precision: str,
    ema: bool = False,
) -> list[Network]:
    """Raw pixels for each image size, a random network for each shape, then the runs in the order given.

    ema: of each run the moving average of its student. Raises UserError, also where a checkpoint has none.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32

    def extractor(vit: Student) -> Extractor:
        extract = frozen(vit.to(device, dtype), pools)
        return lambda images: extract(images.to(dtype))

    def load(source: Path) -> tuple[Student, StudentInfo, dict[str, Any]]:
        return *student_from(source, image_size=image_size, ema=ema), _checkpoint_identity(source)

    trained = []
    shapes: dict[tuple[type, StudentConfig, ConvStages | None, int], Student] = {}
    for path in paths:
        vit, info, identity = with_newest(path, load)
        shape = info.config.model_copy(update={"size": None, "drop_path": 0.0})
        shapes.setdefault((type(vit), shape, info.stages, info.image_size), vit)
        name = path.name if [p.name for p in paths].count(path.name) == 1 else str(path)
        name += " (ema)" if ema else ""
        about = {**identity, "method": info.method}
        trained.append(Network(name, info.image_size, extractor(vit), about))
    sizes = list(dict.fromkeys(size for *_, size in shapes))
    pixels = raw_pixel_tokens if "tokens" in pools else raw_pixels
    raw = [Network(f"raw pixels at {size}" if len(sizes) > 1 else "raw pixels", size, pixels) for size in sizes]
    untrained = [
        Network(
            f"random init {kind.__name__} {c.width}x{c.depth}/{c.patch} at {size}"
            if len(shapes) > 1
            else "random init",
            size,
            extractor(random_like(vit, seed)),
        )
        for (kind, c, _, size), vit in shapes.items()
    ]
    return [*raw, *untrained, *trained]


def _checkpoint_identity(source: Path) -> dict[str, Any]:
    """step: None where a file does not say. sha256: of the file, or of a checkpoint's manifest, which names its own."""
    step = checkpoint.step_of(source) if source.is_dir() else None
    return {"source": str(source), "step": step, "sha256": checkpoint.sha256(identity_file(source))}
