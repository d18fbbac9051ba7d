from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mimscale.data.manifest import Manifest
from mimscale.evals.features import Key, chunks, frozen, random_like, raw_pixel_tokens, raw_pixels, stream
from mimscale.evals.protocols.knn import Neighbours
from mimscale.models.beit import Beit
from mimscale.models.config import StudentConfig
from mimscale.models.convvit import ConvStages, ConvViT
from mimscale.models.vit import LN_EPS, ViT

SMALL = StudentConfig(width=32, depth=2, heads=2, patch=8)


@pytest.mark.parametrize(("batch", "workers"), [(7, 0), (120, 0), (16, 2)])
def test_every_sample_once_in_order_with_its_own_features(data: tuple[Path, Path], batch: int, workers: int) -> None:
    manifest = Manifest.load(data[0])
    vit = random_like(ViT(SMALL, 32), seed=0)
    both = {"vit": frozen(vit, ("mean", "cls")), "raw": raw_pixels}
    options = {"crop_pct": 1.0, "device": torch.device("cpu")}
    pieces = list(stream(both, manifest, 32, batch=batch, workers=workers, **options))  # type: ignore[arg-type]
    labels = torch.cat([labels for _, labels in pieces])
    assert manifest.labels is not None and labels.tolist() == manifest.labels.tolist()
    pixels = torch.cat([features["raw", "pixels"] for features, _ in pieces])
    assert pixels.shape == (120, 3 * 32 * 32) and len(pixels.unique(dim=0)) == 120
    tokens = vit(pixels.view(-1, 3, 32, 32)).tokens
    for pool, expected in (("mean", tokens[:, 1:].mean(1)), ("cls", tokens[:, 0])):
        torch.testing.assert_close(torch.cat([features["vit", pool] for features, _ in pieces]), expected)


@pytest.mark.parametrize("batch", [7, 16, 1000])
def test_what_fills_up_batches_never_counts(data: tuple[Path, Path], batch: int) -> None:
    """One rank or three, sizes that divide or not: the same features and neighbours."""
    train = Manifest.load(data[0])
    sizes = []

    def extract(images: torch.Tensor) -> dict[str, torch.Tensor]:
        sizes.append(len(images))
        return raw_pixels(images)

    def everything(batch: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
        options = {"batch": batch, "workers": 0, "world": world}
        passes = [
            list(stream({"raw": extract}, train, 32, crop_pct=1.0, device=torch.device("cpu"), rank=r, **options))
            for r in range(world)
        ]
        assert len({len(one) for one in passes}) == 1
        pieces = [piece for one in passes for piece in one]
        return torch.cat([f["raw", "pixels"] for f, _ in pieces]), torch.cat([labels for _, labels in pieces])

    features, labels = everything(120, 1)

    def votes(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        neighbours = Neighbours(features, 5)
        neighbours.add(features, labels)
        return neighbours.votes(10, 0.07)

    expected = votes(features, labels)
    for world in (1, 3):
        sizes.clear()
        ours, of_ours = everything(batch, world)
        assert len(set(sizes)) == 1 and torch.equal(ours, features) and torch.equal(of_ours, labels)
        assert torch.equal(votes(ours, of_ours), expected)


def test_a_student_without_last_norm_gets_an_untrained_one() -> None:
    vit = ViT(SMALL, 32, final_norm=False)
    images = torch.randn(2, 3, 32, 32)
    expected = F.layer_norm(vit(images).tokens, (32,), eps=LN_EPS)[:, 1:].mean(1)
    torch.testing.assert_close(frozen(vit, ["mean"])(images)["mean"], expected)


def test_random_networks_are_seeded_and_leave_the_global_generator_alone() -> None:
    networks = (ViT(SMALL, 32, final_norm=False), Beit(SMALL, 32, positions="absolute", mask_token=True))
    before = torch.random.get_rng_state()
    for vit in networks:
        random = [random_like(vit, seed) for seed in (3, 3, 4)]
        assert all(type(r) is type(vit) and isinstance(r.norm, torch.nn.LayerNorm) for r in random)
        one, same, other = (r.state_dict()["blocks.0.attn.qkv.weight"] for r in random)
        assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(before, torch.random.get_rng_state())


def test_large_images_are_averaged_for_the_raw_row() -> None:
    images = torch.arange(64.0).view(1, 1, 1, 64).expand(2, 3, 64, 64)
    pixels = raw_pixels(images)["pixels"].view(2, 3, 32, 32)
    assert torch.equal(pixels[0, 0, 0], torch.arange(32.0) * 2 + 0.5)
    tokens = raw_pixel_tokens(images)["pixels"]
    assert tokens.shape == (2, 1024, 3) and torch.equal(tokens[0].T.reshape(3, 32, 32), pixels[0])


def test_tokens_are_those_whose_mean_is_the_pooled_feature() -> None:
    vit = random_like(ViT(SMALL, 32), seed=0)
    images = torch.randn(2, 3, 32, 32)
    tokens = frozen(vit, ["tokens"])(images)["tokens"]
    assert tokens.shape == (2, 16, 32)
    assert torch.equal(tokens.mean(dim=1), frozen(vit, ["mean"])(images)["mean"])


@pytest.mark.parametrize("final_norm", [True, False])
def test_blocks_are_class_token_and_mean_of_the_last_blocks(final_norm: bool) -> None:
    vit = ViT(SMALL, 32, final_norm=final_norm)
    images = torch.randn(2, 3, 32, 32)
    found = frozen(vit, ["mean", "cls", "blocks"], blocks=4)(images)  # more than there are
    assert found["blocks"].shape == (2, 2, 2, 32)
    assert torch.equal(found["blocks"][:, -1], torch.stack([found["cls"], found["mean"]], dim=1))
    first = vit(images, levels=[0]).levels[0]
    first = F.layer_norm(first, (32,), eps=LN_EPS)  # a new norm has weight 1 and bias 0
    expected = torch.stack([first[:, 0], first[:, 1:].mean(dim=1)], dim=1)
    torch.testing.assert_close(found["blocks"][:, 0], expected)
    assert torch.equal(frozen(vit, ["blocks"], blocks=1)(images)["blocks"], found["blocks"][:, -1:])


def test_blocks_without_a_class_token_are_means() -> None:
    stages = ConvStages(patches=(2, 2, 2), widths=(8, 16), depths=(1, 1))
    vit = ConvViT(SMALL, stages, 32)
    found = frozen(vit, ["mean", "blocks"], blocks=2)(torch.randn(2, 3, 32, 32))
    assert found["blocks"].shape == (2, 2, 1, 32) and torch.equal(found["blocks"][:, -1, 0], found["mean"])


@pytest.mark.parametrize("batch", [16, 20, 1000])
def test_chunks_are_the_features_of_their_samples(data: tuple[Path, Path], batch: int) -> None:
    """Whichever are asked for, of whichever network, in whatever company, to the bit."""
    manifest = Manifest.load(data[0])
    both = {"vit": frozen(random_like(ViT(SMALL, 32), seed=0), ["mean"]), "raw": raw_pixels}

    def found(wanted: Mapping[int, Collection[str]]) -> dict[int, dict[Key, torch.Tensor]]:
        options = {"length": 32, "batch": batch, "workers": 0, "crop_pct": 1.0, "device": torch.device("cpu")}
        return dict(chunks(wanted, both, manifest, 32, **options))  # type: ignore[arg-type]

    whole = found(dict.fromkeys(range(4), ["vit", "raw"]))
    assert [len(whole[number]["raw", "pixels"]) for number in range(4)] == [32, 32, 32, 24]
    streamed = list(stream(both, manifest, 32, batch=120, workers=0, crop_pct=1.0, device=torch.device("cpu")))
    for key in (("vit", "mean"), ("raw", "pixels")):
        together = torch.cat([whole[number][key] for number in range(4)])
        torch.testing.assert_close(together, torch.cat([features[key] for features, _ in streamed]))
    some = found({3: ["vit"], 1: ["raw"]})
    assert some.keys() == {1, 3} and some[1].keys() == {("raw", "pixels")} and some[3].keys() == {("vit", "mean")}
    assert torch.equal(some[3]["vit", "mean"], whole[3]["vit", "mean"])
