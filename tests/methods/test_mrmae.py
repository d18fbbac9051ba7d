"""MR-MAE: which patches which loss reads, its options, and what its check refuses. There are no official numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimscale.convert.formats.mae import from_official
from mimscale.errors import UserError
from mimscale.methods.mff import MFF
from mimscale.methods.mrmae import MRMAE
from mimscale.models.patches import patchify, unpatchify
from mimscale.models.token_selection import gather_tokens, mask_of
from mimscale.types import Targets, TeacherInfo
from tests import golden
from tests.golden import batch_of, close, run_config

STUDENT = {"width": 32, "depth": 3, "heads": 2}
SECTION = {"name": "mrmae", "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
STAGES = {"widths": [8, 12], "depths": [1, 2], "class_token": True}
CLIP = TeacherInfo("clip", dim=24, depth=4, grid=(4, 4), image_size=64, has_cls=True)
DINO = TeacherInfo("dino", dim=20, depth=3, grid=(4, 4), image_size=64, has_cls=True)
NO_CLS = TeacherInfo("siglip", dim=20, depth=3, grid=(4, 4), image_size=64, has_cls=False)


def build(*teachers: TeacherInfo, student: dict[str, Any] = STUDENT, **method: Any) -> MRMAE:
    torch.manual_seed(5)
    run = run_config({**SECTION, **method}, student)
    return MRMAE(run, {info.name: info for info in teachers or (CLIP,)})


def head(method: MRMAE, teacher: str, level: int) -> nn.Module:
    return cast(nn.ModuleDict, method.mimic[teacher])[str(level)]


def targets_of(*teachers: TeacherInfo, count: int = 3) -> dict[str, Targets]:
    targets = {}
    for seed, info in enumerate(teachers or (CLIP,)):
        generator = torch.Generator().manual_seed(seed)
        attention = (3 * torch.randn(count, 16, generator=generator)).softmax(1)
        last = info.depth - 1
        levels = {last: 2 + 3 * torch.randn(count, 16, info.dim, generator=generator)}
        cls = {last: torch.randn(count, info.dim, generator=generator)} if info.has_cls else {}
        targets[info.name] = Targets(levels, cls, attention if info.has_cls else None)
    return targets


def noise_for(method: MRMAE, count: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {name: torch.rand(count, *n.shape, generator=generator) + 1e-3 for name, n in method.needs.noise.items()}


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(8))


def losses(method: MRMAE, targets: Mapping[str, Targets], inputs: Tensor | None = None) -> dict[str, Tensor]:
    return method(batch_of(images() if inputs is None else inputs, **noise_for(method)), targets)


def test_the_pixel_branch_is_mae() -> None:
    """With MAE's masks and weights, pixel is the official MAE's loss."""
    g = golden.load("maskmr_mae_dev")
    c = g.config
    section = {
        "name": "mrmae",
        "masking": {"policy": "random"},
        "decoder_width": c["dec_dim"],
        "decoder_depth": c["dec_depth"],
        "decoder_heads": c["dec_heads"],
    }
    run = run_config(section, {"width": c["embed"], "depth": c["depth"], "heads": c["heads"]}, c["img"])
    method = MRMAE(run, {"clip": CLIP})
    missing = method.load_state_dict(from_official(g.part("state")).weights, strict=False)
    assert {name.split(".")[0] for name in missing.missing_keys} == {"mimic"} and not missing.unexpected_keys
    batch = batch_of(g["input/images"], mask=g["mask/noise"])
    assert torch.equal(method.masking.choose(batch, {}).visible, g["mask/ids_keep"])
    out = method(batch, targets_of(count=2))
    golden.loss_close(out["pixel"], g["loss/total"][0])


def test_focused_mimicking_is_the_official_draw() -> None:
    """Drawn by the same sampler as MaskAlign's attentive masking; topk is its limit without noise."""
    g = golden.load("attentive_masking_dev")
    importance, noise = g["L16_r70/importance"], g["L16_r70/exponential_noise"]
    method = build(masking={"ratio": 0.7})
    targets = {"clip": Targets({}, {}, importance)}
    batch = batch_of(images(2), mask=noise)
    assert torch.equal(method.masking.choose(batch, targets).visible, g["L16_r70/attn_ids_keep"])
    top = build(masking={"policy": "topk", "ratio": 0.7})
    assert not top.needs.noise
    assert torch.equal(
        top.masking.choose(batch_of(images(2)), targets).visible, importance.argsort(dim=1, descending=True)[:, :4]
    )


def test_each_loss_reads_its_own_patches() -> None:
    """Pixels: masked patches only. Features: visible ones only, and only from the encoder's input."""
    method = build(masking={"policy": "random"})
    targets = targets_of()
    batch = batch_of(images(), **noise_for(method))
    ids = method.masking.choose(batch, targets).visible
    hidden = mask_of(ids, 16)[:, :, None]
    before = losses(method, targets)

    def changed(where: Tensor) -> dict[str, Targets]:
        return {"clip": Targets({3: targets["clip"].levels[3] + 5 * where}, {}, targets["clip"].cls_attention)}

    shift = torch.randn(24, generator=torch.Generator().manual_seed(1))
    assert all(torch.equal(value, before[name]) for name, value in losses(method, changed(hidden * shift)).items())
    other = losses(method, changed((1 - hidden) * shift))
    assert other["mimic_clip"] != before["mimic_clip"] and torch.equal(other["pixel"], before["pixel"])

    scribble = torch.randn(patchify(images(), 16).shape, generator=torch.Generator().manual_seed(2))
    scribbled = unpatchify(patchify(images(), 16) + hidden[:, :, :, None, None] * scribble, (4, 4))
    other = losses(method, targets, scribbled)
    assert torch.equal(other["mimic_clip"], before["mimic_clip"]) and other["pixel"] != before["pixel"]


def test_losses_by_hand() -> None:
    method = build(CLIP, DINO, masking={"policy": "random"}, targets={"dino": {"weight": 0.25}}, pixel_weight=2.0)
    targets = targets_of(CLIP, DINO)
    batch = batch_of(images(), **noise_for(method))
    ids = method.masking.choose(batch, targets).visible
    tokens = method.student(batch.images, ids).tokens[:, 1:]
    out = method(batch, targets)
    expected = {}
    for name, info in (("clip", CLIP), ("dino", DINO)):
        features = gather_tokens(targets[name].levels[info.depth - 1], ids)
        features = (features - features.mean(-1, keepdim=True)) / (
            features.var(-1, keepdim=True, correction=0) + 1e-5
        ).sqrt()
        expected[name] = (head(method, name, info.depth - 1)(tokens) - features).square().mean()
        torch.testing.assert_close(out[f"mimic_{name}"], expected[name].detach())
    torch.testing.assert_close(out["loss"], 2 * out["pixel"] + expected["clip"] + 0.25 * expected["dino"])
    assert list(out) == ["loss", "pixel", "mimic_clip", "mimic_dino"]


@pytest.mark.parametrize("kind", ["l2", "smoothl1", "cosine"])
@pytest.mark.parametrize("norm", ["whiten", "none"])
def test_mimic_losses(kind: str, norm: str) -> None:
    method = build(masking={"policy": "random"}, mimic_loss=kind, target_norm=norm)
    targets = targets_of()
    batch = batch_of(images(), **noise_for(method))
    ids = method.masking.choose(batch, targets).visible
    target = method.targets["clip"].features(targets["clip"], 3, ids)
    raw = gather_tokens(targets["clip"].levels[3], ids)
    assert torch.equal(target, F.layer_norm(raw, (24,)) if norm == "whiten" else raw)
    pred = head(method, "clip", 3)(method.student(batch.images, ids).tokens[:, 1:])
    difference = (pred - target).abs()
    expected = {
        "l2": difference.square().mean(),
        "smoothl1": torch.where(difference < 1, difference.square(), 2 * difference - 1).mean(),
        "cosine": 1 - ((pred * target).sum(-1) / pred.norm(dim=-1) / target.norm(dim=-1)).mean(),
    }[kind]
    torch.testing.assert_close(method(batch, targets)["mimic_clip"], expected.detach())


@pytest.mark.parametrize(
    "method",
    [
        {},
        {"masking": {"policy": "topk"}, "adaptor": "mlp"},
        {"fusion": {"kind": "sum", "levels": [2]}},
        {"fusion": {"kind": "sum", "levels": [0, 2]}},
        {"fusion": {"kind": "mff", "levels": [0, 2], "feeds": "both"}},
        {"fusion": {"kind": "sum", "levels": [1, 2], "feeds": "both"}, "cls_target": True},
        {"fusion": {"kind": "mff", "levels": [1, 2]}},
        {"fusion": {"kind": "mff", "levels": [1]}, "cls_target": True},
        {"cls_target": True, "masking": {"policy": "random"}, "mimic_loss": "cosine", "low_pass_radius": 8},
    ],
)
@pytest.mark.parametrize("stages", [None, STAGES])
def test_every_parameter_learns(method: dict[str, Any], stages: dict[str, Any] | None) -> None:
    built = build(CLIP, DINO, stages=stages, **method)
    losses(built, targets_of(CLIP, DINO))["loss"].backward()
    golden.every_parameter_has_a_gradient(built)
    assert all(p.dim() > 0 for p in built.parameters())


def test_without_a_class_token() -> None:
    method = build(stages={**STAGES, "class_token": False}, fusion={"kind": "sum", "levels": [0, 1]})
    losses(method, targets_of())["loss"].backward()
    golden.every_parameter_has_a_gradient(method)
    method = build(NO_CLS, masking={"policy": "random"})
    losses(method, targets_of(NO_CLS))["loss"].backward()
    golden.every_parameter_has_a_gradient(method)


@pytest.mark.parametrize("stages", [None, STAGES])
def test_what_decoder_and_heads_read(stages: dict[str, Any] | None) -> None:
    ids, batch = torch.tensor([[3, 1, 9, 4]] * 3), batch_of(images())
    plain = build(stages=stages)
    tokens = plain.student(images(), ids).tokens
    latent, fused, scalars = plain.encode(batch, ids)
    assert torch.equal(latent, tokens) and fused is latent and not scalars

    def summed(method: MRMAE) -> tuple[Tensor, Tensor]:
        """What the student gives, and the sum of the levels and of what the stages add."""
        out = method.student(images(), ids, levels=(0, 2))
        total = out.levels[0] + out.levels[2]
        if stages is not None:
            assert out.stage_outputs is not None and not out.stage_outputs[:, 0].any()
            total = total + out.stage_outputs
        return out.tokens, F.layer_norm(total, (32,), eps=1e-6)

    alone = build(stages=stages, fusion={"kind": "sum", "levels": [0, 2]})
    latent, fused, _ = alone.encode(batch, ids)
    tokens, total = summed(alone)
    assert torch.equal(latent, tokens)
    close(fused, total)

    both = build(stages=stages, fusion={"kind": "sum", "levels": [0, 2], "feeds": "both"})
    latent, fused, _ = both.encode(batch, ids)
    close(latent, summed(both)[1])
    assert fused is latent


def test_mff_under_two_losses() -> None:
    """The latent is MFF's, for the decoder and for the heads; the pixel loss is MFF's as well."""
    fusion = {"kind": "mff", "levels": [0, 2]}
    both = build(fusion={**fusion, "feeds": "both"}, masking={"policy": "random"})
    section = {"name": "mff", "fusion": fusion, **{k: v for k, v in SECTION.items() if k != "name"}}
    mff = MFF(run_config(section, STUDENT), {})
    mff.load_state_dict({name: t for name, t in both.state_dict().items() if not name.startswith("mimic.")})
    batch, targets = batch_of(images(), **noise_for(both)), targets_of()
    ours, theirs = both(batch, targets), mff(batch, {})
    assert torch.equal(ours["pixel"], theirs["loss"])
    assert {"weight_0", "weight_2"} <= ours.keys() and torch.equal(ours["weight_0"], theirs["weight_0"])
    with_stages = build(fusion=fusion, stages=STAGES)
    assert {"weight_stages", "weight_0", "weight_2"} <= losses(with_stages, targets).keys()


def test_each_teacher_is_mimicked_at_its_own_level() -> None:
    default, inner = build(CLIP, DINO), build(CLIP, DINO, targets={"clip": {"levels": [1]}})
    assert {name: needs.levels for name, needs in inner.needs.teachers.items()} == {"clip": (1,), "dino": (2,)}
    targets = targets_of(CLIP, DINO)
    moved = {**targets, "clip": replace(targets["clip"], levels={1: targets["clip"].levels[3]})}
    assert torch.equal(losses(inner, moved)["loss"], losses(default, targets)["loss"])


def test_several_levels_of_one_teacher_share_its_loss() -> None:
    both = build(CLIP, DINO, masking={"policy": "random"}, targets={"clip": {"levels": [1, 3], "weight": 0.5}})
    assert both.needs.teachers["clip"].levels == (1, 3) and list(cast(nn.ModuleDict, both.mimic["clip"])) == ["1", "3"]
    targets = targets_of(CLIP, DINO)
    other = torch.randn(3, 16, 24, generator=torch.Generator().manual_seed(9))
    targets["clip"] = replace(targets["clip"], levels={**targets["clip"].levels, 1: other})
    out = losses(both, targets)
    single = {}
    for level in (1, 3):
        one = build(CLIP, DINO, masking={"policy": "random"}, targets={"clip": {"levels": [level]}})
        one.load_state_dict({k: t for k, t in both.state_dict().items() if k in one.state_dict()})
        single[level] = losses(one, targets)["mimic_clip"]
    torch.testing.assert_close(out["mimic_clip"], (single[1] + single[3]) / 2)
    torch.testing.assert_close(out["loss"], out["pixel"] + 0.5 * out["mimic_clip"] + out["mimic_dino"])
    both(batch_of(images(), **noise_for(both)), targets)["loss"].backward()
    golden.every_parameter_has_a_gradient(both)


def test_class_token_target_comes_first() -> None:
    method = build(cls_target=True, target_norm="none")
    targets = targets_of()["clip"]
    target = method.targets["clip"].features(targets, 3, torch.tensor([[2, 5]] * 3))
    assert torch.equal(target[:, 0], targets.cls[3]) and torch.equal(target[:, 2], targets.levels[3][:, 5])


def test_needs() -> None:
    method = build(DINO, CLIP)
    assert {n: (x.kind, x.shape) for n, x in method.needs.noise.items()} == {"mask": ("exponential", (16,))}
    assert method.needs.teachers["clip"].levels == (3,) and not method.needs.teachers["clip"].cls_attention
    assert method.needs.teachers["dino"].levels == (2,) and method.needs.teachers["dino"].cls_attention
    assert build(DINO, CLIP, masking={"teacher": "clip"}).needs.teachers["clip"].cls_attention
    assert build(NO_CLS, CLIP).needs.teachers["clip"].cls_attention
    random = build(masking={"policy": "random"}, student={**STUDENT, "drop_path": 0.1}, stages=STAGES)
    assert random.needs.noise["mask"].kind == "uniform" and random.needs.noise["drop_path"].shape == (6, 2)
    assert not random.needs.teachers["clip"].cls_attention


@pytest.mark.parametrize("stages", [None, STAGES])
def test_drop_path_comes_from_noise(stages: dict[str, Any] | None) -> None:
    method = build(student={**STUDENT, "drop_path": 0.5}, stages=stages)
    noise = noise_for(method)
    shape = noise["drop_path"].shape
    before = torch.get_rng_state()
    kept, dropped, again = (
        method(batch_of(images(), **{**noise, "drop_path": torch.full(shape, value)}), targets_of())["loss"]
        for value in (0.5, 0.0, 0.5)
    )
    assert kept != dropped and torch.equal(kept, again) and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("policy", ["random", "attention", "topk"])
def test_view(policy: str) -> None:
    method = build(masking={"policy": policy})
    targets = targets_of()
    view = method.view(batch_of(images(), **noise_for(method)), targets)
    assert view.mask is not None and view.mask.sum(1).tolist() == [12, 12, 12]
    assert view.reconstruction is not None and view.reconstruction.shape == images().shape
    assert (view.attention is None) == (policy == "random")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_fp32(dtype: torch.dtype) -> None:
    method = build(stages=STAGES, fusion={"kind": "mff", "levels": [0, 2]})
    full = losses(method, targets_of())
    for parameter in method.parameters():
        parameter.data = parameter.data.to(dtype)
    half = losses(method, targets_of())
    half["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())
    for name, value in half.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, full[name], rtol=2e-2, atol=0)


@pytest.mark.parametrize(
    ("teachers", "method", "fragment"),
    [
        ((), {"masking": {"ratio": 0.95}}, "leaves 0 of 16"),
        (({"grid": (16, 16), "image_size": 224},), {}, "the student 4x4; set teachers.clip.image_size to 56"),
        (({"has_cls": False},), {}, "or method.masking.policy = random"),
        (({"has_cls": False},), {"masking": {"policy": "random"}, "cls_target": True}, "set method.cls_target = false"),
        ((), {"cls_target": True, "stages": {}}, "set stages.class_token"),
        ((), {"stages": {"patches": [2, 2, 2]}}, "multiply to 8, student.patch is 16"),
        ((), {"masking": {"teacher": "dino"}}, "choose one of clip"),
        ((), {"masking": {"teacher": "clip", "policy": "random"}}, "unknown key method.masking.teacher"),
        ((), {"targets": {"dino": {}}}, "method.targets.dino: no such teacher; choose from clip"),
        ((), {"targets": {"clip": {"levels": [4]}}}, r"targets.clip.levels = \[4\], teachers.clip: .* levels, 0 to 3"),
        ((), {"targets": {"clip": {"levels": [2, 1]}}}, "must be ascending and lie in the teacher's levels, 0 to 3"),
        ((), {"targets": {"clip": {"levels": [1, 1]}}}, "must be ascending"),
        ((), {"targets": {"clip": {"levels": 3}}}, "levels = 3: must be a rule, such as top5, or a list of blocks"),
        ((), {"targets": {"clip": {"levels": []}}}, "must be a rule"),
        ((), {"levels": "top9"}, "method.levels = top9, teachers.clip: top9 needs 1 to 4 levels"),
        ((), {"targets": {"clip": {"weight": -1}}}, "method.targets.clip.weight = -1"),
        ((), {"targets": {"clip": {"weight": 0}}}, "method.targets: every teacher has weight 0"),
        ((), {"targets": {"clip": {"wieght": 1}}}, "unknown key method.targets.clip.wieght; did you mean 'weight'"),
        (({"name": "clip.b"},), {}, "teachers.clip.b: a module is named after the teacher"),
        (({"name": "half"},), {}, "teachers.half: a module is named after the teacher"),
        (({"name": "training"},), {}, "teachers.training: a module is named after the teacher"),
        ((), {"pixel_weight": 0.0}, "method.pixel_weight = 0.0"),
        (
            (),
            {"fusion": {"kind": "sum", "levels": [3]}},
            r"method.fusion.levels = \[3\] must be ascending and lie in 0 to 2",
        ),
        ((), {"fusion": {"kind": "sum", "levels": [1, 0]}}, "must be ascending"),
        ((), {"fusion": {"kind": "mff", "levels": [-1]}}, "must be ascending and lie in 0 to 2"),
        (
            (),
            {"fusion": {"kind": "mff", "levels": [0, 1], "feeds": "both"}},
            "above the last level would get no gradient",
        ),
        ((), {"fusion": {"kind": "mff"}}, "kind = mff has nothing to fuse; name some levels"),
        ((), {"fusion": {"levels": [1]}}, r"levels = \[1\] with kind = none are not used; set kind"),
        ((), {"fusion": {"kind": "mff", "levels": [2], "feeds": "decoder"}}, "method.fusion.feeds = 'decoder'"),
        ((), {"target_norm": "bn"}, "number of ranks"),
    ],
)
def test_refusals(teachers: tuple[dict[str, Any], ...], method: dict[str, Any], fragment: str) -> None:
    with pytest.raises(UserError, match=fragment) as error:
        build(*[TeacherInfo(**{**CLIP.__dict__, **changes}) for changes in teachers], **method)
    assert "\n" not in str(error.value)


def test_refuses_no_teacher() -> None:
    with pytest.raises(UserError, match="mrmae needs a teacher"):
        MRMAE(run_config(SECTION, STUDENT), {})
