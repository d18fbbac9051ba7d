"""Values that a caller may hand over by mistake: one line, or what evaluation does with them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mimscale
from mimscale.__main__ import main
from mimscale.api.images import normalised_batch
from mimscale.api.overrides import as_words
from mimscale.config.recipes import load_recipe
from mimscale.convert.read import read
from mimscale.errors import UserError
from tests.convert.runs import saved_run

IMAGES = torch.zeros(1, 3, 32, 32)
MEAN, STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_run(tmp_path_factory.mktemp("run"), "mae")[0]


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


ODD_ARGUMENTS = (
    ({"image_size": 0}, "image_size = 0 must be 1 or more and at most 8192"),
    ({"image_size": -8}, "image_size = -8 must be 1 or more"),
    ({"image_size": 48.0}, "image_size = 48.0 is not a whole number; give an int"),
    ({"image_size": True}, "image_size = True is not a whole number"),
    ({"image_size": 10**30}, "image_size = 1000000000000000000000000000000 must be"),
    ({"image_size": 25}, "not a multiple of the student's patch"),
    ({"heads": 0}, "heads = 0 must be 1 or more"),
    ({"heads": "4"}, "heads = '4' is not a whole number"),
    ({"ema": "yes"}, "ema = 'yes' is neither True nor False"),
    ({"device": "tpu"}, "device = 'tpu' cannot be used here"),
    ({"device": 3.5}, "device = 3.5 cannot be used here"),
    ({"device": "cuda:99"}, "device = 'cuda:99' cannot be used here"),
    ({"device": "meta"}, "device = 'meta' holds no numbers"),
    ({"dtype": "float32"}, "dtype = 'float32' is no type to compute in"),
    ({"dtype": torch.int8}, "dtype = torch.int8 is no type to compute in"),
    ({"dtype": torch.complex64}, "dtype = torch.complex64 is no type to compute in"),
)


@pytest.mark.parametrize("options, text", ODD_ARGUMENTS)
def test_odd_arguments_of_load_encoder_are_one_line(run: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=re.escape(text)) as caught:
        mimscale.load_encoder(run, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", [None, 7, "", b"x", "a\0b", ["run"]])
def test_what_is_no_path_is_one_line(place: Any) -> None:
    for call in (mimscale.load_encoder, lambda path: mimscale.reconstruct(path, IMAGES)):
        with pytest.raises(UserError, match="is not a path; give a str or a pathlib.Path"):
            call(place)


@pytest.mark.parametrize(
    "options, text",
    [
        ({"seed": 2**64}, f"seed = {2**64} must be"),
        ({"seed": -(2**63) - 1}, "seed = -9223372036854775809 must be"),
        ({"seed": 0.5}, "seed = 0.5 is not a whole number"),
        ({"mask_ratio": "half"}, "mask_ratio = 'half' is not a number"),
        ({"mask_ratio": float("nan")}, "mask_ratio = nan must lie between 0 and 1"),
        ({"mask_ratio": -1}, "mask_ratio = -1 must lie between 0 and 1"),
        ({"device": "nowhere"}, "device = 'nowhere' cannot be used here"),
        ({"overrides": {"student.patch": 8}}, "student.patch is a change to a recipe, and none is given"),
        ({"overrides": "student.patch=8"}, "overrides is a str; give a mapping"),
        ({"overrides": {"a": {1, 2}}}, "override a: a set has no place in a recipe"),
        ({"recipe": 3}, "recipe = 3 is not a path"),
        ({"ema": 1}, "ema = 1 is neither True nor False"),
    ],
)
def test_odd_arguments_of_reconstruct_are_one_line(run: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=re.escape(text)) as caught:
        mimscale.reconstruct(run, IMAGES, **options)
    assert "\n" not in str(caught.value)


def test_set_without_a_recipe_is_not_passed_over(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (48, 48)).save(tmp_path / "image.png")
    words = [str(run), str(tmp_path / "image.png"), str(tmp_path / "out.png"), "--set", "method.masking.ratio=0.5"]
    assert main(["reconstruct", *words]) == 2
    said = capsys.readouterr().err
    assert "method.masking.ratio is a change to a recipe, and none is given" in said and len(said.splitlines()) == 1
    assert not (tmp_path / "out.png").exists()
    for number in (str(2**64), str(-(2**63) - 1)):
        assert main(["reconstruct", *words[:3], f"--seed={number}"]) == 2
        assert f"seed = {number} must be" in capsys.readouterr().err


def test_a_value_that_holds_itself_is_one_line() -> None:
    circle: dict[str, Any] = {}
    circle["again"] = circle
    with pytest.raises(UserError, match="override a: Circular reference detected"):
        as_words({"a": circle})
