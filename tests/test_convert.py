"""Checkpoints in and out, through the command line that a user types."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mimscale import convert, run_folder
from mimscale.__main__ import main
from mimscale.config import RunConfig
from mimscale.contracts import TeacherInfo
from mimscale.errors import UserError
from mimscale.methods.base import Method
from mimscale.methods.finetune import Finetune
from mimscale.methods.mae import MAE
from mimscale.methods.maskalign import MaskAlign
from mimscale.methods.mff import MFF
from mimscale.methods.pixmim import PixMIM
from mimscale.models import posembed
from mimscale.resilience import checkpoint
from tests import golden
from tests.golden import batch_of, close, run_config

STUDENT = {"width": 32, "depth": 3, "heads": 2}
MAE_SECTION = {"name": "mae", "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
RELATIVES: dict[str, tuple[type[Method], dict[str, Any]]] = {
    "mff": (MFF, {"fusion": {"levels": [0, 1, 2]}}),
    "pixmim": (PixMIM, {"low_pass_radius": 10}),
}
INFO = TeacherInfo("t", dim=24, depth=3, grid=(4, 4), image_size=64, has_cls=True)


def build(name: str) -> tuple[Method, RunConfig]:
    torch.manual_seed(1)
    if name == "mae":
        run = run_config(MAE_SECTION, STUDENT)
        return MAE(run, {}), run
    if name in RELATIVES:
        run = run_config({**MAE_SECTION, "name": name, **RELATIVES[name][1]}, STUDENT)
        return RELATIVES[name][0](run, {}), run
    if name == "finetune":
        run = run_config({"name": "finetune", "classes": 3, "head_std": 0.1}, STUDENT)
        return Finetune(run, {}), run
    run = run_config({"name": "maskalign", "levels": "top2", "adaptor": "mlp"}, STUDENT)
    return MaskAlign(run, {"t": INFO}), run


def save_run(folder: Path, method: Method, run: RunConfig) -> Path:
    """A run folder with one checkpoint, as the trainer leaves it."""
    run_folder.create(folder, run)
    parameters = dict(method.named_parameters())
    state = method.state_dict()
    kind = {name: "fp32" if name in parameters else "buffer" for name in state}
    part = folder / "checkpoints" / ".new"
    shard = checkpoint.write_shard(part, {f"{kind[n]}|{n}|0": t.detach().flatten() for n, t in state.items()}, 0, 1)
    final = checkpoint.step_folder(folder / "checkpoints", 7)
    checkpoint.commit(part, final, [shard], {"step": 7, "shapes": {n: list(t.shape) for n, t in state.items()}})
    return folder


@pytest.fixture(params=["mae", "maskalign", "finetune", "mff", "pixmim"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Method]:
    method, run = build(request.param)
    return save_run(tmp_path / "run", method, run), method


def timm_model(path: Path) -> VisionTransformer:
    reference = VisionTransformer(img_size=64, embed_dim=32, depth=3, num_heads=2, num_classes=0)
    reference.load_state_dict(load_file(path))
    return reference


IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))


def test_run_to_timm(saved: tuple[Path, Method], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, method = saved
    out = tmp_path / "student.safetensors"
    assert main(["convert", str(folder), "--to", "timm", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "checked: 17 tokens of a fixed picture equal timm's within" in printed and f"wrote {out}" in printed
    tokens = method.student(IMAGES).tokens
    if not isinstance(method, MAE):
        assert "filled in: a last norm" in printed
        tokens = torch.nn.functional.layer_norm(tokens, (32,), eps=1e-6)
    close(timm_model(out).forward_features(IMAGES), tokens)

    student, info = convert.student_from(out)  # what convert wrote, it reads
    assert (info.config.heads, info.image_size, info.final_norm) == (2, 64, True)
    close(student(IMAGES).tokens, tokens)


def test_run_to_official_and_back(saved: tuple[Path, Method], tmp_path: Path) -> None:
    folder, method = saved
    official, ours = tmp_path / "official.pth", tmp_path / "ours.safetensors"
    assert main(["convert", str(folder), str(official), "--to", "official"]) == 0
    recipe = str(folder / "config.yaml")
    assert main(["convert", str(official), str(ours), "--to", "mimscale", "--recipe", recipe]) == 0
    back, original = load_file(ours), method.state_dict()
    assert back.keys() == original.keys() and all(torch.equal(back[n], t) for n, t in original.items())
    loaded = convert.read(ours)
    assert loaded.run is not None and loaded.run.method == convert.read(folder).run.method  # type: ignore[union-attr]


def test_official_names(tmp_path: Path) -> None:
    """Exactly the names, and for the parts that we do not build the values, of the official programs' states."""
    for name in ("mae_dev", "maskalign_default_dev"):
        g = golden.load(name)
        state = g.part("state")
        if name == "mae_dev":
            weights = convert.mae_from_official(state).weights
            again = convert.mae_to_official(weights).weights
            assert again.keys() == state.keys()
        else:
            weights = convert.maskalign_from_official(state, (1, 2, 3)).weights
            again = convert.maskalign_to_official(weights, fusion="linear", teacher_depth=4).weights
            missing = {n for n in state.keys() - again.keys() if not n.startswith("clip_model.")}
            assert missing == {"distill_heads.0.weight", "distill_heads.0.bias"}
            assert torch.equal(again["distill_weights"][1:], state["distill_weights"][1:])
            assert torch.equal(again["distill_weights"][0], torch.eye(4)[0] + 0.01)
        dead = {"norm.weight", "norm.bias", "distill_weights"} if name != "mae_dev" else set()
        assert all(torch.equal(again[n], state[n]) for n in again.keys() - dead)


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
    back = load_file(out)
    assert all(torch.equal(back[n], t) for n, t in expected.state_dict().items())
    batch = batch_of(g["input/images"], mask=g["mask/exponential_noise"])
    student, info = convert.student_from(out)
    assert info.method == "maskalign" and not info.final_norm
    close(student(batch.images, g["mask/ids_keep"], levels=[3]).levels[3], g["student/hidden_states"][3])
    direct, _ = convert.student_from(tmp_path / "official.pth", heads=4)
    assert torch.equal(direct(IMAGES).tokens, student(IMAGES).tokens)


def test_student_of_an_openmmlab_file(tmp_path: Path) -> None:
    """Its position table is not MAE's (the halves are swapped), so the latent is right only if the table came along."""
    g = golden.load("pixmim_dev")
    torch.save({"state_dict": g.part("state"), "meta": {"epoch": 1}}, tmp_path / "official.pth")
    student, info = convert.student_from(tmp_path / "official.pth", heads=4)
    assert (info.config.width, info.config.depth, info.image_size) == (64, 3, 64)
    ids_keep = g["noise"].argsort(dim=1)[:, :4]
    close(student(g["image"], ids_keep).tokens, g["latent"])
    ours = posembed.sincos_2d(64, (4, 4))
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
    student, info = convert.student_from(path, heads=4)
    assert (info.config.width, info.config.depth, info.config.patch, info.image_size) == (64, 4, 16, 64)
    close(student(g["image"], g["ids_keep"]).tokens, g["latent"])


def test_student_of_a_run_folder_and_of_a_checkpoint(saved: tuple[Path, Method]) -> None:
    folder, method = saved
    expected = method.student(IMAGES).tokens
    for path in (folder, folder / "checkpoints" / "step-00000007"):
        student, info = convert.student_from(path)
        assert torch.equal(student(IMAGES).tokens, expected)
        assert info.method is not None and info.image_size == 64
    larger, info = convert.student_from(folder, image_size=96)
    assert info.image_size == 96 and larger(torch.zeros(1, 3, 96, 96)).tokens.shape == (1, 37, 32)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["convert", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    method, run = build("mae")
    folder, out = save_run(tmp_path / "run", method, run), str(tmp_path / "out.safetensors")
    official = tmp_path / "mae.pth"
    state = convert.mae_to_official(method.state_dict()).weights
    torch.save({"model": state}, official)
    encoder = tmp_path / "encoder.pth"
    torch.save({"model": {n: t for n, t in state.items() if not n.startswith(("decoder", "mask"))}}, encoder)
    text = tmp_path / "text.pth"
    text.write_text("not a checkpoint")
    recipe = str(folder / "config.yaml")
    wide = ["--recipe", recipe, "--set", "student.depth=4"]

    cases: list[tuple[list[str], str]] = [
        (["nothing", out, "--to", "timm"], "neither a run folder"),
        ([str(text), out, "--to", "timm"], "cannot be read as a torch checkpoint"),
        ([str(folder), str(official), "--to", "timm"], "exists; choose another name"),
        ([str(official), out, "--to", "timm"], "give the heads"),
        ([str(official), out, "--to", "official"], "not a checkpoint of ours"),
        ([str(official), out, "--to", "mimscale"], "--recipe is missing"),
        ([str(encoder), out, "--to", "mimscale", "--recipe", recipe], "not a whole mae model"),
        ([str(official), out, "--to", "mimscale", *wide], "does not fit"),
        ([str(folder), out, "--to", "mimscale", "--recipe", recipe], "checkpoint of ours already"),
    ]
    for arguments, fragment in cases:
        assert fragment in refused(arguments, capsys)
        assert not Path(out).exists()
    shard = next((folder / "checkpoints" / "step-00000007").glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-8])
    assert "take an older checkpoint" in refused([str(folder), out, "--to", "timm"], capsys)
    (tmp_path / "empty").mkdir()
    run_folder.create(tmp_path / "empty", run)
    assert "no complete checkpoint" in refused([str(tmp_path / "empty"), out, "--to", "timm"], capsys)


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return (exec, ("open('ran', 'w')",))

    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="cannot be read"):
        convert.read(tmp_path / "evil.pth")
    assert not Path("ran").exists()


def test_the_check_sees_a_difference() -> None:
    method, _ = build("mae")
    assert isinstance(method, MAE)
    state: dict[str, Tensor] = convert.to_timm(method.student.state_dict())
    assert convert.difference_to_timm(method.student, state) < convert.LIMIT
    state["blocks.1.mlp.fc1.bias"] = state["blocks.1.mlp.fc1.bias"] + 0.05
    assert convert.difference_to_timm(method.student, state) > convert.LIMIT


def test_exported_file_says_what_it_holds(tmp_path: Path) -> None:
    method, run = build("mae")
    out = tmp_path / "student.safetensors"
    assert main(["convert", str(save_run(tmp_path / "run", method, run)), str(out), "--to", "timm"]) == 0
    from safetensors import safe_open

    with safe_open(out, framework="pt") as file:
        carried = json.loads(file.metadata()[convert.METADATA])
    assert carried["student"]["heads"] == 2 and carried["image_size"] == 64
