"""`mimscale.load_encoder` on checkpoints of ours and official files, and the images that an encoder takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import mimscale
from mimscale.__main__ import main
from mimscale.convert.networks import student_from
from mimscale.data.transforms import center_crop, to_pixels
from mimscale.evals.features import frozen
from mimscale.methods.convmae import ConvMAE
from mimscale.types import normalised
from tests.convert.runs import IMAGES, MAE_SECTION, STUDENT, build, save_run, saved_run
from tests.golden import run_config
from tests.ranks import STAGES

SIDE = 64


@pytest.fixture(scope="module")
def mae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_run(tmp_path_factory.mktemp("encoder") / "run", "mae")[0]


@pytest.fixture(scope="module")
def encoder(mae: Path) -> mimscale.Encoder:
    return mimscale.load_encoder(mae)


def random_image(width: int, height: int, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


# --------------------------------------------------------------------------------------------- which network it is


@pytest.mark.parametrize("name", ["mae", "maskalign", "simmim", "mff"])
def test_features_are_those_of_evaluation(name: str, tmp_path: Path) -> None:
    """maskalign: without a trained last norm."""
    folder, method = saved_run(tmp_path / "run", name)
    found = mimscale.load_encoder(folder)(IMAGES)
    expected = frozen(student_from(folder)[0], ["mean", "cls"])(IMAGES)
    assert found.cls is not None
    assert torch.equal(found.pooled, expected["mean"]) and torch.equal(found.cls, expected["cls"])
    assert found.tokens.shape == (2, 16, 32)
    if name == "mae":
        student: Any = method.student
        assert torch.equal(found.tokens, student(IMAGES).tokens[:, 1:])


def test_a_network_without_class_token(tmp_path: Path) -> None:
    section = {**MAE_SECTION, "name": "convmae", "stages": STAGES}
    config = run_config(section, {**STUDENT, "patch": 8}, SIDE)
    folder = save_run(tmp_path / "run", ConvMAE(config, {}), config)
    encoder = mimscale.load_encoder(folder)
    found = encoder(IMAGES)
    assert found.cls is None and found.tokens.shape == (2, 64, 32) and encoder.patch == 8
    torch.testing.assert_close(found.pooled, found.tokens.mean(dim=1))


def test_it_is_a_frozen_module_in_eval_mode(encoder: mimscale.Encoder) -> None:
    assert isinstance(encoder, torch.nn.Module) and not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert (encoder.width, encoder.patch, encoder.grid, encoder.image_size) == (32, 16, (4, 4), SIDE)
    assert encoder.mean == (0.485, 0.456, 0.406) and encoder.std == (0.229, 0.224, 0.225)
    assert not encoder(IMAGES).tokens.requires_grad
    asking = IMAGES.clone().requires_grad_(True)
    encoder(asking).pooled.square().sum().backward()
    assert asking.grad is not None and asking.grad.abs().sum() > 0


def test_every_kind_of_file(mae: Path, encoder: mimscale.Encoder, tmp_path: Path) -> None:
    """The checkpoint folder, what convert writes, and the same weights under official names."""
    expected = encoder(IMAGES).tokens
    paths = [*(mae / "checkpoints").glob("step-*")]
    for to, name in (("mimscale", "ours.safetensors"), ("student", "student.safetensors"), ("official", "mae.pth")):
        assert main(["convert", str(mae), str(tmp_path / name), "--to", to]) == 0
        paths.append(tmp_path / name)
    for path in paths:
        heads = None if path.is_dir() or path.name in ("ours.safetensors", "student.safetensors") else STUDENT["heads"]
        assert torch.equal(mimscale.load_encoder(path, heads=heads)(IMAGES).tokens, expected), path


def test_the_moving_average(tmp_path: Path) -> None:
    method, config = build("mae")
    ema = {f"student.{name}": p.detach() + 0.25 for name, p in method.student.named_parameters()}
    folder = save_run(tmp_path / "run", method, config, ema)
    trained, averaged = (mimscale.load_encoder(folder, ema=ema)(IMAGES).tokens for ema in (False, True))
    method.load_state_dict({**method.state_dict(), **ema})
    student: Any = method.student
    assert torch.equal(averaged, student(IMAGES).tokens[:, 1:]) and not torch.allclose(trained, averaged)


def test_size_and_type_can_be_chosen(mae: Path, encoder: mimscale.Encoder) -> None:
    larger = mimscale.load_encoder(str(mae), image_size=96)
    assert larger.grid == (6, 6) and larger([random_image(100, 120)]).tokens.shape == (1, 36, 32)
    small = mimscale.load_encoder(mae, dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    features = small(IMAGES)
    assert features.tokens.dtype == features.pooled.dtype == torch.float32
    assert 0 < (features.tokens - encoder(IMAGES).tokens).abs().max() < 0.1


def test_what_is_no_checkpoint_is_refused(mae: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.pth").write_text("no weights")
    for path, text in (
        (tmp_path / "nowhere", "is neither a run folder, nor a checkpoint folder, nor a file"),
        (tmp_path, "is neither a run folder, nor a checkpoint folder, nor a file"),
        (tmp_path / "notes.pth", "cannot be read as a torch checkpoint"),
    ):
        with pytest.raises(mimscale.UserError, match=text) as caught:
            mimscale.load_encoder(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(mimscale.UserError, match="has no moving average"):
        mimscale.load_encoder(mae, ema=True)


# ------------------------------------------------------------------------------------------------ which images


def test_images_are_cropped_as_in_evaluation(encoder: mimscale.Encoder) -> None:
    """Pillow images of any size and mode, and the same pixels as a uint8 tensor."""
    images = [random_image(100, 80), random_image(70, 300), random_image(64, 64), random_image(90, 60, "L")]
    crops = np.stack([to_pixels(center_crop(image.convert("RGB"), SIDE, 0.875)[0]) for image in images])
    expected = normalised(torch.from_numpy(crops))
    assert torch.equal(encoder.preprocess(images), expected)
    for image, one in zip(images, expected, strict=True):
        stored = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None]
        if stored.shape[2:] != (SIDE, SIDE):
            assert torch.equal(encoder.preprocess(stored)[0], one)
    assert torch.equal(encoder(images).tokens, encoder(expected).tokens)


def test_uint8_of_the_right_size_is_not_cropped_again(encoder: mimscale.Encoder) -> None:
    crop = torch.randint(256, (3, 3, SIDE, SIDE), dtype=torch.uint8)
    assert torch.equal(encoder.preprocess(crop), normalised(crop))


def test_floats_are_normalised_already(encoder: mimscale.Encoder) -> None:
    assert encoder.preprocess(IMAGES) is IMAGES
    assert torch.equal(encoder.preprocess(IMAGES.double()), IMAGES)


@pytest.mark.parametrize(
    ("images", "text"),
    [
        (
            torch.zeros(3, 64, 64),
            r"shape 3 x 64 x 64 are not \[B, 3, H, W\]; add a first dimension with images\[None\]",
        ),
        (torch.zeros(2, 1, 64, 64), "give at least one RGB image"),
        (torch.zeros(0, 3, 64, 64), "give at least one RGB image"),
        (torch.zeros(2, 3, 32, 64), "normalised images of shape 2 x 3 x 32 x 64 are not 64 x 64"),
        (torch.zeros(2, 3, 64, 64, dtype=torch.int64), "torch.int64 are neither uint8"),
        (Image.new("RGB", (64, 64)), r"images is a Image; give a tensor \[B, 3, H, W\] or a list of Pillow images"),
        ([np.zeros((64, 64, 3))], "the list of images holds a ndarray"),
        ([], "the list of images is empty"),
        ("cat.jpg", "the list of images holds a str"),
    ],
)
def test_other_things_are_refused(images: Any, text: str, encoder: mimscale.Encoder) -> None:
    with pytest.raises(mimscale.UserError, match=text):
        encoder(images)


def test_a_list_is_a_batch(encoder: mimscale.Encoder) -> None:
    images = [random_image(100, 80), random_image(80, 100)]
    both: Tensor = encoder(images).pooled
    torch.testing.assert_close(both, torch.cat([encoder([image]).pooled for image in images]))
