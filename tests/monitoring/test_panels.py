from __future__ import annotations

from dataclasses import replace

import torch

from mimscale.monitoring.panels import DARK, GAP, GREY, components, heat, panel, tiles
from mimscale.types import View


def view() -> View:
    """Two 8-px images with a 2 x 2 grid; the first patch of the first and the last of the second are masked."""
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 1.0]])
    return View(images, mask, reconstruction=torch.zeros(2, 3, 8, 8), attention=torch.tensor([[1.0, 2, 3, 4]] * 2))


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    return (images * 255).round().to(torch.uint8)


def test_masked_and_reconstructed_differ_from_the_input_in_masked_patches_only() -> None:
    v, rows = view(), tiles(view())
    assert list(rows) == ["input", "masked", "reconstruction", "attention"]
    assert torch.equal(rows["input"], to_uint8(v.images))
    grey = round(255 * GREY)
    for name, value in (("masked", grey), ("reconstruction", 0)):
        expected = to_uint8(v.images)
        expected[0, :, :4, :4] = value
        expected[1, :, 4:, 4:] = value
        assert torch.equal(rows[name], expected)


def test_attention_is_brightest_where_it_is_strongest() -> None:
    dark = View(torch.zeros(1, 3, 8, 8), attention=torch.tensor([[0.1, 0.2, 0.3, 0.4]]))
    patches = tiles(dark)["attention"][0].float().mean(0).view(2, 4, 2, 4).mean(dim=(1, 3)).flatten()
    assert torch.equal(patches, patches.sort().values) and patches.unique().numel() == 4


def test_attention_that_is_not_finite_is_dark() -> None:
    attention = torch.tensor([[torch.nan] * 4, [1.0, torch.inf, 3, 4], [1.0, 0, 3, 4]])
    rows = tiles(View(torch.zeros(3, 3, 8, 8), attention=attention))["attention"]
    nothing, finite = (
        tiles(View(torch.zeros(1, 3, 8, 8), attention=row))["attention"][0]
        for row in (torch.zeros(1, 4), torch.tensor([[1.0, 0, 3, 4]]))
    )
    assert torch.equal(rows[0], nothing) and torch.equal(rows[1], finite) and torch.equal(rows[2], finite)


def test_heat_ends_at_its_first_and_last_colour() -> None:
    ends = heat(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)) * 255
    assert ends[0].flatten().tolist() == [0, 0, 4] and ends[1].flatten().round().tolist() == [252, 255, 164]


def test_panel_shows_tile_row_by_row_and_sample_by_column() -> None:
    image = panel(tiles(view()))
    side = 64  # 8 px, enlarged
    assert image.dtype == torch.uint8 and image.shape == (3, 4 * side + 3 * GAP, 2 * side + GAP)
    second_masked = image[:, side + GAP : 2 * side + GAP, side + GAP :]
    assert torch.equal(second_masked[:, ::8, ::8], tiles(view())["masked"][1])


def test_images_alone_and_fewer_samples() -> None:
    assert list(tiles(View(torch.rand(3, 3, 8, 8)), samples=2)) == ["input"]
    assert panel(tiles(View(torch.rand(3, 3, 70, 70)), samples=2)).shape == (3, 70, 2 * 70 + GAP)


def test_dropped_patches_are_dark() -> None:
    v = view()
    rows = tiles(replace(v, mask=torch.tensor([[1.0, 1, 0, 0]] * 2), dropped=torch.tensor([[0, 1.0, 0, 0]] * 2)))
    grey, dark = round(255 * GREY), round(255 * DARK)
    for name, value in (("masked", grey), ("reconstruction", 0)):
        assert rows[name][:, :, :4, :4].unique().tolist() == [value]
        assert rows[name][:, :, :4, 4:].unique().tolist() == [dark]
        assert torch.equal(rows[name][:, :, 4:], rows["input"][:, :, 4:])


def test_components_separate_groups_of_patches() -> None:
    """Three groups of features, hidden by noise and a rotation, get three colours."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.tensor([0, 0, 1, 2]).repeat(5, 1)
    axes = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    features = 10 * axes[groups] + 0.01 * torch.randn(5, 4, 16, generator=generator) + 100
    colours = components(features)
    assert colours.shape == (5, 4, 3) and colours.min() == 0 and colours.max() == 1
    centres = torch.stack([colours[groups == group].mean(0)[:2] for group in range(3)])
    spread = max(float((colours[groups == group][:, :2] - centres[group]).abs().max()) for group in range(3))
    assert torch.pdist(centres).min() > 0.5 > 0.05 > spread
    assert torch.equal(components(features), colours)
    for value in (torch.nan, torch.inf, -torch.inf):
        assert components(torch.full((1, 4, 8), value)).isfinite().all()


def test_features_are_one_colour_per_patch() -> None:
    row = tiles(replace(view(), features=torch.randn(2, 4, 6)))["features"]
    patches = row.view(2, 3, 2, 4, 2, 4)
    assert torch.equal(patches, patches[:, :, :, :1, :, :1].expand_as(patches))
