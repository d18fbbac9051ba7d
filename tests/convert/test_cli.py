"""Checkpoints in and out, through the command line that a user types."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mimscale.__main__ import main
from mimscale.checkpoint import format as checkpoint
from mimscale.checkpoint import run_folder
from mimscale.config.recipes import validate
from mimscale.convert import check
from mimscale.convert.difference import LIMIT
from mimscale.convert.formats import mae, timm
from mimscale.convert.names import same
from mimscale.convert.networks import student_from
from mimscale.convert.read import METADATA, read
from mimscale.methods.base import Method
from mimscale.methods.mae import MAE
from mimscale.models import pos_embed
from tests import golden
from tests.convert.runs import IMAGES, build, refused, save_run, saved_run
from tests.golden import batch_of, close
from tests.monitoring.test_run_logger import no_file_may_exceed


@pytest.fixture(params=["mae", "maskalign", "finetune", "mff", "pixmim"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Method]:
    return saved_run(tmp_path / "run", request.param)


def tokens_of(method: Method) -> torch.Tensor:
    """After the last norm, an untrained one where the method has none."""
    student: Any = method.student
    tokens: torch.Tensor = student(IMAGES).tokens
    return tokens if isinstance(method, MAE) else torch.nn.functional.layer_norm(tokens, (32,), eps=1e-6)


def test_run_to_timm(saved: tuple[Path, Method], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, method = saved
    out = tmp_path / "student"
    assert main(["convert", str(folder), "--to", "timm", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "checked on random input: encoder differs by" in printed and f"wrote {out}" in printed
    assert ("filled in: a last norm" in printed) is not isinstance(method, MAE)

    student, info = student_from(out)  # what convert wrote, it reads
    assert (info.config.heads, info.image_size, info.final_norm) == (2, 64, True)
    close(student(IMAGES).tokens, tokens_of(method))


def test_run_to_official_and_back(saved: tuple[Path, Method], tmp_path: Path) -> None:
    folder, method = saved
    official, ours = tmp_path / "official.pth", tmp_path / "ours.safetensors"
    assert main(["convert", str(folder), str(official), "--to", "official"]) == 0
    recipe = str(folder / "config.yaml")
    assert main(["convert", str(official), str(ours), "--to", "mimscale", "--recipe", recipe]) == 0
    assert same(load_file(ours), method.state_dict())
    assert read(ours).run.method == read(folder).run.method  # type: ignore[union-attr]


def test_run_to_plain_files(saved: tuple[Path, Method], tmp_path: Path) -> None:
    """With decoder and heads, which needs no recipe; and the student alone, as it is."""
    folder, method = saved
    whole, alone = tmp_path / "whole.safetensors", tmp_path / "alone.safetensors"
    assert main(["convert", str(folder), str(whole), "--to", "mimscale"]) == 0
    assert same(load_file(whole), method.state_dict())
    assert main(["convert", str(whole), str(alone), "--to", "student"]) == 0
    assert same(load_file(alone), method.student.state_dict())
    student, _ = student_from(alone)
    assert torch.equal(student(IMAGES).tokens, method.student(IMAGES).tokens)


def test_the_measurement_lies_beside_the_weights(tmp_path: Path) -> None:
    folder, _ = saved_run(tmp_path / "run", "mae")
    out = tmp_path / "official.safetensors"
    assert main(["convert", str(folder), str(out), "--to", "official"]) == 0
    report = json.loads((tmp_path / "official.safetensors.json").read_text())
    assert report["to"] == "mae" and report["sha256"] == checkpoint.sha256(out)
    assert report["source_sha256"] == checkpoint.sha256(folder / "checkpoints" / "step-00000007" / "manifest.json")
    assert report["differences"].keys() == {"encoder", "decoder"}
    assert out.stat().st_mode == (tmp_path / "official.safetensors.json").stat().st_mode
    assert all(0 <= value < report["limit"] for value in report["differences"].values())


@pytest.mark.parametrize(
    ("to", "name"),
    [
        ("mimscale", "out.safetensors"),
        ("official", "out.pth"),
        *((to, "out") for to in ("state", "run", "timm", "huggingface")),
    ],
)
def test_a_full_disk_is_one_line_and_leaves_nothing(
    to: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, _ = saved_run(tmp_path / "run", "mae")
    if to == "run":
        assert main(["convert", str(source), str(tmp_path / "state"), "--to", "state"]) == 0
        source = tmp_path / "state"
    before = sorted(tmp_path.iterdir())
    with no_file_may_exceed(20_000):
        message = refused([str(source), str(tmp_path / name), "--to", to], capsys)
    assert " cannot be used: " in message and "File too large" in message
    assert sorted(tmp_path.iterdir()) == before


def test_the_same_weights_give_the_same_pth_file(tmp_path: Path) -> None:
    folder, _ = saved_run(tmp_path / "run", "mae")
    for name in ("one.pth", "another.pth"):
        assert main(["convert", str(folder), str(tmp_path / name), "--to", "official"]) == 0
    assert (tmp_path / "one.pth").read_bytes() == (tmp_path / "another.pth").read_bytes()


@pytest.mark.parametrize("to", ["timm", "huggingface", "student", "mimscale", "official"])
def test_a_difference_is_an_error_and_leaves_nothing(
    to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    method, run = build("mae")
    with torch.no_grad():
        method.student.get_parameter("blocks.1.mlp.fc1.bias")[0] = torch.nan
    folder = save_run(tmp_path / "run", method, run)
    out = tmp_path / "out" / "student.safetensors"
    assert "is not written: its encoder gives other numbers" in refused([str(folder), str(out), "--to", to], capsys)
    assert not list(out.parent.iterdir())


def test_the_checks_see_a_wrong_tensor() -> None:
    method, _ = build("mae")
    assert isinstance(method, MAE)
    state = timm.with_last_norm(method.student.state_dict())
    assert check.encoder_difference(method.student, state) < LIMIT
    state["blocks.1.mlp.fc1.bias"] = state["blocks.1.mlp.fc1.bias"] + 0.05
    assert check.encoder_difference(method.student, state) > LIMIT
    weights = dict(method.state_dict())
    assert check.method_differences(method, weights)["decoder"] < LIMIT
    half = weights["decoder.pos_embed"].shape[-1] // 2
    weights["decoder.pos_embed"] = weights["decoder.pos_embed"].roll(half, dims=-1)
    assert check.method_differences(method, weights)["decoder"] > LIMIT


def test_names_of_another_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """MAE in OpenMMLab's names and PixMIM in MAE's: the weights are of the same parts."""
    for name, other in (("mae", "openmmlab"), ("pixmim", "mae")):
        folder, method = saved_run(tmp_path / name, name)
        official, ours = tmp_path / f"{name}.pth", tmp_path / f"{name}.safetensors"
        assert main(["convert", str(folder), str(official), "--to", other]) == 0
        recipe = str(folder / "config.yaml")
        assert main(["convert", str(official), str(ours), "--to", "mimscale", "--recipe", recipe]) == 0
        assert same(load_file(ours), method.state_dict())
    folder, _ = saved_run(tmp_path / "mff", "mff")
    assert "has parts that mae has no names for" in refused([str(folder), str(tmp_path / "x"), "--to", "mae"], capsys)


def test_official_maskalign_file_with_its_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    g = golden.load("maskalign_default_dev")
    run = golden.maskalign_run(g.config)
    run_folder.create(tmp_path / "recipe", run)
    torch.save({"model": g.part("state"), "args": argparse.Namespace(lr=1.0), "epoch": 3}, tmp_path / "official.pth")
    out = tmp_path / "ours.safetensors"
    recipe = str(tmp_path / "recipe" / "config.yaml")
    assert main(["convert", str(tmp_path / "official.pth"), str(out), "--to", "mimscale", "--recipe", recipe]) == 0
    assert "left out: the teacher inside the checkpoint" in capsys.readouterr().out
    expected = golden.maskalign_method(run, g.config, g.part("state"))
    assert same(load_file(out), expected.state_dict())
    batch = batch_of(g["input/images"], mask=g["mask/exponential_noise"])
    student, info = student_from(out)
    assert info.method == "maskalign" and not info.final_norm
    close(student(batch.images, g["mask/ids_keep"], levels=[3]).levels[3], g["student/hidden_states"][3])
    direct, _ = student_from(tmp_path / "official.pth", heads=4)
    assert torch.equal(direct(IMAGES).tokens, student(IMAGES).tokens)


@pytest.mark.parametrize("order", [("dino", "clip"), ("clip", "dino")])
def test_official_maskalign_file_under_a_recipe_with_another_teacher_for_the_masks(
    order: tuple[str, str], tmp_path: Path
) -> None:
    g = golden.load("maskalign_default_dev")
    alone = golden.maskalign_run(g.config)
    values = alone.dump()
    values["method"] |= {"targets": {"dino": {"weight": 0}}}
    values["method"]["masking"]["teacher"] = "dino"
    values["teachers"] = {name: {"library": "timm", "model": "vit_tiny_patch16_224", "random": True} for name in order}
    run_folder.create(tmp_path / "recipe", validate(values, source="test"))
    torch.save({"model": g.part("state")}, tmp_path / "official.pth")
    words = ["--to", "mimscale", "--recipe", str(tmp_path / "recipe" / "config.yaml")]
    assert main(["convert", str(tmp_path / "official.pth"), str(tmp_path / "ours.safetensors"), *words]) == 0
    expected = golden.maskalign_method(alone, g.config, g.part("state")).state_dict()
    named = {name.replace("alignment.teacher.", "alignment.clip."): tensor for name, tensor in expected.items()}
    assert same(load_file(tmp_path / "ours.safetensors"), named)


def test_an_encoder_alone_gets_our_names(tmp_path: Path) -> None:
    """As timm publishes MAE's weights: no decoder, so no recipe is needed."""
    method, _ = build("mae")
    save_file(method.student.state_dict(), tmp_path / "timm.safetensors")
    out = tmp_path / "ours.safetensors"
    words = ["convert", str(tmp_path / "timm.safetensors"), str(out), "--to", "mimscale", "--heads", "2"]
    assert main(words) == 0
    assert same(load_file(out), {f"student.{n}": t for n, t in method.student.state_dict().items()})
    student, info = student_from(out)
    assert info.config.heads == 2 and torch.equal(student(IMAGES).tokens, method.student(IMAGES).tokens)


def test_student_of_an_openmmlab_file(tmp_path: Path) -> None:
    """Its position table is not MAE's (the halves are swapped), so the latent is right only if the table came along."""
    g = golden.load("pixmim_dev")
    torch.save({"state_dict": g.part("state"), "meta": {"epoch": 1}}, tmp_path / "official.pth")
    student, info = student_from(tmp_path / "official.pth", heads=4)
    assert (info.config.width, info.config.depth, info.image_size) == (64, 3, 64)
    ids_keep = g["noise"].argsort(dim=1)[:, :4]
    close(student(g["image"], ids_keep).tokens, g["latent"])
    ours = pos_embed.sincos_2d(64, (4, 4))
    swapped = torch.cat([ours[..., 32:], ours[..., :32]], dim=-1)
    close(student.state_dict()["pos_embed"], swapped)
    assert not torch.allclose(ours, swapped)


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_student_of_an_official_file(tmp_path: Path, wrapper: str | None, suffix: str) -> None:
    g = golden.load("mae_dev")
    path, state = tmp_path / f"official{suffix}", g.part("state")
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({wrapper: state, "epoch": 1} if wrapper else state, path)
    student, info = student_from(path, heads=4)
    assert (info.config.width, info.config.depth, info.config.patch, info.image_size) == (64, 4, 16, 64)
    close(student(g["image"], g["ids_keep"]).tokens, g["latent"])


def test_student_of_a_run_folder_and_of_a_checkpoint(saved: tuple[Path, Method]) -> None:
    folder, method = saved
    expected = method.student(IMAGES).tokens
    for path in (folder, folder / "checkpoints" / "step-00000007"):
        student, info = student_from(path)
        assert torch.equal(student(IMAGES).tokens, expected)
        assert info.method is not None and info.image_size == 64
    larger, info = student_from(folder, image_size=96)
    assert info.image_size == 96 and larger(torch.zeros(1, 3, 96, 96)).tokens.shape == (1, 37, 32)


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, method = saved_run(tmp_path / "run", "mae")
    out = str(tmp_path / "out.safetensors")
    official = tmp_path / "mae.pth"
    state = mae.to_official(method.state_dict()).weights
    torch.save({"model": state}, official)
    encoder = tmp_path / "encoder.pth"
    torch.save({"model": {n: t for n, t in state.items() if not n.startswith(("decoder", "mask"))}}, encoder)
    strange = tmp_path / "strange.pth"
    torch.save({"model": {"layer.weight": torch.zeros(2)}}, strange)
    recipe = ["--recipe", str(folder / "config.yaml")]

    cases: list[tuple[list[str], str]] = [
        (["nothing", out, "--to", "timm"], "neither a run folder"),
        ([str(folder), str(official), "--to", "timm"], "exists; choose another name"),
        ([str(folder), out, "--to", "timm", "--with-head"], "holds no classifier"),
        ([str(official), out, "--to", "timm"], "give the heads"),
        (
            [str(official), out, "--to", "timm", "--heads", "7"],
            "width 32 is not divisible by heads = 7; give the heads",
        ),
        (
            [str(official), out, "--to", "mimscale", "--recipe", "simmim_vit_b16"],
            "method.name = simmim does not have; take a",
        ),
        ([str(official), out, "--to", "mimscale", "--recipe", "maskalign_vit_b16"], "take a recipe of mae"),
        ([str(official), out, "--to", "official"], "not a checkpoint of ours"),
        ([str(official), out, "--to", "mimscale", "--heads", "2"], "--recipe is missing"),
        ([str(encoder), out, "--to", "mimscale", *recipe], "not a whole mae model"),
        ([str(official), out, "--to", "mimscale", *recipe, "--set", "student.depth=4"], "does not fit"),
        ([str(strange), out, "--to", "mimscale", *recipe], "has none of the known name formats"),
        ([str(strange), out, "--to", "timm"], "no ViT with a class token"),
        ([str(folder), out, "--to", "mimscale", *recipe], "leave out --recipe"),
        ([str(official), out, "--to", "state"], "holds weights only"),
        ([str(folder), out, "--to", "run"], "state.json is missing"),
    ]
    for arguments, fragment in cases:
        assert fragment in refused(arguments, capsys)
        assert not Path(out).exists()
    (tmp_path / "empty").mkdir()
    run_folder.create(tmp_path / "empty", build("mae")[1])
    assert "no complete checkpoint" in refused([str(tmp_path / "empty"), out, "--to", "timm"], capsys)


def test_exported_file_says_what_it_holds(tmp_path: Path) -> None:
    out = tmp_path / "student"
    assert main(["convert", str(saved_run(tmp_path / "run", "mae")[0]), str(out), "--to", "timm"]) == 0
    with safe_open(out / "model.safetensors", framework="pt") as file:
        carried = json.loads(file.metadata()[METADATA])
    assert carried["student"]["heads"] == 2 and carried["image_size"] == 64


def test_what_the_release_cannot_name_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Adaptors before the mixing; a fusion, which MAE has not, gets MFF's names."""
    folder, _ = saved_run(tmp_path / "before", "maskalign", adaptor_position="before", levels="mean")
    out = str(tmp_path / "out.pth")
    assert "has no official names" in refused([str(folder), out, "--to", "official"], capsys)
    folder, _ = saved_run(tmp_path / "fused", "mae", fusion={"kind": "mff", "levels": [0, 2]})
    assert main(["convert", str(folder), out, "--to", "official"]) == 0
    assert "backbone.proj_weights" in torch.load(out, weights_only=True)["model"]
