"""The rows of an evaluation: the trained networks, and before them, where asked for, raw pixels and random networks."""

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
    PIXEL_SIDE,
    Extractor,
    Pooling,
    Student,
    frozen,
    random_like,
    raw_pixel_blocks,
    raw_pixel_tokens,
    raw_pixels,
)
from mimscale.models.config import StudentConfig
from mimscale.models.convvit import ConvStages


@dataclass(frozen=True)
class Network:
    """One row of the table.

    identity: what its features depend on, as JSON values. folder: for these features. about: where it comes from, for
    the report.
    """

    name: str
    image_size: int
    extract: Extractor
    identity: Mapping[str, Any]
    folder: Path
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
    blocks: int = 1,
    baselines: bool = False,
) -> list[Network]:
    """The runs in the order given. baselines: before them raw pixels for each image size and a random network for each
    shape.

    ema: of each run the moving average of its student. blocks: of the pooling "blocks". Raises UserError, also where a
    checkpoint has no average.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32

    def extractor(vit: Student) -> Extractor:
        extract = frozen(vit.to(device, dtype), pools, blocks)
        return lambda images: extract(images.to(dtype))

    def load(source: Path) -> tuple[Student, StudentInfo, dict[str, Any]]:
        return *student_from(source, image_size=image_size, ema=ema), _checkpoint_identity(source)

    def shape_of(vit: Student, info: StudentInfo) -> dict[str, Any]:
        config = info.config.model_copy(update={"size": None, "drop_path": 0.0}).model_dump(mode="json")
        stages = None if info.stages is None else info.stages.model_dump(mode="json")
        return {"kind": type(vit).__name__, "student": config, "stages": stages, "blocks": blocks}

    trained = []
    shapes: dict[tuple[type, StudentConfig, ConvStages | None, int], tuple[Student, dict[str, Any]]] = {}
    for path in paths:
        vit, info, identity = with_newest(path, load)
        shape = info.config.model_copy(update={"size": None, "drop_path": 0.0})
        about_shape = shape_of(vit, info)
        shapes.setdefault((type(vit), shape, info.stages, info.image_size), (vit, about_shape))
        name = path.name if [p.name for p in paths].count(path.name) == 1 else str(path)
        name += " (ema)" if ema else ""
        about = {**identity, "method": info.method}
        weights = {"sha256": identity["sha256"], "ema": ema, **about_shape}
        trained.append(Network(name, info.image_size, extractor(vit), weights, features_folder(path), about))
    if not baselines:
        return trained
    folder = features_folder(paths[0])
    sizes = list(dict.fromkeys(size for *_, size in shapes))
    pixels = raw_pixel_tokens if "tokens" in pools else raw_pixel_blocks if "blocks" in pools else raw_pixels
    raw = [
        Network(
            f"raw pixels at {size}" if len(sizes) > 1 else "raw pixels",
            size,
            pixels,
            {"kind": pixels.__name__, "side": PIXEL_SIDE},
            folder,
        )
        for size in sizes
    ]
    untrained = [
        Network(
            f"random init {kind.__name__} {c.width}x{c.depth}/{c.patch} at {size}"
            if len(shapes) > 1
            else "random init",
            size,
            extractor(random_like(vit, seed)),
            {"random": seed, "torch": torch.__version__, **about_shape},
            folder,
        )
        for (kind, c, _, size), (vit, about_shape) in shapes.items()
    ]
    return [*raw, *untrained, *trained]


def eval_folder(path: Path) -> Path:
    """RUN/eval for a run folder or one of its checkpoints; `eval` beside a file or a folder of a library."""
    if (path / "config.yaml").is_file():
        return path / "eval"
    return (path.parent.parent if (path / "manifest.json").is_file() else path.parent) / "eval"


def features_folder(path: Path) -> Path:
    """Where the features of a run, checkpoint or file are kept."""
    return eval_folder(path) / "features"


def _checkpoint_identity(source: Path) -> dict[str, Any]:
    """step: None where a file does not say. sha256: of the file, or of a checkpoint's manifest, which names its own."""
    step = checkpoint.step_of(source) if source.is_dir() else None
    return {"source": str(source), "step": step, "sha256": checkpoint.sha256(identity_file(source))}
