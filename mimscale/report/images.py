"""The panels of a run as images for a page: the same samples in every cell, rows are kinds, columns are steps."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from mimscale.errors import printable
from mimscale.monitoring.panel_files import TEXT, thinned
from mimscale.monitoring.panel_files import steps as files_of

STEPS = 5
SAMPLES = 8
ACROSS = 4
BROKEN = (OSError, ValueError, KeyError, TypeError, AttributeError, SyntaxError, Image.DecompressionBombError)
"""What a file that is no panel may raise."""
MOST_PIXELS = 64 * 2**20


class Cell(NamedTuple):
    """step: of the panel. uri: a data: URI of the image."""

    step: int
    uri: str


@dataclass(frozen=True)
class Panels:
    """fixed: kinds that are the same at all steps. changing: the others, kind -> a cell for each of `steps` that has
    it. unreadable: a line for each file that is no panel.
    """

    steps: Sequence[int]
    fixed: Mapping[str, Cell]
    changing: Mapping[str, Sequence[Cell]]
    unreadable: Sequence[str]


def read(run_dir: Path, side: int, until: int | None = None) -> Panels:
    """side: of a tile, in pixels. until: later panels, of steps that were discarded, are left out."""
    files = {step: path for step, path in files_of(run_dir).items() if until is None or step <= until}
    found: dict[int, dict[str, Image.Image]] = {}
    unreadable = []
    for step in thinned(sorted(files), STEPS) if len(files) > STEPS else files:
        try:
            found[step] = _mosaics(files[step])
        except BROKEN as error:
            unreadable.append(f"panels/{files[step].name} is no panel ({type(error).__name__})")
    kinds = dict.fromkeys(kind for rows in found.values() for kind in rows)
    fixed, changing = {}, {}
    for kind in kinds:
        of_kind = {step: rows[kind] for step, rows in found.items() if kind in rows}
        same = len({image.tobytes() for image in of_kind.values()}) == 1
        cells = [
            Cell(step, _uri(image, side)) for step, image in (list(of_kind.items())[:1] if same else of_kind.items())
        ]
        if same and (len(of_kind) > 1 or kind in ("input", "masked")):
            fixed[kind] = cells[0]
        else:
            changing[kind] = cells
    return Panels(list(found), fixed, changing, unreadable)


def _mosaics(path: Path) -> dict[str, Image.Image]:
    """Kind -> its tiles, ACROSS in a row. Raises one of BROKEN."""
    with Image.open(path) as image:
        if image.format != "PNG" or image.width * image.height > MOST_PIXELS:
            raise ValueError("no PNG of a sensible size")
        layout = json.loads(image.info[TEXT])
        rows, columns = [printable(str(row))[:40] for row in layout["rows"]], int(layout["columns"])
        side = image.width // columns
        if not rows or side < 1 or image.size != (columns * side, len(rows) * side):
            raise ValueError("rows and columns do not fit")
        pixels = image.convert("RGB")
    shown = min(columns, SAMPLES)
    across, gap = min(shown, ACROSS), max(1, side // 32)
    found = {}
    for number, row in enumerate(rows):
        size = (across * (side + gap) - gap, -(-shown // across) * (side + gap) - gap)
        mosaic = Image.new("RGB", size, "white")
        for column in range(shown):
            tile = pixels.crop((column * side, number * side, (column + 1) * side, (number + 1) * side))
            mosaic.paste(tile, (column % across * (side + gap), column // across * (side + gap)))
        found[row] = mosaic
    return found


def _uri(image: Image.Image, side: int) -> str:
    factor = side * ACROSS / image.width
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    resampling = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS
    data = io.BytesIO()
    image.resize(size, resampling).save(data, "jpeg", quality=86, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
