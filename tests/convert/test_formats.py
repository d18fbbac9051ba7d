"""The official programs' own states: recognised by their names, mapped there and back, with the official numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import Tensor
from torchvision.models import VisionTransformer

from mimscale.__main__ import main
from mimscale.checkpoint import run_folder
from mimscale.config.run import RunConfig
from mimscale.convert.formats import maskalign, openmmlab, timm
from mimscale.convert.formats.base import encoder_of, format_of, formats
from mimscale.convert.names import same
from mimscale.convert.networks import classifier_of, is_whole_model, student_from
from mimscale.convert.read import read
from mimscale.errors import UserError
from tests import golden
from tests.convert.runs import METHODS, build
from tests.golden import close, mae_run, run_config

STATES = {
    "mae_dev": "mae",
    "amt_mae_dev": "mae",
    "amt_update_mask_dev": "timm",  # without a decoder
    "maskmr_mae_dev": "mae",
    "simmim_dev": "simmim",
    "simmim_ape": "simmim",
    "amt_simmim_dev": "simmim",
    "amt_simmim_layerscale": "simmim",
    "maskalign_default_dev": "maskalign",
    "maskalign_clip14_dev": "maskalign",
    "maskalign_dino_attn_dev": "maskalign",
    "maskalign_simple_random_dev": "maskalign",
    "maskalign_sum_mlp_dev": "maskalign",
    "convmae_dev": "convmae",
    "convvit_finetune_dev": "finetune",
    "mff_dev": "openmmlab",
    "pixmim_dev": "openmmlab",
}


@pytest.mark.parametrize("file", STATES)
def test_every_official_state_has_one_format(file: str) -> None:
    state = golden.load(file).part("state")
    assert [name for name, names in formats().items() if names.recognises(state)] == [STATES[file]]
    assert format_of(state) == STATES[file]
    encoder = encoder_of(state)
    assert encoder and not [name for name in encoder if name.startswith(("student.", "encoder.", "backbone."))]


@pytest.mark.parametrize("file", [f for f, name in STATES.items() if name in ("mae", "simmim", "convmae", "finetune")])
def test_names_there_and_back(file: str) -> None:
    """Every name and every value, SimMIM's index of its bias table included."""
    state, names = golden.load(file).part("state"), formats()[STATES[file]]
    again = names.to_official(names.from_official(state).weights, run_config(*METHODS["mae"][1:], {"size": "tiny"}))
    assert again.weights.keys() == state.keys()
    assert all(again.weights[n].dtype == t.dtype and torch.equal(again.weights[n], t) for n, t in state.items())


@pytest.mark.parametrize("file", ["mff_dev", "pixmim_dev"])
def test_openmmlab_there_and_back(file: str) -> None:
    state = golden.load(file).part("state")
    again = openmmlab.to_official(openmmlab.from_official(state).weights).weights
    assert same(again, {n: t for n, t in state.items() if not n.startswith("target_generator.")})


def test_maskalign_there_and_back() -> None:
    """For the parts that we do not build the values that they keep there."""
    g = golden.load("maskalign_default_dev")
    state = g.part("state")
    weights = maskalign.from_official(state, {"clip": (1, 2, 3)}).weights
    again = maskalign.to_official(weights, golden.maskalign_run(g.config)).weights
    missing = {n for n in state.keys() - again.keys() if not n.startswith("clip_model.")}
    assert missing == {"distill_heads.0.weight", "distill_heads.0.bias"}
    assert torch.equal(again["distill_weights"][1:], state["distill_weights"][1:])
    assert torch.equal(again["distill_weights"][0], torch.eye(4)[0] + 0.01)
    dead = {"norm.weight", "norm.bias", "distill_weights"}
    assert all(torch.equal(again[n], state[n]) for n in again.keys() - dead)


def test_several_teachers_have_no_official_names() -> None:
    state = golden.load("maskalign_default_dev").part("state")
    with pytest.raises(UserError, match="a MaskAlign file has one teacher, and method.targets"):
        maskalign.from_official(state, {"clip": (1,), "dino": (1,)})
    weights = maskalign.from_official(state, {"clip": (1, 2, 3)}).weights
    both = weights | {n.replace("alignment.clip.", "alignment.dino."): t for n, t in weights.items()}
    with pytest.raises(UserError, match="clip and dino have no official names, .* use --to timm"):
        maskalign.to_official(both, golden.maskalign_run({**golden.load("maskalign_default_dev").config}))


@pytest.mark.parametrize("levels", ["mid1", [0, 1]])
def test_a_mixing_of_unknown_height_has_no_official_name(levels: str | list[int]) -> None:
    """The teacher of the golden is deeper than its level 1."""
    g = golden.load("maskalign_sum_mlp_dev")
    weights = maskalign.from_official(g.part("state"), {"clip": (0, 1)}).weights
    with pytest.raises(UserError, match="with fusion = sum: .* use --to timm"):
        maskalign.to_official(weights, golden.maskalign_run({**g.config, "loss_weights": levels}))


def official_file(path: Path, file: str) -> tuple[golden.Golden, dict[str, Tensor]]:
    g = golden.load(file)
    torch.save({"model": g.part("state")}, path)
    return g, g.part("state")


def recipe(folder: Path, run: RunConfig) -> list[str]:
    run_folder.create(folder, run)
    return ["--recipe", str(folder / "config.yaml")]


@pytest.mark.parametrize("file", ["mae_dev", "amt_mae_dev", "pixmim_dev"])
def test_whole_official_files_become_ours_and_official_again(file: str, tmp_path: Path) -> None:
    """OpenMMLab's PixMIM into a MAE recipe, too: their MAE has the same names and the same swapped positions."""
    g, state = official_file(tmp_path / "official.pth", file)
    words = recipe(tmp_path / "recipe", mae_run(g.config))
    ours, back = tmp_path / "ours.safetensors", tmp_path / "back.safetensors"
    assert main(["convert", str(tmp_path / "official.pth"), str(ours), "--to", "mimscale", *words]) == 0
    found = json.loads((tmp_path / "ours.safetensors.json").read_text())["differences"]
    assert found.keys() == {"encoder", "decoder"} and max(found.values()) < 1e-5
    assert main(["convert", str(ours), str(back), "--to", STATES[file]]) == 0
    assert same(load_file(back), {n: t for n, t in state.items() if not n.startswith("target_generator.")})


def test_amt_on_simmim_becomes_a_beit(tmp_path: Path) -> None:
    g, _ = official_file(tmp_path / "official.pth", "amt_simmim_dev")
    student, info = student_from(tmp_path / "official.pth", heads=g.config["heads"])
    assert info.image_size == g.config["img"] and student.state_dict().keys() >= {"pos_embed", "blocks.0.attn.q_bias"}
    run = run_config(
        {"name": "simmim", "positions": "absolute", "layer_scale": None},
        {"width": g.config["embed"], "depth": g.config["depth"], "heads": g.config["heads"]},
        g.config["img"],
    )
    words = recipe(tmp_path / "recipe", run)
    out = tmp_path / "ours.safetensors"
    assert main(["convert", str(tmp_path / "official.pth"), str(out), "--to", "mimscale", *words]) == 0
    found = json.loads((tmp_path / "ours.safetensors.json").read_text())["differences"]
    assert found.keys() == {"encoder", "head"} and max(found.values()) < 1e-5


def test_convmae_has_no_timm_class_and_is_compared_with_a_second_network(tmp_path: Path) -> None:
    g, state = official_file(tmp_path / "official.pth", "convmae_dev")
    out = tmp_path / "student.safetensors"
    words = ["convert", str(tmp_path / "official.pth"), str(out), "--to", "student", "--heads", str(g.config["heads"])]
    assert main(words) == 0
    found = json.loads((tmp_path / "student.safetensors.json").read_text())["differences"]
    assert 0 <= found["encoder"] < 1e-5
    assert same(load_file(out), encoder_of(state))
    student, _ = student_from(out)
    close(student(g["input/images"], g["mask/ids_keep"]).tokens, g["latent"])


@pytest.mark.parametrize("file", ["mae_dev", "simmim_dev"])
def test_an_encoder_alone_has_timms_names(file: str) -> None:
    """As timm publishes MAE's and BEiT's; there is no decoder that would show the method."""
    alone = encoder_of(golden.load(file).part("state"))
    assert [name for name, names in formats().items() if names.recognises(alone)] == ["timm"]
    assert not is_whole_model(alone) and same(encoder_of(alone), alone)
    ours = timm.from_official(alone).weights
    assert timm.fits(ours) and encoder_of(timm.to_official(ours).weights).items() >= alone.items()
    network: Any = TimmViT(embed_dim=32, depth=2, num_heads=2, num_classes=0)
    assert format_of(network.state_dict()) == "timm" and same(encoder_of(network.state_dict()), network.state_dict())


def test_our_names_are_no_official_ones() -> None:
    for name in METHODS:
        weights = build(name)[0].state_dict()
        assert format_of(weights) is None
        assert any(names.fits(weights) for names in formats().values())


# ------------------------------------------------------------------------------------------------ Hugging Face's names


NAMES_OF_A_VITMAE = {  # as `ViTMAEForPreTraining(...).save_pretrained` of transformers 5.24 writes them
    "vit.embeddings.cls_token",
    "vit.embeddings.position_embeddings",
    "vit.embeddings.patch_embeddings.projection.weight",
    "vit.encoder.layer.2.attention.attention.query.bias",
    "vit.encoder.layer.0.attention.output.dense.weight",
    "vit.encoder.layer.0.layernorm_before.weight",
    "vit.encoder.layer.0.layernorm_after.bias",
    "vit.encoder.layer.0.intermediate.dense.weight",
    "vit.encoder.layer.0.output.dense.bias",
    "vit.layernorm.weight",
    "decoder.mask_token",
    "decoder.decoder_pos_embed",
    "decoder.decoder_embed.weight",
    "decoder.decoder_norm.bias",
    "decoder.decoder_pred.weight",
    "decoder.decoder_layers.0.attention.attention.value.weight",
    "decoder.decoder_layers.0.layernorm_after.weight",
    "decoder.decoder_layers.0.output.dense.weight",
}


def of_its_modules(name: str) -> str:
    """The name in the state dict of transformers 5's module, where it differs from the file's."""
    for file, module in (
        ("vit.encoder.layer.", "vit.layers."),
        (".attention.attention.query.", ".attention.q_proj."),
        (".attention.attention.key.", ".attention.k_proj."),
        (".attention.attention.value.", ".attention.v_proj."),
        (".attention.output.dense.", ".attention.o_proj."),
        (".intermediate.dense.", ".mlp.fc1."),
        (".output.dense.", ".mlp.fc2."),
    ):
        name = name.replace(file, module)
    return name


def test_a_whole_mae_goes_to_transformers_and_back() -> None:
    method, run = build("mae")
    names = formats()["transformers"]
    state = names.to_official(method.state_dict(), run).weights
    assert state.keys() >= NAMES_OF_A_VITMAE
    for file in (state, {of_its_modules(name): tensor for name, tensor in state.items()}):
        assert [name for name, found in formats().items() if found.recognises(file)] == ["transformers"]
        assert same(names.from_official(file).weights, method.state_dict())
        encoder = {n: t for n, t in method.student.state_dict().items() if n != "mask_token"}
        assert same(encoder_of(file), encoder)


def test_a_vitmae_file_starts_a_run_and_is_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    method, run = build("mae")
    state = formats()["transformers"].to_official(method.state_dict(), run).weights
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "hf.safetensors")
    student = [str(tmp_path / "hf.safetensors"), str(tmp_path / "s.safetensors"), "--to", "student", "--heads", "2"]
    assert main(["convert", *student]) == 0
    assert same(load_file(tmp_path / "s.safetensors"), method.student.state_dict())
    vit, _ = student_from(tmp_path / "hf.safetensors", heads=2)
    assert same(vit.state_dict(), method.student.state_dict())


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"reg_tokens": 4}, "register tokens"),
        ({"reg_tokens": 2, "no_embed_class": True}, "register tokens"),
        ({"no_embed_class": True}, "no position of its class token"),
        ({"class_token": False, "global_pool": "avg"}, "no class token"),
        ({"pre_norm": True}, "a norm before its blocks"),
        ({"init_values": 1e-5}, "layer scale"),
        ({"qk_norm": True}, "norms of its queries and keys"),
        ({"qkv_bias": False}, "no biases of its queries, keys and values"),
    ],
)
def test_a_vit_of_another_kind_is_named(
    options: dict[str, Any], what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"img_size": 48, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4, "num_classes": 0}
    save_file(TimmViT(**{**sizes, **options}).state_dict(), tmp_path / "w.safetensors")
    words = [str(tmp_path / "w.safetensors"), str(tmp_path / "out.safetensors"), "--to", "student", "--heads", "4"]
    assert main(["convert", *words]) == 2
    line = capsys.readouterr().err
    assert f"holds a ViT with {what}" in line and line.endswith("which students do not have\n")
    with pytest.raises(UserError, match=what):
        student_from(tmp_path / "w.safetensors", heads=4)


@pytest.mark.parametrize("wrap", ["{}", "module.{}", "backbone.{}"])
def test_torchvisions_vit(wrap: str, tmp_path: Path) -> None:
    torch.manual_seed(4)
    sizes = {"image_size": 48, "patch_size": 8, "num_layers": 2, "num_heads": 4, "hidden_dim": 64, "mlp_dim": 128}
    network = VisionTransformer(**sizes, num_classes=5).eval()
    torch.nn.init.normal_(network.heads.head.weight)
    state = {wrap.format(name): tensor for name, tensor in network.state_dict().items()}
    torch.save(state, tmp_path / "w.pth")
    old = {n.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2."): t for n, t in state.items()}
    torch.save(old, tmp_path / "old.pth")
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        for name in ("w.pth", "old.pth"):
            vit, info = student_from(tmp_path / name, heads=4)
            assert (info.config.width, info.config.depth, info.image_size) == (64, 2, 48)
            head = classifier_of(read(tmp_path / name))
            theirs = network(images)
            close(F.linear(vit.eval()(images).tokens[:, 0], head["head.weight"], head["head.bias"]), theirs)
