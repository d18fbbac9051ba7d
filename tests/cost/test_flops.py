"""FLOPs per image against a table made by hand, against closed formulas, and against torch's own counter."""

from __future__ import annotations

import re
from importlib import resources
from typing import NamedTuple

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mimscale.config.recipe_table import header_of
from mimscale.config.recipes import load_recipe, recipe_names
from mimscale.cost.flops import COUNTED_IMAGES, Flops, flops_of, flops_of_shapes, flops_of_trace
from mimscale.cost.trace import Shapes, build, make_batch, trace

# GFLOP per image: encoder, decoder and heads, teacher, training. Made by hand from widths, depths and token counts.
TABLE = {
    "mae_vit_b16": (8.6, 10.7, 0.0, 58),
    "mae_vit_l16": (30.5, 10.8, 0.0, 124),
    "mae_vit_h14": (82.6, 14.3, 0.0, 291),
    "mff_vit_b16": (8.6, 11.1, 0.0, 59),
    "mff_vit_l16": (30.5, 11.4, 0.0, 126),
    "mff_vit_h14": (82.6, 15.5, 0.0, 294),
    "simmim_vit_b16": (35.1, 0.2, 0.0, 106),
    "simmim_vit_l16": (123.1, 0.3, 0.0, 370),
    "simmim_vit_h14": (334.6, 0.4, 0.0, 1005),
    "maskalign_vit_b16": (10.2, 0.3, 35.1, 67),
    "maskalign_vit_l16": (36.1, 0.6, 123.0, 233),
    "maskalign_vit_l16_clip_b16": (36.1, 0.5, 35.1, 145),
    "maskalign_vit_h14": (98.0, 1.0, 162.0, 459),
    "mrmae_vit_b16": (8.6, 10.7, 35.1, 93),
    "mrmae_vit_l16": (30.5, 10.8, 123.0, 247),
    "mrmae_vit_h14": (82.6, 14.3, 162.0, 453),
}
SAME_SHAPE = ("tiny", "demo", "batch", "ep")  # another schedule only, or not published
PUBLISHED = [name for name in recipe_names() if not any(part in name for part in SAME_SHAPE)]


def vit(width: int, depth: int, tokens: int) -> float:
    """FLOPs of a ViT's blocks: 12 D^2 multiply-adds per token, and the two products of attention."""
    return depth * (24.0 * width**2 * tokens + 4.0 * width * tokens**2)


@pytest.mark.parametrize("recipe", TABLE)
def test_flops_are_those_of_the_table(recipe: str) -> None:
    encoder, rest, teacher, training = TABLE[recipe]
    flops = flops_of(load_recipe(recipe))
    assert flops.forward["student"] / 1e9 == pytest.approx(encoder, rel=0.02)
    others = sum(flops.forward.values()) - flops.forward["student"]
    assert others / 1e9 == pytest.approx(rest, rel=0.02, abs=0.06)  # its last digit
    assert flops.teacher / 1e9 == pytest.approx(teacher, rel=0.02)
    assert flops.training / 1e9 == pytest.approx(training, rel=0.02)
    assert sum(flops.by_part().values()) == pytest.approx(flops.training)


def test_flops_are_those_of_closed_formulas() -> None:
    """MAE-L: 49 + 1 tokens in the encoder, 197 in the decoder."""
    flops = flops_of(load_recipe("mae_vit_l16"))
    encoder = vit(1024, 24, 50) + 2 * 49 * 768 * 1024
    decoder = vit(512, 8, 197) + 2 * 50 * 1024 * 512 + 2 * 196 * 512 * 768
    assert flops.forward["student"] == pytest.approx(encoder, rel=1e-6)
    assert flops.forward["decoder"] == pytest.approx(decoder, rel=1e-6)


def test_amt_has_a_warm_up_and_uncropped_images() -> None:
    """30 of 196 patches visible and 118 decoded after 41 of 400 epochs; before that it is MAE."""
    flops = flops_of(load_recipe("amt_mae_vit_b16"))
    shares = 41 / 400
    warm, learned = vit(768, 12, 50), vit(768, 12, 31)
    embed = 2 * 768 * 768 * (49 * shares + 30 * (1 - shares))
    assert flops.forward["student"] == pytest.approx(shares * warm + (1 - shares) * learned + embed, rel=1e-3)
    assert flops.uncropped == pytest.approx(vit(768, 12, 197) / 40, rel=0.03)


def count_by_torch(shapes: Shapes) -> tuple[float, float]:
    """(forward of the method, forward of the teachers) per image, by torch's counter on the modules themselves."""
    batch = make_batch(shapes.config, shapes.method.needs, 2)
    shapes.method.to(torch.bfloat16)
    with FlopCounterMode(display=False) as by_teachers:
        targets = {
            name: teacher.to("meta").to(torch.bfloat16)(
                teacher.preprocess(batch.images), shapes.method.needs.teachers[name]
            )
            for name, teacher in shapes.teachers.items()
        }
    with FlopCounterMode(display=False) as by_method:
        shapes.method(batch, targets)
    return by_method.get_total_flops() / 2, by_teachers.get_total_flops() / 2


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_flops_are_those_of_torchs_counter(recipe: str) -> None:
    shapes = build(load_recipe(recipe, ["engine.plain=all"]))
    flops: Flops = flops_of_trace(trace(shapes, COUNTED_IMAGES, "bf16"), 0.0)
    method, teachers = count_by_torch(shapes)
    assert sum(flops.forward.values()) == pytest.approx(method, rel=0.02)
    assert flops.teacher == pytest.approx(teachers, rel=0.02)
    stated = stated_gflop(recipe)
    counted = flops_of_shapes(shapes) if stated.amt else flops
    assert counted.training / 1e9 == pytest.approx(stated.gflop, rel=0.02), "the header says another cost"


class Stated(NamedTuple):
    """GFLOP per image in the header of a recipe, averaged over its epochs. amt: whether there is a warm-up."""

    gflop: float
    amt: bool


def stated_gflop(recipe: str) -> Stated:
    cost = header_of(resources.files("mimscale.recipes").joinpath(f"{recipe}.yaml").read_text()).cost
    found = re.search(r"([\d.]+) GFLOP per image(?: in the warm-up and ([\d.]+) after it, ([\d.]+) more)?", cost)
    assert found is not None, cost
    first, after, more = (float(number or 0) for number in found.groups())
    if not after:
        return Stated(first, "amt" in recipe)
    share = 41 / (load_recipe(recipe).schedule.epochs or 41)
    return Stated(share * first + (1 - share) * after + more, True)


def test_three_times_the_forward_pass_is_what_a_step_executes() -> None:
    shapes = build(load_recipe("mae_vit_b16"))
    traced = trace(shapes, COUNTED_IMAGES, "bf16")
    executed = (traced.phase("forward").flops + traced.phase("backward").flops) / COUNTED_IMAGES
    assert executed == pytest.approx(flops_of_trace(traced, 0.0).trained, rel=0.02)


def test_recomputation_stands_apart() -> None:
    plain = flops_of(load_recipe("mae_vit_b16"))
    every = flops_of(load_recipe("mae_vit_b16", ["engine.activation_checkpointing=1"]))
    assert plain.recompute == 0
    assert every.training == plain.training
    products = vit(768, 12, 50) + vit(512, 8, 197)
    last = 12 * 8 * 768**2 * 50 + 8 * 8 * 512**2 * 197  # no gradient needs the output of a block's last product
    assert every.recompute == pytest.approx(products - last, rel=0.02)
    assert every.executed == every.training + every.recompute
