"""A run that starts from weights: what arrives in the method, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mimscale.checkpoint import format as checkpoint
from mimscale.config.run import RunConfig
from mimscale.convert.formats import mae, simmim
from mimscale.convert.formats.timm import SHARED_TABLE
from mimscale.convert.read import identity_file, resolve
from mimscale.errors import UserError
from mimscale.methods.base import Method
from mimscale.methods.finetune import Finetune
from mimscale.methods.mae import MAE
from mimscale.methods.mff import MFF
from mimscale.methods.simmim import SimMIM
from mimscale.models import pos_embed, rel_pos_bias
from mimscale.training import init_weights
from tests import golden
from tests.convert.runs import IMAGES, METHODS, STUDENT, build, save_run, saved_run
from tests.golden import batch_of, close, run_config

FINETUNE = {"name": "finetune", "classes": 3, "head_std": 0.1}


def started(
    kind: type[Method], section: dict[str, Any], path: Path, size: int = 64, part: str = "student", **student: Any
) -> tuple[Method, tuple[str, ...], RunConfig]:
    """A new method, from another seed, filled from `path`."""
    torch.manual_seed(7)
    sections = {"init": {"weights": str(path), "part": part}}
    run = run_config(section, {**STUDENT, **student}, size, **sections)
    method = kind(run, {})
    return method, init_weights.load_into(method, run), run


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_finetuning_starts_from_the_pretrained_features(pool: str, tmp_path: Path) -> None:
    folder, source = saved_run(tmp_path / "run", "mae")
    method, notes, _ = started(Finetune, {**FINETUNE, "pool": pool}, folder)
    assert isinstance(source, MAE) and isinstance(method, Finetune)
    if pool == "mean":
        pooled = source.student(IMAGES, apply_norm=False).tokens[:, 1:].mean(dim=1)
        features = F.layer_norm(pooled, (32,), eps=1e-6)
        assert "in it and not used: norm.bias, norm.weight" in notes
    else:
        features = source.student(IMAGES).tokens[:, 0]
    assert torch.equal(method.features(IMAGES), features)
    labels = torch.tensor([0, 1])
    expected = F.cross_entropy(method.head(features), labels, label_smoothing=0.1)
    assert torch.equal(method(batch_of(IMAGES), {})["loss"], expected)
    assert any("tensors outside of the student" in note for note in notes)


def test_from_an_official_file(tmp_path: Path) -> None:
    g = golden.load("mae_dev")
    torch.save({"model": g.part("state")}, tmp_path / "official.pth")
    method, _, _ = started(MAE, METHODS["mae"][1], tmp_path / "official.pth", width=64, depth=4, heads=4)
    assert isinstance(method, MAE)
    close(method.student(g["image"], g["ids_keep"]).tokens, g["latent"])


def test_positions_are_resized_as_in_the_official_fine_tuning(tmp_path: Path) -> None:
    folder, source = saved_run(tmp_path / "run", "mae")
    method, notes, _ = started(Finetune, FINETUNE, folder, size=96)
    assert isinstance(method, Finetune)
    table = pos_embed.resize(source.student.get_buffer("pos_embed"), (4, 4), (6, 6))
    assert torch.equal(method.student.get_parameter("pos_embed"), table)
    assert "pos_embed resized from 4x4 to 6x6 patches" in notes


def test_relative_positions_are_resized_in_every_block(tmp_path: Path) -> None:
    """SimMIM's shared table becomes one per block, of the larger grid."""
    source, run = build("simmim")
    torch.nn.init.normal_(source.student.get_parameter(SHARED_TABLE))
    folder = save_run(tmp_path / "run", source, run)
    method, notes, _ = started(Finetune, {**FINETUNE, "beit": {}}, folder, size=96)
    assert isinstance(method, Finetune)
    table = rel_pos_bias.resize(source.student.get_parameter(SHARED_TABLE).detach(), (6, 6))
    for block in range(method.student.depth):
        name = f"blocks.{block}.attn.relative_position_bias_table"
        assert torch.equal(method.student.get_parameter(name), table)
        assert f"{name} resized from 4x4 to 6x6 patches" in notes
    assert method.logits(torch.zeros(1, 3, 96, 96)).isfinite().all()


def test_a_last_norm_that_is_not_in_the_weights_stays(tmp_path: Path) -> None:
    folder, _ = saved_run(tmp_path / "run", "maskalign")
    _, notes, _ = started(Finetune, {**FINETUNE, "pool": "cls"}, folder)
    assert "not in it, so at their initial values: norm.bias, norm.weight" in notes


@pytest.mark.parametrize("file", ["simmim_dev", "simmim_ape"])
@pytest.mark.parametrize("official", [False, True])
def test_finetuning_of_simmim_sees_what_its_pretraining_saw(file: str, official: bool, tmp_path: Path) -> None:
    """With nothing masked both encoders give the same tokens, to the bit; each block has a copy of the shared table."""
    g = golden.load(file)
    c = g.config
    kind = "per_block" if c["position"] == "shared" else "absolute"
    sizes = {"width": c["embed"], "depth": c["depth"], "heads": c["heads"]}
    scale = c["layer_scale_init"]
    positions = "relative" if kind == "per_block" else kind
    pretraining = {"name": "simmim", "positions": positions, "layer_scale": scale}
    run = run_config(pretraining, sizes, c["img_size"])
    source = SimMIM(run, {})
    source.load_state_dict(simmim.from_official(g.part("state")).weights)
    path = tmp_path / "official.pth"
    if official:
        torch.save({"model": g.part("state")}, path)
    else:
        path = save_run(tmp_path / "run", source, run)
    images = torch.randn(2, 3, c["img_size"], c["img_size"], generator=torch.Generator().manual_seed(2))
    for pool in ("mean", "cls"):
        section = {**FINETUNE, "pool": pool, "beit": {"positions": kind, "layer_scale": scale}}
        method, notes, _ = started(Finetune, section, path, c["img_size"], **sizes)
        assert isinstance(method, Finetune)
        out = source.student(images, apply_norm=pool == "cls")
        assert torch.equal(method.student(images).tokens, out.tokens)
        mean = F.layer_norm(out.tokens[:, 1:].mean(dim=1), (c["embed"],), eps=1e-6)
        pooled = mean if pool == "mean" else out.tokens[:, 0]
        assert torch.equal(method.features(images), pooled)
        assert any("copied into each of the" in note for note in notes) == (kind == "per_block")
        method(batch_of(images), {})["loss"].backward()
        golden.every_parameter_has_a_gradient(method)
        assert method.layer_of("student.blocks.1.attn.q_bias") == 2 and method.layer_of("student.cls_token") == 0


@pytest.mark.parametrize("official", [False, True])
def test_pretraining_goes_on_from_a_whole_method(official: bool, tmp_path: Path) -> None:
    folder, source = saved_run(tmp_path / "run", "mae")
    path = folder
    if official:
        path = tmp_path / "official.pth"
        torch.save({"model": mae.to_official(source.state_dict()).weights}, path)
    method, _, _ = started(MAE, METHODS["mae"][1], path, part="method")
    state: dict[str, Tensor] = method.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in source.state_dict().items())
    batch = batch_of(IMAGES, mask=torch.rand(2, 16, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(method(batch, {})["loss"], source(batch, {})["loss"])
    larger, notes, _ = started(MAE, METHODS["mae"][1], path, size=96, part="method")
    assert "decoder.pos_embed resized from 4x4 to 6x6 patches" in notes


def test_pretraining_warm_starts_its_student_alone(tmp_path: Path) -> None:
    folder, source = saved_run(tmp_path / "run", "maskalign")
    method, _, _ = started(MFF, METHODS["mff"][1], folder)
    own = method.student.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in source.student.state_dict().items())


@pytest.mark.parametrize(
    ("source", "student", "part", "line"),
    [
        ("mae", {"depth": 2}, "student", "width 32, depth 3, MLP ratio 4, patch 16, this run's student is a ViT of"),
        ("mae", {"width": 48}, "student", "change the section student"),
        ("mae", {"heads": 4}, "student", "and 2 heads, this run's student is"),
        ("simmim", {}, "student", "holds a BEiT-style ViT (SimMIM's) of width 32"),
        ("mff", {}, "method", "holds the method mff, this run's is mae; set init.part = student"),
        ("finetune", {}, "method", "holds the method finetune, this run's is mae; set init.part"),
    ],
)
def test_what_does_not_fit_is_one_line(
    source: str, student: dict[str, Any], part: str, line: str, tmp_path: Path
) -> None:
    folder, _ = saved_run(tmp_path / "run", source)
    with pytest.raises(UserError) as error:
        started(MAE, METHODS["mae"][1], folder, part=part, **student)
    assert line in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("kind", ["run", "file"])
def test_weights_that_are_not_finite_are_refused(kind: str, value: float, tmp_path: Path) -> None:
    method, run = build("mae")
    with torch.no_grad():
        method.student.get_parameter("blocks.1.mlp.fc1.bias")[3] = value
    path = tmp_path / "weights.pth"
    if kind == "run":
        path = save_run(tmp_path / "run", method, run)
    else:
        torch.save(mae.to_official(method.state_dict(), run).weights, path)
    with pytest.raises(UserError, match=r"holds inf or NaN in 1 tensors, first .*blocks\.1\.mlp\.fc1\.bias; take an"):
        started(MAE, METHODS["mae"][1], path)


def test_weights_are_identified_by_their_hash(tmp_path: Path) -> None:
    folder, _ = saved_run(tmp_path / "run", "mae")
    digest = checkpoint.sha256(identity_file(resolve(folder)))
    plain = run_config(FINETUNE, STUDENT, init={"weights": str(folder)})
    first = init_weights.with_sha256(plain, None, resumes=False)
    assert first.init is not None and first.init.sha256 == digest
    moved = plain.model_copy(update={"init": plain.init.model_copy(update={"weights": tmp_path / "gone"})})  # type: ignore[union-attr]
    again = init_weights.with_sha256(moved, first, resumes=True)  # the file is not read
    assert again.init is not None and again.init.sha256 == digest and again.shaping() == first.shaping()
    wrong = run_config(FINETUNE, STUDENT, init={"weights": str(folder), "sha256": "0" * 64})
    with pytest.raises(UserError, match=f"init.sha256 = {'0' * 64}, but .* has {digest}"):
        init_weights.with_sha256(wrong, None, resumes=False)
    with pytest.raises(UserError, match="neither a run folder, nor a checkpoint folder, nor a file"):
        init_weights.with_sha256(moved, first, resumes=False)
