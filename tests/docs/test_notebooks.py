"""The notebooks under examples/ run from the first cell to the last, and are committed with what that showed."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def images(notebook: Any) -> list[Image.Image]:
    data = [output.get("data", {}) for cell in code(notebook) for output in cell.outputs]
    return [Image.open(io.BytesIO(base64.b64decode(one["image/png"]))) for one in data if "image/png" in one]


def printed(notebook: Any) -> str:
    return "".join(output.text for cell in code(notebook) for output in cell.outputs if output.output_type == "stream")


@pytest.mark.slow
def test_the_notebooks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one folder, so that the second finds the student of the first, as in examples/."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for path in NOTEBOOKS:
        stored = nbformat.read(path, as_version=4)
        # the kernel of this environment: ipykernel's, which jupyter_client knows as python3 without an installation
        NotebookClient(
            (notebook := nbformat.from_dict(stored)),
            kernel_name="python3",
            timeout=600,
            resources={"metadata": {"path": str(tmp_path)}},
        ).execute()
        drawn, before = images(notebook), images(stored)
        assert [image.size for image in drawn] == [image.size for image in before] and len(drawn) == 2, path
        for image in drawn:
            assert np.asarray(image.convert("RGB")).std() > 20, f"{path}: an empty image"
    assert (tmp_path / "runs" / "mae_digits" / "done").exists()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_as_it_ran(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = code(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert len(images(notebook)) == 2
    assert str(ROOT) not in path.read_text() and "/home/" not in path.read_text() and "Warning" not in printed(notebook)
    assert path.stat().st_size < 400_000
    for output in (output for cell in cells for output in cell.outputs):
        assert output.output_type != "error"


def test_there_are_two() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["features_pca", "reconstruct"]
