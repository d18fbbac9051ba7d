"""Attentive masks against the official program's and against torch.multinomial."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mimscale.errors import UserError
from mimscale.masking.attention import attentive_order
from mimscale.models.token_selection import gather_tokens
from mimscale.types import TeacherInfo
from tests import golden
from tests.masking.policies import attention_targets, batch, policy, teacher


def test_golden() -> None:
    g = golden.load("attentive_masking_dev")
    for case in g.config["cases"]:
        part, side = g.part(f"L{case['L']}_r{round(100 * case['mask_ratio'])}"), round(case["L"] ** 0.5)
        importance = part["cls_attention_per_head"][:, :, 1:].mean(1)
        torch.testing.assert_close(importance, part["importance"], rtol=1e-6, atol=0)
        everything = attentive_order(part["importance"], part["exponential_noise"])
        golden.equal(everything, part["attn_ids_shuffle"])
        masking = policy(16 * side, 16, teacher(side), policy="attention", ratio=case["mask_ratio"])
        visible = masking.choose(batch(part["exponential_noise"]), attention_targets(part["importance"])).visible
        assert torch.equal(visible, part["attn_ids_keep"])
        assert torch.equal(gather_tokens(part["tokens"], visible), part["attn_tokens_kept"])


@pytest.mark.parametrize("seed", range(5))
def test_the_draw_is_multinomial(seed: int) -> None:
    importance = torch.rand(7, 50, generator=torch.Generator().manual_seed(seed)).pow(3)
    theirs = torch.multinomial(importance, 20, generator=torch.Generator().manual_seed(seed + 100))
    noise = torch.empty(7, 50).exponential_(1, generator=torch.Generator().manual_seed(seed + 100))
    assert torch.equal(attentive_order(importance, noise)[:, :20], theirs)


def test_patches_without_importance_come_last() -> None:
    importance = torch.tensor([[0.0, 0.5, 0.0, 1e-20, 0.3]])
    noise = torch.tensor([[2.0, 1.0, 1.0, 3.0, 1.0]])
    assert attentive_order(importance, noise).tolist() == [[1, 4, 3, 2, 0]]
    assert attentive_order(torch.zeros(1, 5, dtype=torch.float16), noise).shape == (1, 5)


def test_importance_of_a_unit_is_the_sum_of_its_patches() -> None:
    masking = policy(64, 16, teacher(), policy="attention", unit=32, ratio=0.5)
    assert masking.needs.noise["mask"].kind == "exponential" and masking.needs.noise["mask"].shape == (4,)
    attention = torch.zeros(1, 16)
    attention[0, [10, 15]] = 0.4  # the last unit
    attention[0, 2], attention[0, 8], attention[0, 5] = 0.7, 0.6, 0.1
    masks = masking.choose(batch(torch.ones(1, 4)), attention_targets(attention))
    assert masks.visible.tolist() == [[10, 11, 14, 15, 2, 3, 6, 7]]
    assert masks.masked.tolist() == [[8, 9, 12, 13, 0, 1, 4, 5]]


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_attention_that_says_nothing_draws_uniformly(value: float) -> None:
    masking = policy(64, 16, teacher(), policy="attention", ratio=0.5)
    noise = torch.empty(3, 16).exponential_(generator=torch.Generator().manual_seed(0))
    masks = masking.choose(batch(noise), attention_targets(torch.full((3, 16), value)))
    assert torch.equal(masks.visible, noise.argsort(dim=1)[:, :8])


def test_whose_attention() -> None:
    blind, first, second = teacher(has_cls=False, name="blind"), teacher(name="first"), teacher(name="second")
    default = policy(64, 16, blind, first, second, policy="attention")
    assert list(default.needs.teachers) == ["first"] and default.needs.teachers["first"].cls_attention
    other = policy(64, 16, blind, first, second, policy="attention", teacher="second")
    assert list(other.needs.teachers) == ["second"]
    attention = torch.rand(1, 16)
    assert other.importance(batch(), attention_targets(attention, "second")) is attention


@pytest.mark.parametrize(
    ("teachers", "section", "fragment"),
    [
        ((), {}, "policy = attention needs CLS attention and no teacher has a class token; add one that has .CLIP, "),
        ((teacher(has_cls=False),), {}, "no teacher has a class token"),
        ((teacher(),), {"teacher": "clip"}, "method.masking.teacher = clip is not a teacher .*; choose one of t"),
        ((teacher(), teacher(has_cls=False, name="b")), {"teacher": "b"}, "choose one of t"),
        ((teacher(8),), {}, "8x8 grid at 128 px, the student 4x4; set teachers.t.image_size to 64"),
    ],
)
@pytest.mark.parametrize("name", ["attention", "topk"])
def test_refusals(teachers: tuple[TeacherInfo, ...], section: dict[str, Any], fragment: str, name: str) -> None:
    with pytest.raises(UserError, match=fragment.replace("attention needs", f"{name} needs")) as error:
        policy(64, 16, *teachers, policy=name, **section)
    assert "\n" not in str(error.value)
