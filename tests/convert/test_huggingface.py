"""transformers loads what `--to huggingface` writes, unchanged, and computes what our networks compute."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import mimscale
from mimscale.__main__ import main
from mimscale.convert.networks import student_from
from mimscale.convert.read import read
from mimscale.errors import UserError
from mimscale.evals.networks import eval_folder
from mimscale.methods.base import Method
from mimscale.methods.convmae import ConvMAE
from mimscale.methods.finetune import Finetune
from mimscale.methods.mae import MAE
from mimscale.methods.mrmae import MRMAE
from mimscale.models.token_selection import raster_order
from mimscale.training.init_weights import load_into
from mimscale.types import Masks
from tests.convert.runs import IMAGES, INFO, MAE_SECTION, STUDENT, build, refused, save_run
from tests.golden import run_config
from tests.methods.test_convmae import SECTION as CONVMAE
from tests.methods.test_convmae import STUDENT as CONV_STUDENT

AMT = {"masking": {"policy": "amt", "ratio": 0.45, "drop_ratio": 0.3}}
LIMIT = 1e-5


def near(theirs: Tensor, ours: Tensor) -> None:
    assert (theirs - ours).abs().max() <= LIMIT * ours.abs().max() and ours.abs().max() > 0.1


def moved(method: Method) -> Method:
    """As after training: no table or bias is zero, no two norms are equal."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return method.eval()


def saved(folder: Path, name: str, image_size: int = 64, **section: Any) -> tuple[Path, Any]:
    if name == "mrmae":
        teachers = {"t": {"library": "timm", "model": "vit_tiny_patch16_224"}}
        run = run_config({**MAE_SECTION, "name": name, **section}, STUDENT, image_size, teachers=teachers)
        method: Method = MRMAE(run, {"t": INFO})
    else:
        method, run = build(name, image_size, **section)
    return save_run(folder, moved(method), run), method


def converted(folder: Path, out: Path, *words: str) -> dict[str, Any]:
    """conversion.json of the folder."""
    assert main(["convert", str(folder), str(out), "--to", "huggingface", *words]) == 0
    report: dict[str, Any] = json.loads((out / "conversion.json").read_text())
    assert report["compared_with"] == "transformers" and max(report["differences"].values()) <= LIMIT
    return report


def loaded(kind: str, folder: Path, **arguments: Any) -> Any:
    """A network of transformers; what it lacks or leaves would be a difference."""
    network, info = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True, **arguments)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return network.eval()


@pytest.mark.parametrize(
    ("name", "section", "image_size"),
    [
        ("mae", {}, 64),
        ("mae", AMT, 64),
        ("mff", {}, 64),
        ("pixmim", {}, 96),
        ("maskalign", {}, 64),
        ("mrmae", {}, 64),
        ("finetune", {"pool": "mean"}, 96),
        ("finetune", {"pool": "cls"}, 64),
        ("simmim", {}, 96),
        ("simmim", {"positions": "absolute", "layer_scale": None}, 64),
        ("simmim", {"layer_scale": None}, 64),
        ("finetune", {"beit": {"positions": "per_block"}}, 64),
    ],
)
@torch.no_grad()
def test_the_encoder_of_each_method(name: str, section: Mapping[str, Any], image_size: int, tmp_path: Path) -> None:
    """By transformers, by timm, by our reader, and by `load_encoder`."""
    folder, method = saved(tmp_path / "run", name, image_size, **section)
    out = tmp_path / "out"
    converted(folder, out)
    images = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(4))
    ours = method.student(images).tokens
    if not isinstance(method.student.norm, torch.nn.LayerNorm):
        ours = F.layer_norm(ours, (32,), eps=1e-6)
    beit = name == "simmim" or "beit" in section
    arguments = {} if beit else {"add_pooling_layer": False}
    network = loaded("BeitModel" if beit else "ViTModel", out, **arguments)
    near(network(images).last_hidden_state, ours)
    automatic = transformers.AutoModel.from_pretrained(out, **arguments)
    assert type(automatic) is type(network)

    student, info = student_from(out)
    assert (info.config.heads, info.image_size, info.final_norm) == (2, image_size, True)
    near(student.eval()(images).tokens, ours)
    features = mimscale.load_encoder(out)(images)
    near(features.tokens, ours[:, 1:])

    assert main(["convert", str(folder), str(tmp_path / "timm"), "--to", "timm"]) == 0
    model: Any = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    near(model.eval().forward_features(images), ours)


@pytest.mark.parametrize(("norm_pix", "ratio", "unit"), [(True, 0.75, None), (False, 0.6, None), (True, 0.3, 32)])
@torch.no_grad()
def test_mae_with_its_decoder(norm_pix: bool, ratio: float, unit: int | None, tmp_path: Path) -> None:
    """The same noise: the same visible patches, reconstruction and loss. Units of several patches round otherwise."""
    masking = {"policy": "random", "ratio": ratio, "unit": unit}
    folder, method = saved(tmp_path / "run", "mae", norm_pix_loss=norm_pix, masking=masking)
    out = tmp_path / "out"
    assert converted(folder, out, "--with-head")["differences"].keys() == {"reconstruction", "loss", "read back"}
    network = loaded("ViTMAEForPreTraining", out)
    assert network.config.norm_pix_loss is norm_pix and (network.config.mask_ratio == ratio) is (unit is None)
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(5))
    theirs = network(IMAGES, noise=noise)
    order = noise.argsort(dim=1)
    visible = int((theirs.mask[0] == 0).sum())
    masks = Masks(order[:, :visible], order[:, visible:])
    assert isinstance(method, MAE) and visible == (8 if unit else int(16 * (1 - ratio)))
    latent = method.student(IMAGES, masks.visible).tokens
    near(theirs.logits, method.decoder(latent, raster_order(masks)))
    near(theirs.loss, method.pixel_loss(latent, masks, IMAGES))
    again = tmp_path / "again.safetensors"
    recipe = ["--recipe", str(folder / "config.yaml")]
    assert main(["convert", str(out), str(again), "--to", "mimscale", *recipe]) == 0
    assert all(torch.equal(load_file(again)[name], tensor) for name, tensor in method.state_dict().items())


@pytest.mark.parametrize("pool", ["mean", "cls"])
@pytest.mark.parametrize("positions", [None, "per_block", "relative", "absolute"])
@torch.no_grad()
def test_a_classifier(positions: str | None, pool: str, tmp_path: Path) -> None:
    section: dict[str, Any] = {"beit": {"positions": positions}} if positions else {}
    folder, method = saved(tmp_path / "run", "finetune", pool=pool, **section)
    assert isinstance(method, Finetune)
    out = tmp_path / "out"
    report = converted(folder, out, "--with-head")
    network = transformers.AutoModelForImageClassification.from_pretrained(out).eval()
    plain = positions is None and pool == "cls"
    assert type(network).__name__ == ("ViTForImageClassification" if plain else "BeitForImageClassification")
    assert network.config.num_labels == 3
    near(network(IMAGES).logits, method.logits(IMAGES))
    assert ("bias of the keys" in " ".join(report["notes"])) is (positions is None and pool == "mean")
    student, info = student_from(out)
    assert info.final_norm is (pool == "cls")
    near(student.eval()(IMAGES).tokens, method.student(IMAGES).tokens)
    mimscale.load_encoder(out)


def test_the_image_processor_does_what_ours_does(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path / "run", "mae")
    converted(folder, tmp_path / "out")
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
    image = Image.fromarray(pixels).resize((120, 80), Image.Resampling.BICUBIC)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    theirs = processor(images=image, return_tensors="pt")["pixel_values"]
    ours = mimscale.load_encoder(folder).preprocess([image])
    assert theirs.shape == ours.shape == (1, 3, 64, 64)
    assert (theirs - ours).abs().mean() < 2 / 255 / 0.226 and (theirs - ours.roll(3, dims=3)).abs().mean() > 0.05


def test_16_bit_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run in fp16 keeps float32 masters, so float32 is what it gives unless another type is asked for."""
    method, run = build("mae")
    values = run.dump()
    values["engine"]["ds_config"] = "zero2_fp16"
    folder = save_run(tmp_path / "run", moved(method), type(run).model_validate(values))
    converted(folder, tmp_path / "whole")
    assert {t.dtype for t in load_file(tmp_path / "whole" / "model.safetensors").values()} == {torch.float32}
    converted(folder, tmp_path / "half", "--dtype", "bfloat16")
    assert "rounded to bfloat16: outputs differ from those in float32 by" in capsys.readouterr().out
    assert {t.dtype for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}


def test_without_transformers_the_folder_says_what_was_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, method = saved(tmp_path / "run", "simmim")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["convert", str(folder), str(tmp_path / "out"), "--to", "huggingface"]) == 0
    line = "transformers is not installed: read back and compared by our own reader only"
    assert line in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert report["compared_with"] is None and line in report["notes"][0]
    assert report["differences"].keys() == {"read back"}
    assert "Compared with its own reader on random input" in (tmp_path / "out" / "README.md").read_text()
    monkeypatch.undo()
    near(loaded("BeitModel", tmp_path / "out")(IMAGES).last_hidden_state, method.student(IMAGES).tokens)


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    config = run_config(CONVMAE, CONV_STUDENT)
    conv = save_run(tmp_path / "conv", ConvMAE(config, {}), config)
    line = "holds ConvMAE's encoder, which transformers has no class for; choose --to student, or --to official"
    assert line in refused([str(conv), out, "--to", "huggingface"], capsys)
    cases: list[tuple[str, dict[str, Any]]] = [
        ("mff", {}),
        ("pixmim", {}),
        ("simmim", {}),
        ("mae", {"low_pass_radius": 10.0}),
    ]
    for name, section in cases:
        folder, _ = saved(tmp_path / f"{name}-{len(section)}", name, **section)
        line = f"transformers has no class for what method.name = {name}"
        assert line in refused([str(folder), out, "--to", "huggingface", "--with-head"], capsys)
    student = [str(folder), out, "--to", "student"]
    for words in (["--with-head"], ["--dtype", "float16"], ["--push", "org/name"]):
        assert f"{words[0]}: --to student does not have it" in refused([*student, *words], capsys)
    assert not Path(out).exists()


# ------------------------------------------------------------------------------------------- folders of others


def of_others(folder: Path, **changes: Any) -> Any:
    """A network of transformers with random weights, as it saves itself."""
    torch.manual_seed(6)
    sizes: dict[str, Any] = {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 96,
    }
    config = transformers.ViTConfig(**sizes, image_size=64, layer_norm_eps=1e-6, **changes)
    network = transformers.ViTModel(config, add_pooling_layer=False).eval()
    network.save_pretrained(folder)
    return network


@torch.no_grad()
def test_heads_are_read_from_config_json(tmp_path: Path) -> None:
    network = of_others(tmp_path / "theirs")
    student, info = student_from(tmp_path / "theirs")
    assert (info.config.heads, info.image_size) == (3, 64)
    near(student.eval()(IMAGES).tokens, network(IMAGES).last_hidden_state)
    assert main(["convert", str(tmp_path / "theirs"), str(tmp_path / "out"), "--to", "timm"]) == 0
    near(student_from(tmp_path / "out")[0].eval()(IMAGES).tokens, network(IMAGES).last_hidden_state)
    assert eval_folder(tmp_path / "theirs") == tmp_path / "eval"


def test_what_no_student_computes_is_refused(tmp_path: Path) -> None:
    of_others(tmp_path / "theirs", hidden_act="relu")
    with pytest.raises(UserError, match="hidden_act = relu; students compute gelu only"):
        student_from(tmp_path / "theirs")
    (tmp_path / "theirs" / "config.json").write_text("[1")
    with pytest.raises(UserError, match=r"config.json is no configuration of a model \(JSONDecodeError\)"):
        student_from(tmp_path / "theirs")
    (tmp_path / "parts").mkdir()
    for name in ("config.json", "model.safetensors.index.json"):
        (tmp_path / "parts" / name).write_text("{}")
    with pytest.raises(UserError, match="holds its weights in several files; save the model in one model.safetensors"):
        read(tmp_path / "parts")


@pytest.mark.parametrize(
    ("kind", "changes", "what"),
    [
        ("Dinov2", {"use_swiglu_ffn": True}, "layer scale (DINOv2)"),
        ("DINOv3ViT", {}, "layer scale (DINOv2) and register tokens"),
        ("DeiT", {}, "a distillation token (DeiT)"),
    ],
)
def test_networks_of_another_kind_are_named(kind: str, changes: dict[str, Any], what: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
    config = getattr(transformers, f"{kind}Config")(**sizes, image_size=64, **changes)
    state = getattr(transformers, f"{kind}Model")(config).state_dict()
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match=re.escape(f"holds a ViT with {what}, which students do not have")):
        student_from(tmp_path / "w.pth", heads=3)
    run = run_config(MAE_SECTION, STUDENT, 64, init={"weights": str(tmp_path / "w.pth")})
    with pytest.raises(UserError, match=re.escape(f"holds a ViT with {what}, which students do not have; take other")):
        load_into(MAE(run, {}), run)
