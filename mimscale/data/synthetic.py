"""Small synthetic image folders in ImageNet's layout, for tests and for trying a recipe without a data set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mimscale.data import noise
from mimscale.files.progress import no_progress


def make_image_folder(
    root: Path,
    *,
    classes: int = 4,
    per_class: int = 8,
    side: int = 96,
    seed: int = 0,
    done: Callable[[int], None] = no_progress,
) -> Path:
    """Writes root/class_000/000000.jpg ...: JPEGs of side/2 to 3*side/2 pixels per side. Returns root.

    The class decides shape, hue and stripe frequency; position, size, direction and shade vary within a class. done:
    gets the number of images that were written.
    """
    for label in range(classes):
        folder = Path(root) / f"class_{label:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            array = synthetic_image(label, classes, side, seed, number)
            Image.fromarray(array).save(folder / f"{number:06d}.jpg", quality=92)
            done(1)
    return Path(root)


def synthetic_image(label: int, classes: int, side: int, seed: int, number: int) -> NDArray[np.uint8]:
    """uint8 [H, W, 3]: a coloured shape on a striped background."""
    u = noise.uniform(seed, "synthetic", label, number, n=12).astype(np.float64)
    height, width = (side // 2 + (u[:2] * side).astype(int)).tolist()
    y, x = np.mgrid[:height, :width] / min(height, width)
    angle, frequency = np.pi * u[2], 3 + 9 * label / classes
    stripes = 0.5 + 0.5 * np.sin(2 * np.pi * frequency * (x * np.cos(angle) + y * np.sin(angle)))
    hue = label / classes + 0.1 * u[3]
    colour = 0.5 + 0.5 * np.cos(2 * np.pi * (hue + np.array([0, 1 / 3, 2 / 3])))
    background = (0.2 + 0.6 * u[4:7]) * (0.6 + 0.4 * stripes[..., None])
    dx, dy, radius = x - x.max() * (0.3 + 0.4 * u[7]), y - y.max() * (0.3 + 0.4 * u[8]), 0.2 + 0.15 * u[9]
    distance = [np.hypot(dx, dy), np.maximum(abs(dx), abs(dy)), abs(dx) + abs(dy)][label % 3]
    inside = 1 / (1 + np.exp((distance - radius) * 60))[..., None]
    grain = noise.uniform(seed, "synthetic grain", label, number, n=height * width).reshape(height, width, 1) - 0.5
    image = inside * colour * (0.7 + 0.3 * u[10]) + (1 - inside) * background + 0.08 * grain
    return (255 * np.clip(image, 0, 1)).astype(np.uint8)
