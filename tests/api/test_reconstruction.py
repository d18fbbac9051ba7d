"""`mimscale.reconstruct` and its verb: every method that predicts pixels, and those that do not."""

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
from mimscale.config.run import RunConfig, method_class
from mimscale.methods.base import Method
from mimscale.models.patches import unnormalised
from mimscale.types import TeacherInfo, normalised
from tests.convert.runs import MAE_SECTION, STUDENT, build, save_run, saved_run
from tests.golden import batch_of, run_config
from tests.ranks import STAGES

SIDE, PATCH, GRID = 64, 8, 8
IMAGES = torch.randint(256, (3, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
TEACHER: dict[str, Any] = {"library": "timm", "model": "vit_tiny_patch16_224"}
TEACHER |= {"options": {"embed_dim": 24, "depth": 3, "num_heads": 2, "patch_size": PATCH}}
AMT = {"policy": "amt", "ratio": 0.45, "drop_ratio": 0.4}
SECTIONS: dict[str, dict[str, Any]] = {
    "mae": MAE_SECTION,
    "mff": {**MAE_SECTION, "name": "mff", "fusion": {"levels": [0, 1, 2]}},
    "pixmim": {**MAE_SECTION, "name": "pixmim", "low_pass_radius": 10, "norm_pix_loss": False},
    "convmae": {**MAE_SECTION, "name": "convmae", "stages": STAGES},
    "simmim": {"name": "simmim", "masking": {"unit": 16}},
    "mrmae": {**MAE_SECTION, "name": "mrmae"},
    "amt": {**MAE_SECTION, "masking": AMT},
    "attention": {**MAE_SECTION, "masking": {"policy": "attention"}},
    "maskalign": {"name": "maskalign", "levels": "top2"},
}
MASKED = {"simmim": 40, "amt": 54}  # of 64 patches: ceil(16 x 0.6) squares of four; 45 % and 40 % are not seen


def built(name: str) -> tuple[Method, RunConfig]:
    """A method whose mask tokens and heads are far from their initial values."""
    taught = name in ("mrmae", "maskalign", "attention")
    config = run_config(SECTIONS[name], {**STUDENT, "patch": PATCH}, SIDE, teachers={"t": TEACHER} if taught else {})
    info = TeacherInfo("t", dim=24, depth=3, grid=(GRID, GRID), image_size=SIDE, has_cls=True)
    torch.manual_seed(1)
    method: Method = method_class(config.method.name)(config, {"t": info} if taught else {})
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return method, config


def hidden(mask_BL: Tensor) -> Tensor:
    """[B, L] -> [B, 1, H, W], as numpy's kron does it."""
    maps = mask_BL.view(-1, GRID, GRID).numpy()
    return torch.from_numpy(np.kron(maps, np.ones((PATCH, PATCH), np.float32)))[:, None]


@pytest.mark.parametrize("name", [name for name in SECTIONS if name != "maskalign"])
def test_reconstructions_of_each_method(name: str, tmp_path: Path) -> None:
    """No teacher is loaded, and as many patches are seen as in training."""
    method, config = built(name)
    found = mimscale.reconstruct(save_run(tmp_path / "run", method, config), IMAGES, seed=5)
    assert found.mask.shape == (3, GRID * GRID) and set(found.mask.unique().tolist()) == {0.0, 1.0}
    assert (found.mask.sum(dim=1) == MASKED.get(name, 48)).all() and len(found.mask.unique(dim=0)) == 3
    pixels, covered = normalised(IMAGES), hidden(found.mask)
    torch.testing.assert_close(found.input, IMAGES.float() / 255)
    torch.testing.assert_close(found.masked, torch.where(covered > 0, 0.5, found.input))
    torch.testing.assert_close(found.pasted, torch.where(covered > 0, found.reconstruction, found.input))
    for part in found[:4]:
        assert part.dtype == torch.float32 and part.device.type == "cpu" and 0 <= part.min() <= part.max() <= 1
    if name in ("amt", "attention", "mrmae"):
        return  # masks of another policy, so `view` of the run itself would ask for a teacher or a table
    units = (4, 4) if name == "simmim" else (GRID, GRID)
    noise = torch.rand(3, units[0] * units[1], generator=torch.Generator().manual_seed(5))
    view = method.eval().view(batch_of(pixels, mask=noise), {})
    assert view is not None and view.mask is not None and view.reconstruction is not None
    assert torch.equal(view.mask.float(), found.mask)
    torch.testing.assert_close(found.reconstruction, view.reconstruction)
    torch.testing.assert_close(found.input, unnormalised(pixels))


def test_the_pixels_of_mrmae_are_those_of_mae(tmp_path: Path) -> None:
    """Its student and decoder, in a MAE: the mimic heads do not touch the pixels."""
    method, config = built("mrmae")
    plain, plain_config = built("mae")
    shared = {name: tensor for name, tensor in method.state_dict().items() if not name.startswith("mimic.")}
    plain.load_state_dict(shared)
    ours = mimscale.reconstruct(save_run(tmp_path / "mrmae", method, config), IMAGES)
    theirs = mimscale.reconstruct(save_run(tmp_path / "mae", plain, plain_config), IMAGES)
    assert torch.equal(ours.mask, theirs.mask)
    torch.testing.assert_close(ours.reconstruction, theirs.reconstruction)


def test_seed_ratio_and_images(tmp_path: Path) -> None:
    folder, _ = saved_run(tmp_path / "run", "mae")  # 4 x 4 patches of 16 pixels
    first, again, other = (mimscale.reconstruct(folder, IMAGES, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.mask, again.mask) and torch.equal(first.reconstruction, again.reconstruction)
    assert not torch.equal(first.mask, other.mask)
    assert torch.equal(mimscale.reconstruct(folder, IMAGES[:1]).mask, first.mask[:1])
    assert mimscale.reconstruct(folder, IMAGES, mask_ratio=0.5).mask.sum(dim=1).tolist() == [8.0] * 3
    images = [Image.fromarray(image.permute(1, 2, 0).numpy()).resize((100, 80)) for image in IMAGES]
    assert mimscale.reconstruct(folder, images).input.shape == (3, 3, SIDE, SIDE)
    torch.testing.assert_close(mimscale.reconstruct(folder, normalised(IMAGES)).pasted, first.pasted)


def test_an_official_file_needs_its_recipe(tmp_path: Path) -> None:
    folder, _ = saved_run(tmp_path / "run", "mae")
    official, ours = tmp_path / "mae.pth", tmp_path / "ours.safetensors"
    assert main(["convert", str(folder), str(official), "--to", "official"]) == 0
    assert main(["convert", str(folder), str(ours), "--to", "mimscale"]) == 0
    expected = mimscale.reconstruct(folder, IMAGES)
    assert torch.equal(mimscale.reconstruct(ours, IMAGES).pasted, expected.pasted)
    given = {"data.image_size": SIDE, "student": STUDENT, "method": MAE_SECTION}
    found = mimscale.reconstruct(official, IMAGES, recipe="mae_vit_b16", overrides=given)
    assert torch.equal(found.pasted, expected.pasted)
    for path, options, text in (
        (official, {}, "give the recipe that it belongs to, such as mae_vit_l16"),
        (official, {"recipe": "mae_vit_b16"}, "does not fit"),
        (ours, {"recipe": "mae_vit_b16"}, "knows its recipe; leave recipe out"),
        (ours, {"mask_ratio": 1.0}, "mask_ratio = 1 must lie between 0 and 1"),
        (ours, {"ema": True}, "has no moving average"),
    ):
        with pytest.raises(mimscale.UserError, match=text):
            mimscale.reconstruct(path, IMAGES, **options)


@pytest.mark.parametrize("name", ["maskalign", "finetune"])
def test_methods_without_pixels_are_refused(name: str, tmp_path: Path) -> None:
    method, config = built(name) if name == "maskalign" else build(name)
    folder = save_run(tmp_path / "run", method, config)
    with pytest.raises(mimscale.UserError, match=f"{name} predicts no pixels; mae, mff, pixmim"):
        mimscale.reconstruct(folder, IMAGES)


def test_an_encoder_alone_has_no_decoder(tmp_path: Path) -> None:
    folder, _ = saved_run(tmp_path / "run", "mae")
    assert main(["convert", str(folder), str(tmp_path / "vit.safetensors"), "--to", "student"]) == 0
    given = {"data.image_size": SIDE, "student": STUDENT, "method": MAE_SECTION}
    with pytest.raises(mimscale.UserError, match="it is not a whole mae model"):
        mimscale.reconstruct(tmp_path / "vit.safetensors", IMAGES, recipe="mae_vit_b16", overrides=given)


# --------------------------------------------------------------------------------------------------------- the verb


def image_file(path: Path, number: int) -> str:
    Image.fromarray(IMAGES[number].permute(1, 2, 0).numpy()).save(path)
    return str(path)


def test_the_verb_writes_one_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = saved_run(tmp_path / "run", "mae")
    files = [image_file(tmp_path / f"{number}.png", number) for number in (0, 1)]
    words = ["reconstruct", str(folder), *files, str(tmp_path / "out" / "rows.png")]
    assert main([*words, "--samples", "2", "--mask-ratio", "0.5", "--seed", "3"]) == 0
    printed = capsys.readouterr().out
    assert "8 of 16 patches masked, uniformly, seed 3" in printed and "rows.png" in printed
    drawn = np.asarray(Image.open(tmp_path / "out" / "rows.png"))
    side = SIDE * 3  # enlarged to at least 160 pixels
    assert drawn.shape == (18 + 4 * (side + 4) - 4, 4 * (side + 4) - 4, 3)
    batch = [Image.open(file) for file in (files[0], files[0], files[1], files[1])]
    found = mimscale.reconstruct(folder, batch, mask_ratio=0.5, seed=3)
    assert not torch.equal(found.mask[0], found.mask[1])
    for row in range(4):
        for column, part in enumerate((found.input, found.masked, found.reconstruction, found.pasted)):
            top, left = 18 + row * (side + 4), column * (side + 4)
            tile = drawn[top : top + side : 3, left : left + side : 3].astype(float) / 255
            assert np.abs(tile - part[row].permute(1, 2, 0).numpy()).max() <= 0.51 / 255
    assert (drawn[:18] < 128).any() and (drawn[18 + side, :] == 255).all()  # titles; white between the rows


def test_the_verb_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = saved_run(tmp_path / "run", "mae")
    image = image_file(tmp_path / "image.png", 0)
    (tmp_path / "notes.jpg").write_text("no image")
    out = str(tmp_path / "out.png")
    for words, text in (
        ([image, image], "exists; choose another name"),
        ([image, str(tmp_path / "out.jpg")], "must end in .png"),
        ([str(tmp_path / "notes.jpg"), out], "cannot be read (not an image"),
        ([str(tmp_path / "nowhere.jpg"), out], "cannot be read (No such file or directory)"),
        ([image, out, "--samples", "0"], "--samples 0 must be 1 or more"),
        ([image, out, "--mask-ratio", "1.5"], "mask_ratio = 1.5"),
        ([image, out, "--recipe", "mae_vit_b16"], "knows its recipe"),
    ):
        assert main(["reconstruct", str(folder), *words]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and text in error, error
        assert not (tmp_path / "out.png").exists()
