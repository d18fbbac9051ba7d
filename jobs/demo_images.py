"""Draws inputs and outputs of the demo's networks for ten digits: demo_images.py SEED_FOLDER TEST_SHARDS OUT.png."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import matplotlib
import torch

from mimscale.checkpoint import format as checkpoint
from mimscale.config.recipes import load_recipe
from mimscale.config.run import method_class
from mimscale.data import noise
from mimscale.data.loader import eval_batches
from mimscale.data.manifest import Manifest
from mimscale.monitoring.panels import tiles
from mimscale.teachers.ensemble import TeacherEnsemble, build_skeletons, describe
from mimscale.types import Batch, View

matplotlib.use("Agg")
from matplotlib import pyplot


def one_of_each_class(shards: Path) -> Batch:
    """Ten test digits, one of each class from 0 to 9, normalised."""
    manifest = Manifest.load(shards)
    (batch,) = eval_batches(manifest, 32, batch=manifest.samples, workers=0, crop_pct=1.0)
    assert batch.labels is not None
    rows = torch.stack([(batch.labels == label).nonzero()[0, 0] for label in range(10)])
    return replace(batch, images=batch.images[rows], ids=batch.ids[rows], labels=None).normalised()


def visualise(run_dir: Path, batch: Batch) -> View:
    """The view of a trained method on these images, on the CPU."""
    run, newest = load_recipe(str(run_dir / "config.yaml")), checkpoint.newest(run_dir)
    assert newest is not None
    size = run.data.image_size
    skeletons = build_skeletons(run.teachers, size)
    method = method_class(run.method.name)(run, describe(skeletons))
    method.load_state_dict(checkpoint.load_weights(newest))
    ensemble = TeacherEnsemble(run.teachers, skeletons, method.needs.teachers, size, torch.device("cpu"))
    mask = method.needs.noise["mask"]
    draw = noise.uniform if mask.kind == "uniform" else noise.exponential
    numbers = draw(0, "demo picture", n=len(batch.ids) * mask.shape[0]).reshape(-1, *mask.shape)
    with torch.no_grad():
        view = method.eval().view(replace(batch, noise={"mask": torch.from_numpy(numbers)}), ensemble(batch.images))
    assert view is not None
    return view


def draw(rows: dict[str, torch.Tensor], out: Path) -> None:
    """Save an image file with labelled rows of uint8 images [B, 3, H, W]."""
    columns = len(next(iter(rows.values())))
    figure, axes = pyplot.subplots(len(rows), columns, figsize=(0.95 * columns + 1.5, 0.98 * len(rows)))
    for axis_row, (label, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(axis_row, images, strict=True):
            axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set_visible(False)
        axis_row[0].set_ylabel(label, rotation=0, ha="right", va="center", labelpad=10, fontsize=11)
    figure.subplots_adjust(
        left=1.45 / (0.95 * columns + 1.5), right=0.995, top=0.99, bottom=0.01, wspace=0.06, hspace=0.06
    )
    figure.savefig(out, dpi=110, facecolor="white")


def main(folder: Path, shards: Path, out: Path) -> None:
    batch = one_of_each_class(shards)
    mae, aligned = (tiles(visualise(folder / name, batch), samples=10) for name in ("mae", "maskalign"))
    rows = {
        "test digit": mae["input"],
        "MAE sees\n4 of 16 patches": mae["masked"],
        "MAE reconstructs\nthe other 12": mae["reconstruction"],
        "the teacher's\nCLS attention": aligned["attention"],
        "MaskAlign sees\n8, drawn by attention": aligned["masked"],
    }
    draw(rows, out)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
