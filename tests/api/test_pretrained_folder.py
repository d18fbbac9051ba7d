"""Folders of timm and of Hugging Face transformers, against timm itself and against a forward pass in their names."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import Tensor

import mimscale
from tests.api import transformers_vit as hf
from tests.teachers.tiny import TIMM, timm_model

IMAGES = torch.randn(2, 3, hf.SIDE, hf.SIDE, generator=torch.Generator().manual_seed(1))


def timm_folder(folder: Path, **options: Any) -> tuple[Path, Any]:
    """A model as timm saves it, and the model."""
    model = timm_model("vit_tiny_patch16_224", 32, patch_size=8, **options)
    arguments = {"img_size": 32, "patch_size": 8, **TIMM, **options}
    save_for_hf(model, str(folder), model_args=arguments, safe_serialization=True)
    return folder, model


def test_a_timm_folder_gives_what_timm_gives(tmp_path: Path) -> None:
    folder, model = timm_folder(tmp_path / "model")
    encoder = mimscale.load_encoder(folder)
    assert (encoder.width, encoder.patch, encoder.grid, encoder.image_size) == (32, 8, (4, 4), 32)
    assert (encoder.mean, encoder.std) == ((0.5,) * 3, (0.5,) * 3)  # of this model's card, not ImageNet's
    found, expected = encoder(IMAGES), model.forward_features(IMAGES)
    assert found.cls is not None and torch.equal(found.cls, expected[:, 0])
    assert torch.equal(found.tokens, expected[:, 1:])
    assert torch.equal(mimscale.load_encoder(folder / "model.safetensors")(IMAGES).tokens, found.tokens)


def test_registers_are_no_patches(tmp_path: Path) -> None:
    options = {"reg_tokens": 4, "no_embed_class": True, "init_values": 1e-5}
    folder, model = timm_folder(tmp_path / "model", **options)
    found, expected = mimscale.load_encoder(folder)(IMAGES), model.forward_features(IMAGES)
    assert found.tokens.shape == (2, 16, 32) and torch.equal(found.tokens, expected[:, 5:])


def test_a_timm_model_without_class_token_and_last_norm(tmp_path: Path) -> None:
    options = {"class_token": False, "global_pool": "avg", "fc_norm": True}
    folder, model = timm_folder(tmp_path / "model", **options)
    found = mimscale.load_encoder(folder)(IMAGES)
    assert found.cls is None
    torch.testing.assert_close(found.tokens, F.layer_norm(model.forward_features(IMAGES), (32,), eps=1e-6))


def test_a_timm_folder_with_a_classifier_and_a_pickle(tmp_path: Path) -> None:
    """As `save_for_hf` writes it when it is told nothing; the older config.json has one level."""
    model = timm_model("vit_tiny_patch16_224", 32, patch_size=8)
    model.reset_classifier(7)
    save_for_hf(model, str(tmp_path / "model"), model_args={"img_size": 32, "patch_size": 8, **TIMM})
    assert (tmp_path / "model" / "pytorch_model.bin").is_file()
    expected = model.forward_features(IMAGES)[:, 1:]
    assert torch.equal(mimscale.load_encoder(tmp_path / "model")(IMAGES).tokens, expected)
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    older = {"architecture": config["architecture"], "model_args": config["model_args"], "num_features": 32}
    path.write_text(json.dumps({**older, **config["pretrained_cfg"]}))
    assert torch.equal(mimscale.load_encoder(tmp_path / "model")(IMAGES).tokens, expected)


def test_positions_of_a_timm_folder_are_resized(tmp_path: Path) -> None:
    folder, _ = timm_folder(tmp_path / "model")
    encoder = mimscale.load_encoder(folder, image_size=48)
    assert encoder.grid == (6, 6) and encoder([Image.new("L", (40, 30), 99)]).tokens.shape == (1, 36, 32)


@pytest.mark.parametrize(
    ("values", "prefix", "eps", "mean"),
    [
        ({"model_type": "vit", "layer_norm_eps": 1e-3}, "", 1e-3, 0.5),
        ({"model_type": "vit"}, "vit.", 1e-12, 0.5),
        ({"model_type": "vit_mae", "mask_ratio": 0.75}, "vit.", 1e-12, 0.485),
    ],
)
def test_a_transformers_vit(tmp_path: Path, values: dict[str, Any], prefix: str, eps: float, mean: float) -> None:
    """Whatever else the file holds (a classifier, a decoder with layers of its own) is left out."""
    state = hf.vit_state(prefix)
    if prefix:
        state |= {"classifier.weight": torch.ones(3, hf.WIDTH), "decoder.mask_token": torch.ones(1, 1, 8)}
    folder = hf.save(tmp_path / "model", state, **hf.config(**values))
    encoder = mimscale.load_encoder(folder)
    found, expected = encoder(IMAGES), hf.vit_tokens(hf.vit_state(), IMAGES, eps)
    assert found.cls is not None and encoder.mean[0] == mean
    torch.testing.assert_close(found.cls, expected[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.tokens, expected[:, 1:], rtol=1e-5, atol=1e-5)


def test_constants_of_a_transformers_folder_count(tmp_path: Path) -> None:
    values = hf.config(model_type="vit", hidden_act="gelu_new", layer_norm_eps=1e-6)
    folder = hf.save(tmp_path / "model", hf.vit_state(), **values)
    card = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (folder / "preprocessor_config.json").write_text(json.dumps(card))
    encoder = mimscale.load_encoder(folder)
    assert encoder.mean == (0.1, 0.2, 0.3) and encoder.std == (0.4, 0.5, 0.6)
    expected = hf.vit_tokens(hf.vit_state(), IMAGES, 1e-6, partial(F.gelu, approximate="tanh"))
    torch.testing.assert_close(encoder(IMAGES).tokens, expected[:, 1:], rtol=1e-5, atol=1e-5)
    white = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    torch.testing.assert_close(encoder.preprocess(white)[0, :, 0, 0], torch.tensor([0.9 / 0.4, 0.8 / 0.5, 0.7 / 0.6]))


@pytest.mark.parametrize(("kind", "prefix"), [("clip_vision_model", ""), ("clip", "vision_model.")])
def test_the_vision_tower_of_clip(tmp_path: Path, kind: str, prefix: str) -> None:
    """Another norm before the blocks, no bias of the patches, QuickGELU, and LayerNorm's eps of 1e-5."""
    nested = hf.config(layer_norm_eps=1e-5)
    values = {"vision_config": nested} if kind == "clip" else nested
    folder = hf.save(tmp_path / "model", hf.clip_state(prefix), model_type=kind, **values)
    encoder = mimscale.load_encoder(folder)
    assert encoder.mean[0] == 0.48145466
    state = hf.vit_state()
    state["embeddings.patch_embeddings.projection.bias"] = torch.zeros(hf.WIDTH)
    expected = clip_tokens(state)
    torch.testing.assert_close(encoder(IMAGES).tokens, expected[:, 1:], rtol=1e-5, atol=1e-5)


def clip_tokens(state: hf.State) -> Tensor:
    """`vit_tokens` with CLIP's norm between the embedding and the blocks."""
    patches = F.conv2d(IMAGES, state["embeddings.patch_embeddings.projection.weight"], stride=hf.PATCH).flatten(2).mT
    x = torch.cat([state["embeddings.cls_token"].expand(2, -1, -1), patches], dim=1)
    x = x + state["embeddings.position_embeddings"]
    weight, bias = torch.linspace(0.5, 1.5, hf.WIDTH), torch.linspace(-1, 1, hf.WIDTH)
    x = F.layer_norm(x, (hf.WIDTH,), weight, bias, 1e-5)
    return hf.vit_blocks(state, x, 1e-5, lambda y: y * torch.sigmoid(1.702 * y))


def refused(folder: Path, **options: Any) -> str:
    with pytest.raises(mimscale.UserError) as caught:
        mimscale.load_encoder(folder, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_what_is_refused(tmp_path: Path) -> None:
    vit = hf.config(model_type="vit")
    assert "holds a 'swin' of transformers" in refused(hf.save(tmp_path / "swin", {}, model_type="swin"))
    assert "neither 'architecture'" in refused(hf.save(tmp_path / "other", {}, name="x"))
    folder = hf.save(tmp_path / "short", {n: t for n, t in hf.vit_state().items() if n != "layernorm.bias"}, **vit)
    assert "the tensor 'layernorm.bias' is missing" in refused(folder)
    folder = hf.save(tmp_path / "narrow", hf.vit_state(), **{**vit, "hidden_size": 64})
    assert "do not fit together" in refused(folder)
    folder = hf.save(tmp_path / "act", hf.vit_state(), **{**vit, "hidden_act": "mish"})
    assert "hidden_act = mish" in refused(folder)
    folder = hf.save(tmp_path / "names", {"a": torch.ones(1)}, **vit)
    assert "does not hold the tensors of a vit" in refused(folder)
    (folder / "model.safetensors").write_bytes(b"cut")
    assert "not a whole safetensors file" in refused(folder)
    (folder / "model.safetensors").unlink()
    assert "has config.json, but neither model.safetensors nor pytorch_model.bin" in refused(folder)
    (folder / "config.json").write_text("{")
    assert "is not JSON" in refused(folder)
    folder = hf.save(tmp_path / "vit", hf.vit_state(), **vit)
    assert "keeps its own size" in refused(folder, image_size=64)
    assert "ema = True" in refused(folder, ema=True)


def test_what_timm_cannot_load_is_refused(tmp_path: Path) -> None:
    folder, _ = timm_folder(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    save_file({n: t for n, t in weights.items() if n != "blocks.1.mlp.fc1.weight"}, folder / "model.safetensors")
    assert "timm cannot load it" in refused(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architecture": "vit_of_the_future"}))
    assert "timm cannot load it (Unknown model (vit_of_the_future))" in refused(folder)
    convnet = timm.create_model("resnet10t", num_classes=0)
    save_for_hf(convnet, str(tmp_path / "convnet"), safe_serialization=True)
    assert "holds a ResNet, which has no patch tokens" in refused(tmp_path / "convnet")


ODD_VALUES: tuple[tuple[dict[str, Any], str], ...] = (
    ({"hidden_size": "32"}, "hidden_size = '32': input should be a valid integer"),
    ({"hidden_size": 32.5}, "hidden_size = 32.5"),
    ({"hidden_size": None}, "hidden_size = None"),
    ({"hidden_size": 0}, "hidden_size = 0: input should be greater than or equal to 1"),
    ({"hidden_size": 10**30}, "hidden_size = 1000000000000000000000000000000"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000: input should be less than or equal to 512"),
    ({"num_hidden_layers": True}, "num_hidden_layers = True"),
    ({"num_attention_heads": [4]}, "num_attention_heads = [4]"),
    ({"num_attention_heads": 3}, "do not fit together"),
    ({"image_size": [32, 48]}, "image_size = [32, 48]"),
    ({"image_size": 1 << 40}, "image_size = 1099511627776"),
    ({"patch_size": -8}, "patch_size = -8"),
    ({"num_channels": 4}, "num_channels = 4"),
    ({"qkv_bias": "no"}, "qkv_bias = 'no'"),
    ({"hidden_act": ["gelu"]}, "hidden_act = ['gelu']"),
    ({"layer_norm_eps": "small"}, "layer_norm_eps = 'small'"),
    ({"layer_norm_eps": float("nan")}, "layer_norm_eps = nan"),
    ({"intermediate_size": 1 << 20, "hidden_size": 8192}, "a model of "),
    ({"model_type": ["vit"]}, "holds a ['vit'] of transformers"),
    ({"model_type": 5}, "holds a 5 of transformers"),
    ({"vision_config": [1]}, "vision_config = [1] is not a section"),
)


@pytest.mark.parametrize("values, text", ODD_VALUES)
def test_odd_values_in_a_config_are_one_line(tmp_path: Path, values: dict[str, Any], text: str) -> None:
    assert text in refused(hf.save(tmp_path / "model", hf.vit_state(), **{**hf.config(model_type="vit"), **values}))


@pytest.mark.parametrize(
    "content, text",
    [
        (b"[]", "holds a list, not a mapping"),
        (b"null", "holds a NoneType, not a mapping"),
        (b"1e999", "holds a float, not a mapping"),
        (b"", "is not JSON"),
        (b"\xff\xfe{}", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"a": 1', "is not JSON"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_what_is_no_mapping_is_one_line(tmp_path: Path, content: bytes, text: str, name: str) -> None:
    folder = hf.save(tmp_path / "model", hf.vit_state(), **hf.config(model_type="vit"))
    (folder / name).write_bytes(content)
    assert text in refused(folder) and name in refused(folder)


@pytest.mark.parametrize("values", [0.5, [0.5], [0.5, 0.5, "0.5"], [0.5, 0.5, float("inf")], {"r": 1}, [0, 1, 1]])
def test_an_odd_normalisation_is_one_line(tmp_path: Path, values: Any) -> None:
    folder = hf.save(tmp_path / "model", hf.vit_state(), **hf.config(model_type="vit"))
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_std": values}))
    assert "is not a number for each of red, green and blue" in refused(folder)


def test_a_square_given_as_a_pair_is_read(tmp_path: Path) -> None:
    pairs = {"image_size": [hf.SIDE, hf.SIDE], "patch_size": [hf.PATCH, hf.PATCH]}
    folder = hf.save(tmp_path / "model", hf.vit_state(), **{**hf.config(model_type="vit"), **pairs})
    assert mimscale.load_encoder(folder).image_size == hf.SIDE


@pytest.mark.parametrize(
    "values, text",
    [
        ({"architecture": ["vit"]}, "architecture = ['vit'] is not a name of timm's"),
        ({"architecture": None}, "architecture = None is not a name of timm's"),
        ({"model_args": [1, 2]}, "model_args = [1, 2] is not a section"),
        ({"model_args": {"depth": 10**9}}, "model_args.depth = 1e+09 is no size of a model"),
        ({"model_args": {"embed_dim": 10**40}}, "model_args.embed_dim = 1e+40 is no size of a model"),
        ({"model_args": {"embed_dim": 8192, "num_heads": 64}}, "a model of "),
        ({"model_args": {"embed_dim": "wide"}}, "timm cannot load it"),
        ({"model_args": {"embed_dim": 0}}, "timm cannot load it"),
        ({"pretrained_cfg": "card"}, "pretrained_cfg = 'card' is not a section"),
        ({"pretrained_cfg": {"mean": 0.5, "std": [1, 1, 1]}}, "mean = 0.5 is not a number for each"),
        ({"pretrained_cfg": {"mean": [0, 0, 0], "std": None}}, "std = None is not a number for each"),
    ],
)
def test_odd_values_in_timms_config_are_one_line(tmp_path: Path, values: dict[str, Any], text: str) -> None:
    folder, _ = timm_folder(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))
    assert text in refused(folder)
