"""MaskAlign against the official program's numbers, and what its check refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mimscale.convert.formats.maskalign import from_official
from mimscale.convert.networks import levels_of
from mimscale.errors import UserError
from mimscale.methods.maskalign import MaskAlign
from mimscale.models.heads import Alignment
from mimscale.models.token_selection import mask_of
from mimscale.types import Targets, TeacherInfo
from tests import golden
from tests.golden import batch_of, close, gradient_close, run_config

GOLDENS = ["default", "sum_mlp", "simple_random", "dino_attn", "clip14"]


@pytest.mark.parametrize("name", GOLDENS)
def test_golden(name: str) -> None:
    g = golden.load(f"maskalign_{name}_dev")
    run = golden.maskalign_run(g.config)
    method = golden.maskalign_method(run, g.config, g.part("state"))
    targets = golden.targets_of(g["teacher/hidden_states"], g["teacher/cls_attention"])
    random = g.config["mask_type"] == "random"
    batch = batch_of(g["input/images"], mask=g["mask/noise" if random else "mask/exponential_noise"])

    ids_keep = method.masking.choose(batch, {"teacher": targets}).visible
    golden.equal(ids_keep, g["mask/ids_keep"])
    assert torch.equal(mask_of(ids_keep, method.student.patches), g["mask/binary"])

    levels = method.student(batch.images, ids_keep, levels=range(run.student.depth)).levels
    for level, output in levels.items():
        close(output, g["student/hidden_states"][level])
    head, supervised = aligned(method, "teacher"), method.targets["teacher"].shares
    for level, mixed, prediction in zip(supervised, head.aggregate(levels), head(levels), strict=True):
        close(mixed, g["student/aggregated"][level])
        close(prediction, g["student/prediction"][level])
        close(method.targets["teacher"].features(targets, level, ids_keep), g["target/normalised"][level])

    out = method(batch, {"teacher": targets})
    golden.loss_close(out["loss"], g["loss/total"][0])
    for level in supervised:
        stored = g["loss/per_level_unweighted"][level]
        golden.loss_close(out[f"level_teacher_{level}"], stored)
    assert len(out) == 1 + len(supervised)

    out["loss"].backward()
    golden.every_parameter_has_a_gradient(method)
    ours = {n: p.grad for n, p in method.named_parameters()}
    stored_gradients = from_official(g.part("grad"), levels_of(method)).weights
    assert len(stored_gradients) >= 8
    for parameter, gradient in stored_gradients.items():
        gradient_close(ours[parameter], gradient)
    if "grad/distill_weights" in g.tensors:  # the rows that we do not build have no gradient there either
        unsupervised = [i for i in range(len(g["grad/distill_weights"])) if i not in supervised]
        assert not g["grad/distill_weights"][unsupervised].any()


# ------------------------------------------------------------------------------------------------- options and refusals


def aligned(method: MaskAlign, teacher: str = "t") -> Alignment:
    head = method.alignment[teacher]
    assert isinstance(head, Alignment)
    return head


INFO = TeacherInfo("t", dim=24, depth=3, grid=(4, 4), image_size=64, has_cls=True)
STUDENT = {"width": 32, "depth": 3, "heads": 2}


def build(info: TeacherInfo = INFO, student: dict[str, Any] | None = None, **method: Any) -> MaskAlign:
    torch.manual_seed(5)
    values = {"name": "maskalign", "levels": "top2", **method}
    return MaskAlign(run_config(values, student or STUDENT), {"t": info})


def targets(info: TeacherInfo = INFO, count: int = 2) -> Targets:
    generator = torch.Generator().manual_seed(6)
    patches = info.grid[0] * info.grid[1]
    attention = torch.rand(count, patches, generator=generator).softmax(1) if info.has_cls else None
    levels = {i: torch.randn(count, patches, info.dim, generator=generator) for i in range(info.depth)}
    cls = {i: torch.randn(count, info.dim, generator=generator) for i in range(info.depth)} if info.has_cls else {}
    return Targets(levels, cls, attention)


def noise_for(method: MaskAlign, count: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {name: torch.rand(count, *n.shape, generator=generator) + 1e-3 for name, n in method.needs.noise.items()}


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(8))


@pytest.mark.parametrize("adaptor", ["linear", "norm_linear", "mlp", "mlp_norm"])
@pytest.mark.parametrize("fusion", ["linear", "sum", "simple"])
def test_every_parameter_learns(fusion: str, adaptor: str) -> None:
    method = build(fusion=fusion, adaptor=adaptor, target_norm="l2", loss="l1", levels="linear_decay")
    method(batch_of(images(), **noise_for(method)), {"t": targets()})["loss"].backward()
    golden.every_parameter_has_a_gradient(method)
    assert method.no_weight_decay() <= {n for n, _ in method.named_parameters()}
    assert (aligned(method).mixing is None) == (fusion == "simple")
    assert all(p.dim() > 0 for p in method.parameters())


@pytest.mark.parametrize("adaptor", ["linear", "mlp_norm"])
@pytest.mark.parametrize(("fusion", "depth"), [("linear", 3), ("sum", 3), ("sum", 5)])
def test_adaptors_before_the_mixing(fusion: str, depth: int, adaptor: str) -> None:
    """As the paper draws it: adaptor j on student block j, then row i of the mixing gives teacher level i."""
    info, student = TeacherInfo(**{**INFO.__dict__, "depth": 3}), {**STUDENT, "depth": depth}
    method = build(info, student, fusion=fusion, adaptor=adaptor, adaptor_position="before")
    head = aligned(method)
    assert list(head.adaptors) == [str(block) for block in range(depth)]
    assert isinstance(head.mixing, torch.Tensor) and head.mixing.shape == (2, depth)
    levels = {block: torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(block)) for block in range(depth)}
    first, second = head(levels)
    adapted = [head.adaptors[str(block)](levels[block]) for block in range(depth)]
    for row, prediction in zip(head.mixing.unbind(), (first, second), strict=True):
        expected = sum((w * x for w, x in zip(row, adapted, strict=True)), torch.zeros(()))
        torch.testing.assert_close(prediction, expected)
    batch = batch_of(images(), **noise_for(method))
    method(batch, {"t": targets(info)})["loss"].backward()
    golden.every_parameter_has_a_gradient(method)

    after = build(info, student, fusion=fusion, adaptor=adaptor)
    assert list(aligned(after).adaptors) == ["1", "2"]
    with torch.no_grad():  # one linear map without bias for all: then the order does not matter
        for adaptors in (head.adaptors, aligned(after).adaptors):
            for module in adaptors.modules():
                if isinstance(module, torch.nn.Linear):
                    module.weight.copy_(torch.eye(*module.weight.shape))
                    module.bias.zero_()
    if adaptor == "linear":
        for a, b in zip(head(levels), aligned(after)(levels), strict=True):
            torch.testing.assert_close(a, b)


def test_needs() -> None:
    method = build()
    assert method.needs.noise["mask"].kind == "exponential" and method.needs.noise["mask"].shape == (16,)
    assert method.needs.teachers["t"].levels == (1, 2) and method.needs.teachers["t"].cls_attention
    random = build(masking={"policy": "random"}, levels="mean")
    assert random.needs.noise["mask"].kind == "uniform"
    assert random.needs.teachers["t"].levels == (0, 1, 2) and not random.needs.teachers["t"].cls_attention
    assert "drop_path" in build(student={**STUDENT, "drop_path": 0.2}).needs.noise


def test_view_shows_what_the_student_sees() -> None:
    method = build()
    batch, all_targets = batch_of(images(), **noise_for(method)), targets()
    view = method.view(batch, {"t": all_targets})
    assert view.mask is not None and view.mask.sum(1).tolist() == [12, 12]
    assert view.attention is all_targets.cls_attention and 0 <= view.images.min() <= view.images.max() <= 1


def test_teacher_without_class_token() -> None:
    info = TeacherInfo("t", 24, 3, (4, 4), 64, has_cls=False)
    method = build(info, masking={"policy": "random"}, cls_target=False)
    loss = method(batch_of(images(), **noise_for(method)), {"t": targets(info)})["loss"]
    loss.backward()
    golden.every_parameter_has_a_gradient(method)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_fp32(dtype: torch.dtype) -> None:
    method = build()
    batch = batch_of(images(), **noise_for(method))
    full = method(batch, {"t": targets()})
    for parameter in method.parameters():
        parameter.data = parameter.data.to(dtype)
    half = method(batch, {"t": targets()})
    half["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())
    for name, value in half.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, full[name], rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("info", "method", "fragment"),
    [
        ({"grid": (16, 16), "image_size": 224}, {}, "16x16 grid at 224 px, the student 4x4; set teachers.t.image_size"),
        ({"depth": 6}, {}, "set method.fusion = sum"),
        ({"depth": 6}, {"fusion": "simple"}, "set method.fusion = sum"),
        ({"has_cls": False}, {"cls_target": False}, "no teacher has a class token; add one"),
        ({"has_cls": False}, {}, "cls_target = false"),
        ({}, {"masking": {"ratio": 0.95}}, "method.masking.ratio = 0.95 leaves 0 of 16 patches visible; lower it"),
        ({}, {"levels": "top4"}, "needs 1 to 3 levels"),
        ({}, {"levels": "mid3"}, "0 to 2"),
        ({}, {"levels": "best"}, "choose top<k>"),
        ({}, {"levels": "mid1", "fusion": "simple"}, "without a gradient"),
        ({}, {"adaptor_position": "before", "fusion": "simple"}, "without mixing both positions are the same"),
        ({}, {"targets": {"other": {}}}, "choose from t"),
        ({}, {"target_norm": "bn"}, "number of ranks"),
        ({}, {"adaptor": "mlp2"}, "method.adaptor = 'mlp2'"),
    ],
)
def test_refusals(info: dict[str, Any], method: dict[str, Any], fragment: str) -> None:
    with pytest.raises(UserError, match=fragment) as error:
        build(TeacherInfo(**{**INFO.__dict__, **info}), **method)
    assert "\n" not in str(error.value)


def test_one_teacher_is_aligned_with_and_another_masks() -> None:
    section = {"name": "maskalign", "levels": "top2", "masking": {"teacher": "eye"}, "targets": {"eye": {"weight": 0}}}
    method = MaskAlign(run_config(section, STUDENT), {"t": INFO, "eye": INFO})
    assert method.needs.teachers["eye"].cls_attention and not method.needs.teachers["eye"].levels
    assert method.needs.teachers["t"].levels == (1, 2) and not method.needs.teachers["t"].cls_attention
    batch, all_targets = batch_of(images(), **noise_for(method)), {"t": targets(), "eye": targets()}
    assert method(batch, all_targets)["loss"].isfinite()
    run = run_config({**section, "targets": {name: {"weight": 0} for name in ("eye", "third")}}, STUDENT)
    with pytest.raises(
        UserError, match="teachers.third: neither maskalign nor the masking policy attention uses it; remove"
    ):
        MaskAlign(run, {"t": INFO, "eye": INFO, "third": INFO})


WIDE = TeacherInfo("wide", dim=40, depth=3, grid=(4, 4), image_size=56, has_cls=True)
NO_CLS = TeacherInfo("siglip", dim=20, depth=5, grid=(4, 4), image_size=64, has_cls=False)
SEVERAL = {"t": INFO, "wide": WIDE, "siglip": NO_CLS}


@pytest.mark.parametrize("position", ["after", "before"])
def test_several_teachers_weigh_as_their_single_runs(position: str) -> None:
    """Each with its own depth, width, levels, normalisation and weight: the loss is the sum of three runs' losses."""
    section = {"name": "maskalign", "levels": "top2", "fusion": "sum", "adaptor_position": position}
    own: dict[str, dict[str, Any]] = {
        "t": {"weight": 0.5},
        "wide": {"levels": [0, 2], "target_norm": "l2", "cls_target": False},
        "siglip": {"levels": "mean", "cls_target": False, "weight": 2.0},
    }
    torch.manual_seed(5)
    method = MaskAlign(run_config({**section, "targets": own}, STUDENT), SEVERAL)
    assert method.masking.teacher == "t"  # type: ignore[attr-defined]  # the first that has a class token
    assert {n: needs.levels for n, needs in method.needs.teachers.items()} == {
        "t": (1, 2),
        "wide": (0, 2),
        "siglip": (0, 1, 2, 3, 4),
    }
    batch, all_targets = (
        batch_of(images(), **noise_for(method)),
        {name: targets(info) for name, info in SEVERAL.items()},
    )
    out = method(batch, all_targets)
    expected = torch.zeros(())
    for name, info in SEVERAL.items():
        alone = {**section, "masking": {"policy": "random"}, "targets": {name: {**own[name], "weight": 1.0}}}
        single = MaskAlign(run_config(alone, STUDENT), {name: info})
        single.load_state_dict({k: t for k, t in method.state_dict().items() if k in single.state_dict()})
        single.masking = method.masking
        one = single(batch, all_targets)
        expected = expected + own[name].get("weight", 1.0) * one["loss"].detach()
        for scalar, value in one.items():
            torch.testing.assert_close(out[scalar], value) if scalar != "loss" else None
    torch.testing.assert_close(out["loss"], expected)
    out["loss"].backward()
    golden.every_parameter_has_a_gradient(method)
    assert method.no_weight_decay() == {f"alignment.{name}.mixing" for name in SEVERAL}
    assert method.no_weight_decay() <= {name for name, _ in method.named_parameters()}


@pytest.mark.parametrize(
    ("section", "fragment"),
    [
        (
            {"fusion": "linear", "cls_target": False},
            r"needs teachers as deep as the student \(teachers.siglip 5 blocks, the student 3\)",
        ),
        ({}, "teachers.siglip has no class token; set method.targets.siglip.cls_target = false"),
        (
            {"masking": {"teacher": "siglip"}, "cls_target": False},
            "siglip is not a teacher with a class token; choose one of t, w",
        ),
        ({"targets": {"clip": {}}}, "method.targets.clip: no such teacher; choose from t, wide, siglip"),
    ],
)
def test_refusals_of_several_teachers(section: dict[str, Any], fragment: str) -> None:
    with pytest.raises(UserError, match=fragment) as error:
        MaskAlign(run_config({"name": "maskalign", "levels": "top2", "fusion": "sum", **section}, STUDENT), SEVERAL)
    assert "\n" not in str(error.value)


def test_refuses_no_teacher() -> None:
    with pytest.raises(UserError, match="needs a teacher"):
        MaskAlign(run_config({"name": "maskalign", "levels": "top2"}, STUDENT), {})
