"""Panels as files of a run folder: RUN/panels/step-00000060.png, rows of tiles without gaps, named in the PNG's text.

At most KEPT of them: of more, those go that leave the others at the most equal distances in steps.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, PngImagePlugin

from mimscale.errors import warn
from mimscale.files.atomic import atomic_write

if TYPE_CHECKING:
    from torch import Tensor

FOLDER, KEPT, LARGEST = "panels", 24, 128
"""LARGEST: pixels of a tile's side; larger ones are made smaller."""
TEXT = "mimscale"
"""Name of the PNG's text chunk: {"rows": [...], "columns": 8}."""


def write(run_dir: Path, step: int, tiles_B3HW: Mapping[str, Tensor]) -> None:
    """Keep the tiles of one panel, uint8 [B, 3, H, W] each. A disk that refuses costs a warning."""
    rows = np.stack([tiles.numpy() for tiles in tiles_B3HW.values()])  # R B 3 H W
    (columns, _, height, width), side = rows.shape[1:], min(rows.shape[-1], LARGEST)
    pixels = rows.transpose(0, 3, 1, 4, 2).reshape(len(rows) * height, columns * width, 3)
    image = Image.fromarray(pixels)
    image = image.resize((columns * side, len(rows) * side), Image.Resampling.BOX)
    text, data = PngImagePlugin.PngInfo(), io.BytesIO()
    text.add_text(TEXT, json.dumps({"rows": list(tiles_B3HW), "columns": columns}))
    image.save(data, "png", pnginfo=text)
    try:
        (run_dir / FOLDER).mkdir(exist_ok=True)
        atomic_write(run_dir / FOLDER / f"step-{step:08d}.png", data.getvalue())
    except OSError as error:
        warn(f"{run_dir / FOLDER}: {error.strerror or error}; the panel of step {step} is left out")
        return
    files = steps(run_dir)
    for crowded in set(files) - set(thinned(sorted(files), KEPT)):
        with suppress(OSError):
            files[crowded].unlink()


def steps(run_dir: Path) -> dict[int, Path]:
    """Step -> the file of its panel, by step."""
    found = {}
    for path in sorted((run_dir / FOLDER).glob("step-*.png")):
        if name := re.fullmatch(r"step-(\d{8,12})\.png", path.name):
            found[int(name[1])] = path
    return dict(sorted(found.items()))


def thinned(ordered: Sequence[int], keep: int) -> list[int]:
    """At most `keep` >= 2 of ascending numbers, the first and the last among them, at about equal distances."""
    left = list(ordered)
    while len(left) > keep:
        left.remove(min(left[1:-1], key=lambda n: left[left.index(n) + 1] - left[left.index(n) - 1]))
    return left
