"""JPEGs of about the size of ImageNet's images, for the benchmarks of data loaders."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from mimscale.data import noise


def jpegs(count: int) -> Iterator[bytes]:
    """JPEGs of about 100 KB, 500 x 375 pixels: random crops of scikit-learn's two photos with noise, quality 93."""
    from sklearn.datasets import load_sample_images

    photos = load_sample_images().images
    for number in range(count):
        photo, u = photos[number % 2], noise.uniform(0, "bench window", number, n=2)
        top, left = int(u[0] * (photo.shape[0] - 375)), int(u[1] * (photo.shape[1] - 500))
        crop = photo[top : top + 375, left : left + 500].astype(np.float32)
        grain = noise.uniform(0, "bench grain", number, n=crop.size).reshape(crop.shape) - 0.5
        buffer = io.BytesIO()
        Image.fromarray((crop + 36 * grain).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=93)
        yield buffer.getvalue()


def write_folder(root: Path, count: int) -> Path:
    """Write an image folder with ten classes, in the layout of torchvision's ImageFolder. Returns root."""
    for number, data in enumerate(jpegs(count)):
        path = root / f"class_{number % 10:02d}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root
