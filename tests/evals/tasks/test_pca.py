from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mimscale.__main__ import main
from mimscale.data.decode import decode
from mimscale.data.manifest import Manifest
from mimscale.data.transforms import center_crop
from mimscale.evals.tasks.pca import GAP, TILE, TITLE
from tests.evals.conftest import save_run, small_run

QUICK = ["--workers", "0", "--crop-pct", "1", "--device", "cpu"]


def pca(*words: object) -> int:
    return main(["evaluate", "pca", *map(str, words), *QUICK])


def panels(path: Path, columns: int, rows: int) -> np.ndarray:
    """uint8 [rows, columns, TILE, TILE, 3]."""
    image = Image.open(path)
    step = TILE + GAP
    assert image.format == "PNG" and image.size == (columns * step - GAP, TITLE + rows * step - GAP)
    whole = np.asarray(image)
    return np.array(
        [
            [whole[TITLE + r * step : TITLE + r * step + TILE, c * step : c * step + TILE] for c in range(columns)]
            for r in range(rows)
        ]
    )


def test_images_and_a_column_for_each_checkpoint(data: tuple[Path, Path], run_dir: Path, tmp_path: Path) -> None:
    other = save_run(tmp_path / "other", small_run("mae"), step=8)
    same = save_run(tmp_path / "same", small_run("mae"))
    words = [run_dir, other, same, "--images", data[1], "--samples", 3, 0]
    assert pca(*words, "--out", tmp_path / "a.png") == 0
    found = panels(tmp_path / "a.png", 4, 2)
    manifest = Manifest.load(data[1])
    for row, sample in enumerate((3, 0)):
        expected = np.asarray(center_crop(decode(manifest.read(sample)), 32, 1.0)[0], dtype=float).mean(axis=(0, 1))
        assert np.abs(found[row, 0].mean(axis=(0, 1)) - expected).max() < 2
    assert np.abs(found[:, 1].astype(int) - found[:, 3]).max() <= 1  # equal weights: equal colours
    difference = np.abs(found[:, 1].astype(int) - found[:, 2])
    assert difference.max() > 5 and difference.mean() < np.abs(found[:, 1].astype(int) - (255 - found[:, 2])).mean()
    assert len({tuple(pixel) for pixel in found[0, 1].reshape(-1, 3)}) > 4
    assert pca(*words, "--out", tmp_path / "b.png") == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_grids_of_several_sizes_and_the_random_network(data: tuple[Path, Path], run_dir: Path, tmp_path: Path) -> None:
    larger = save_run(tmp_path / "larger", small_run("mae", image_size=48))
    assert pca(run_dir, larger, "--images", data[1], "--baselines", "--out", tmp_path / "a.png") == 0
    panels(tmp_path / "a.png", 5, 6)  # images, two random networks, two runs


def test_refusals(data: tuple[Path, Path], run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*words: object) -> str:
        assert pca(run_dir, *words) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "must name the image to write, FILE.png" in refused("--images", data[1])
    assert "must name the image" in refused("--images", data[1], "--out", tmp_path / "a.json")
    out = ["--out", tmp_path / "a.png"]
    for number in (45, -1, 10**30):
        assert f"--samples {number}: ids are 0 to 44" in refused("--images", data[1], f"--samples={number}", *out)
    assert "no such folder" in refused("--images", tmp_path / "none", *out)
    (tmp_path / "file").touch()
    assert "cannot be written" in refused("--images", data[1], "--out", tmp_path / "file" / "a.png")
    assert not (tmp_path / "a.png").exists()
