"""Panels as files of a run folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mimscale.monitoring import panel_files
from mimscale.monitoring.panels import tiles
from mimscale.types import View


def view(side: int = 8) -> View:
    images = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    return View(images, mask=torch.tensor([[1.0, 0, 0, 1]] * 3), student_attention=torch.rand(3, 4))


def test_a_file_holds_the_tiles_and_says_what_they_are(tmp_path: Path) -> None:
    rows = tiles(view())
    panel_files.write(tmp_path, 60, rows)
    (path,) = panel_files.steps(tmp_path).values()
    assert path.name == "step-00000060.png"
    with Image.open(path) as image:
        layout, pixels = json.loads(image.info[panel_files.TEXT]), np.asarray(image)
    assert layout == {"rows": ["input", "masked", "student attention"], "columns": 3} and pixels.shape == (24, 24, 3)
    assert (pixels[8:16, 16:24] == rows["masked"][2].permute(1, 2, 0).numpy()).all()


def test_large_tiles_are_made_smaller(tmp_path: Path) -> None:
    panel_files.write(tmp_path, 1, tiles(view(side=224)))
    with Image.open(panel_files.steps(tmp_path)[1]) as image:
        assert image.size == (3 * panel_files.LARGEST, 3 * panel_files.LARGEST)


def test_few_files_stay_at_equal_distances(tmp_path: Path) -> None:
    for step in range(10, 1010, 10):
        panel_files.write(tmp_path, step, tiles(view()))
    left = list(panel_files.steps(tmp_path))
    assert len(left) == panel_files.KEPT and left[0] == 10 and left[-1] == 1000
    assert max(np.diff(left)) <= 4 * 1000 / panel_files.KEPT


def test_a_disk_that_refuses_costs_a_panel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "panels").write_text("a file where the folder should be")
    panel_files.write(tmp_path, 1, tiles(view()))
    assert "the panel of step 1 is left out" in capsys.readouterr().err
