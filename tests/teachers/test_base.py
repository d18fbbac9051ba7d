"""What every teacher shares: the input affine, the walk over the blocks, the attention row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mimscale.teachers.base import cls_attention, fault_of
from mimscale.types import IMAGENET_MEAN, IMAGENET_STD, Targets, TeacherNeeds
from tests.teachers import tiny

CLIP = "vit_base_patch16_clip_quickgelu_224"
DINO = "vit_base_patch16_224.dino"


def column(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.saved(tiny.timm_model(CLIP, 32, patch_size=8), tmp_path_factory.mktemp("clip") / "w.safetensors")


def clip_config(weights: Path, **changes: Any) -> Any:
    return tiny.timm_config(CLIP, weights, options={**tiny.TIMM, "patch_size": 8}, **changes)


def test_preprocess_is_undoing_imagenet_and_applying_clip(clip: Path) -> None:
    teacher = tiny.ensemble(clip_config(clip), 32).teachers["t"]
    pixels = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    ours = teacher.preprocess(((pixels - column(IMAGENET_MEAN)) / column(IMAGENET_STD)).float())
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    torch.testing.assert_close(ours.double(), (pixels - column(mean)) / column(std), atol=2e-6, rtol=0)


def test_same_statistics_leave_the_pixels_untouched() -> None:
    teacher = tiny.ensemble(tiny.timm_config(DINO, None, random=True), 32).teachers["t"]
    images = tiny.images(2, 32)
    assert torch.equal(teacher.preprocess(images), images)


def test_own_statistics_replace_the_library_s(clip: Path) -> None:
    config = clip_config(clip, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    images = tiny.images(2, 32)
    assert torch.equal(tiny.ensemble(config, 32).teachers["t"].preprocess(images), images)


def test_resize_is_bicubic_without_antialiasing() -> None:
    config = tiny.timm_config(DINO, None, random=True, image_size=32)
    images = tiny.images(1, 48)
    expected = F.interpolate(images, size=(32, 32), mode="bicubic", align_corners=False, antialias=False)
    assert torch.equal(tiny.ensemble(config, 48).teachers["t"].preprocess(images), expected)


def test_attention_row_by_hand() -> None:
    query, keys = torch.randn(2, 3, 1, 5), torch.randn(2, 3, 7, 5)
    expected = torch.einsum("bhd,bhnd->bhn", query[:, :, 0], keys).softmax(-1).mean(1)
    torch.testing.assert_close(cls_attention(query, keys), expected)
    assert cls_attention(query.bfloat16(), keys.bfloat16()).dtype == torch.float32


def runs_of(teacher: Any, needs: TeacherNeeds) -> list[int]:
    """Which blocks run."""
    ran: list[int] = []
    handles = [block.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, block in enumerate(teacher.blocks)]
    targets = teacher(tiny.images(1, 32), needs)
    for handle in handles:
        handle.remove()
    assert sorted(targets.levels) == sorted(targets.cls) == list(needs.levels)
    assert (targets.cls_attention is not None) == needs.cls_attention
    return ran


def test_only_what_is_asked_is_kept_and_run(clip: Path) -> None:
    teacher = tiny.ensemble(clip_config(clip), 32).teachers["t"]
    assert runs_of(teacher, TeacherNeeds(levels=(0,))) == [0]
    assert runs_of(teacher, TeacherNeeds(levels=(0, 2))) == [0, 1, 2]
    assert runs_of(teacher, TeacherNeeds(levels=(1,), cls_attention=True)) == [0, 1]  # the row needs block 2's input
    assert runs_of(teacher, TeacherNeeds(cls_attention=True)) == [0, 1]
    assert runs_of(teacher, TeacherNeeds()) == []


def test_targets_carry_no_gradient_but_a_loss_on_them_does(clip: Path) -> None:
    targets = tiny.ensemble(clip_config(clip), 32)(tiny.images(2, 32))["t"]
    student = torch.zeros_like(targets.levels[2], requires_grad=True)
    assert not targets.levels[2].requires_grad
    (F.smooth_l1_loss(student, targets.levels[2]) * targets.cls_attention.sum()).backward()  # type: ignore[union-attr]
    assert student.grad is not None and student.grad.abs().sum() > 0


def test_teacher_is_frozen_and_stays_in_evaluation_mode(clip: Path) -> None:
    teacher = tiny.ensemble(clip_config(clip), 32).teachers["t"]
    teacher.train()
    assert not teacher.training and not any(m.training for m in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize(("precision", "limit"), [("bf16", 0.03), ("fp16", 0.004)])
def test_low_precision_is_close_and_cast_once(clip: Path, precision: str, limit: float) -> None:
    exact = tiny.ensemble(clip_config(clip), 32)(tiny.images(2, 32))["t"]
    low_ensemble = tiny.ensemble(clip_config(clip, precision=precision), 32)
    low = low_ensemble(tiny.images(2, 32))["t"]
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert {p.dtype for p in low_ensemble.teachers["t"].parameters()} == {dtype}
    assert low_ensemble.teachers["t"].scale.dtype == torch.float32
    assert exact.cls_attention is not None and low.cls_attention is not None
    pairs = [(low.levels[i], exact.levels[i]) for i in exact.levels] + [(low.cls_attention, exact.cls_attention)]
    for ours, reference in pairs:
        error = float((ours.float() - reference).norm() / reference.norm())
        assert 0 < error < limit
    assert low.levels[0].dtype == dtype and low.cls_attention.dtype == torch.float32


class Shapes(TorchDispatchMode):
    """Every tensor shape that an operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple) else (result,):
            if isinstance(value, Tensor):
                self.seen.add(tuple(value.shape))
        return result

    def square(self, tokens: int) -> bool:
        return any(shape[-2:] == (tokens, tokens) for shape in self.seen)


def test_no_attention_matrix_is_allocated(clip: Path) -> None:
    teacher = tiny.ensemble(clip_config(clip), 32).teachers["t"]
    with Shapes() as fused:
        teacher(tiny.images(2, 32), tiny.ALL)
    assert not fused.square(17)
    for block in teacher.blocks:
        block.attn.fused_attn = False  # type: ignore[union-attr]
    with Shapes() as plain:
        teacher(tiny.images(2, 32), tiny.ALL)
    assert plain.square(17)


def test_one_block_is_enough_for_attention() -> None:
    config = tiny.timm_config(DINO, None, random=True, options={**tiny.TIMM, "depth": 1})
    targets = tiny.ensemble(config, 32, TeacherNeeds(cls_attention=True))(tiny.images(2, 32))["t"]
    assert targets.cls_attention is not None and targets.cls_attention.shape == (2, 4)


def test_norm_eps_reaches_every_layer_norm() -> None:
    teacher = tiny.ensemble(tiny.timm_config(DINO, None, random=True, norm_eps=1e-12), 32).teachers["t"]
    assert {m.eps for m in teacher.modules() if isinstance(m, nn.LayerNorm)} == {1e-12}


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ([0.1, 0.0, 0.2], None),
        ([0.0, 0.0, 0.0], "the CLS attention is zero on every patch"),
        ([0.1, float("nan"), 0.2], "the CLS attention is not finite"),
    ],
)
def test_faults_of_attention(row: list[float], fault: str | None) -> None:
    assert fault_of(Targets({}, {}, torch.tensor([[0.5, 0.3, 0.1], row]))) == fault


def test_faults_of_tokens() -> None:
    tokens, cls = torch.ones(2, 4, 3), torch.ones(2, 3)
    assert fault_of(Targets({1: tokens}, {1: cls})) is None
    cls[1, 0] = float("inf")
    assert fault_of(Targets({1: tokens}, {1: cls})) == "the class tokens of block 1 are not finite"
    tokens[0, 0] = float("nan")
    assert fault_of(Targets({1: tokens}, {1: cls})) == "the patch tokens of block 1 are not finite"
