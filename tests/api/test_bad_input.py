"""Values that a caller may hand over by mistake: one line, or what evaluation does with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mimscale.__main__ import main
from mimscale.api.images import normalised_batch
from mimscale.api.overrides import as_words
from mimscale.config.recipes import load_recipe
from mimscale.convert.read import read
from mimscale.errors import UserError

MEAN, STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


def grey_of(image: Image.Image) -> float:
    return float(normalised_batch([image], 16, MEAN, STD, torch.device("cpu")).mean())


def test_every_mode_becomes_the_rgb_that_evaluation_sees() -> None:
    half = Image.fromarray(np.full((16, 16), 0x8000, np.uint16))
    assert grey_of(half) == pytest.approx(128 / 255)
    assert grey_of(Image.new("RGBA", (16, 16), (0, 0, 0, 0))) == 1.0  # transparent is white
    with pytest.raises(UserError, match="has no defined 8-bit RGB"):
        grey_of(Image.fromarray(np.full((16, 16), 7.0, np.float32)))


def test_overrides_keep_their_characters() -> None:
    assert as_words({"data.shards": "/data/\N{GRINNING FACE}"}) == ['data.shards="/data/\N{GRINNING FACE}"']


@pytest.mark.parametrize("content", [b"# caf\xe9\nextends: mae_tiny\n", "extends: mae_tiny".encode("utf-16")])
def test_a_recipe_that_is_not_utf_8_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(UserError, match="is not a text file in UTF-8"):
        load_recipe(str(tmp_path / "r.yaml"))


def test_yaml_that_cannot_be_constructed_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("extends: mae_tiny\nseed: 2020-99-99\n")
    with pytest.raises(UserError, match="is not YAML"):
        load_recipe(str(tmp_path / "r.yaml"))
    with pytest.raises(UserError, match="override seed=2020-99-99: the value is not YAML"):
        load_recipe("mae_tiny", ["seed=2020-99-99"])


def test_files_that_are_no_checkpoint_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("hello\n")
    with pytest.raises(UserError, match="cannot be read as a torch checkpoint"):
        read(tmp_path / "text.pth")
    torch.save({1: torch.zeros(2)}, tmp_path / "numbers.pth")
    with pytest.raises(UserError, match="holds no tensors under names"):
        read(tmp_path / "numbers.pth")


def test_reports_and_figures_below_a_file_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (48, 48)).save(tmp_path / "image.png")
    words = [str(tmp_path / "none"), str(tmp_path / "image.png"), str(tmp_path / "image.png" / "out.png")]
    assert main(["reconstruct", *words]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
