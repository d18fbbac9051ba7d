"""The verb `plan`: what it prints can be submitted and read back, and it says what is wrong with a choice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mimscale.__main__ import main
from mimscale.config.deepspeed import load_ds_config
from mimscale.config.recipes import load_recipe
from mimscale.cost import report, simulate
from mimscale.cost.devices import DEVICES, GIB, INTERCONNECTS
from mimscale.cost.planner import Choice, Planner
from mimscale.cost.run_cost import IMAGENET
from mimscale.cost.step_time import EAGER_QUANTISED, held
from mimscale.distributed.micro_batch import solve_micro_batch


def planner(recipe: str, gpu: str = "h100", ranks: int = 8, link: str = "ib8x400", *overrides: str) -> Planner:
    config, _ = report.for_gpu(load_recipe(recipe, overrides), DEVICES[gpu])
    return Planner(config, DEVICES[gpu], INTERCONNECTS[link], ranks, 8)


def plan_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["plan", *words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize(
    ("recipe", "gpus", "gpu"),
    [("mae_vit_l16", 64, "h100"), ("maskalign_vit_b16", 16, "v100"), ("mff_vit_b16", 8, "a100-40")],
)
def test_what_is_printed_can_be_submitted(recipe: str, gpus: int, gpu: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The overrides are read back and give the batch that the plan names; the script exists."""
    found = plan_json(capsys, recipe, "--gpus", str(gpus), "--gpu", gpu)
    config = load_recipe(recipe, found["overrides"])
    choice = found["best"]["choice"]
    most = config.engine.max_micro_batch
    assert most != "auto"
    solved = solve_micro_batch(config.schedule.global_batch, gpus, most)
    assert solved == (choice["micro_batch"], choice["accumulation"])
    assert load_ds_config(config.engine.ds_config)
    options = [word for word in found["sbatch"] if word.startswith("--")]
    assert f"--nodes={gpus // 8}" in options and "--ntasks-per-node=8" in options and "--gpus-per-node=8" in options
    script = next(word for word in found["sbatch"] if word.endswith(".sbatch"))
    assert (Path(__file__).parents[2] / script).is_file()
    assert found["sbatch"][found["sbatch"].index(script) + 1 :] == found["overrides"]
    assert found["best"]["fits"] and found["best"]["memory_total"] <= found["best"]["room"]
    assert ("fp16" in config.engine.ds_config) == (gpu == "v100")
    if gpu == "v100":
        assert config.teachers["clip"].precision == "fp16" and "lacks a precision" in found["notes"][0]


def test_the_table_has_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "maskalign_vit_b16", "--gpus", "256", "--gpu", "h100"]) == 0
    printed = capsys.readouterr().out
    parts = (
        "teacher clip",
        "activations",
        "optimiser",
        "buckets",
        "at ZeRO stage",
        "host's floor",
        "hidden",
        "GPU-hours",
    )
    for part in (*parts, "CPU cores", "checkpoint", "why: ", "sbatch ", "images/s"):
        assert part in printed, part
    assert "256 ranks leave 4 images per GPU of the global batch 1024" in printed


def test_a_frozen_encoder_computes_in_its_own_precision_and_takes_whole_groups() -> None:
    own = planner("mae_vit_b16_linear", "a100", 8, "ib8x200")
    wide = planner("mae_vit_b16_linear", "a100", 8, "ib8x200", "method.encoder_precision=fp32")
    half, full = (one.predict(one.asked()) for one in (own, wide))
    rates = own.gpu.products("bf16") / own.gpu.products("fp32")
    assert full.time.products / half.time.products == pytest.approx(rates)
    assert half.memory.moment == "forward pass" and half.memory.total < full.memory.total
    gpu = replace(own.gpu, memory=0.7 * GIB, reserved=0.0)
    tight = own.like(own.config, gpu, own.link, 8).best()
    assert tight is not None and tight.fits and tight.choice.micro_batch * 8 % 512 == 0


def test_rand_augment_takes_cores() -> None:
    with_it, without = (
        report.make_plan(planner("finetune_mae_vit_b16", "h100", 8, "ib8x400", *words), IMAGENET, True)
        for words in ((), ("data.rand_augment=null",))
    )
    assert with_it.cost.cores == pytest.approx(1.67 * without.cost.cores)
    rows = [dict(report.cost_rows(plan))["data"] for plan in (with_it, without)]
    assert "decode and augment them" in rows[0] and "augment" not in rows[1]


def test_a_choice_that_does_not_fit_has_a_smallest_change() -> None:
    own = planner("simmim_vit_b16", "a100-40", 1, "ib8x200", "engine.max_micro_batch=1024")
    plan = report.make_plan(own, IMAGENET, True)
    assert not plan.asked.fits and plan.change is not None and plan.change.fits
    [note] = report.notes(plan, "mae_vit_l16")
    assert "needs" in note and "engine.max_micro_batch=512" in note
    assert own.memory(plan.change.choice).total <= own.room


def test_nothing_that_fits_is_said() -> None:
    gpu = replace(DEVICES["a100"], memory=1.2 * GIB, reserved=GIB)
    small = Planner(load_recipe("mae_vit_b16"), gpu, INTERCONNECTS["eth1x100"], 8, 8)
    plan = report.make_plan(small, IMAGENET, True)
    assert plan.best is None
    assert "nothing tried fits" in report.notes(plan, "mae_vit_l16")[0]


def test_recomputation_and_a_split_come_only_where_they_are_needed() -> None:
    roomy = planner("mae_vit_b16").best()
    assert roomy is not None and roomy.zero.stage == 2 and not roomy.choice.recompute_every
    gpu = replace(DEVICES["h100"], memory=1.2 * GIB, reserved=0.0)
    small = Planner(load_recipe("mae_vit_b16"), gpu, INTERCONNECTS["ib8x400"], 8, 8)
    tight = small.best()
    assert tight is not None and tight.fits and tight.choice.recompute_every


def test_more_images_take_longer_and_less_per_image() -> None:
    """The host's floor is shared by more images, so that the rate rises."""
    own = planner("mae_vit_b16", ranks=1)
    small, large = (own.predict(Choice("zero2_bf16", n, 1, 0)) for n in (16, 256))
    assert small.time.total <= large.time.total < 16 * small.time.total
    assert small.time.limit == "host"
    assert small.time.gpu < large.time.gpu / 10


def test_accumulation_repeats_all_but_the_update() -> None:
    own = planner("mae_vit_b16", ranks=1)
    one, four = (own.predict(Choice("zero2_bf16", 64, n, 0)).time for n in (1, 4))
    assert four.products == pytest.approx(4 * one.products)
    assert four.update == one.update
    assert one.total < four.total < 4 * one.total


def test_an_eager_8_bit_teacher_is_slower_and_a_compiled_one_faster() -> None:
    def teachers(*overrides: str) -> float:
        own = planner("maskalign_vit_b16", "h100", 1, "ib8x400", *overrides)
        found = own.predict(own.asked())
        return found.time.teachers / found.choice.accumulation

    plain = teachers()
    assert teachers("teachers.clip.precision=fp8", "teachers.clip.compile=false") == pytest.approx(
        EAGER_QUANTISED * plain
    )
    assert teachers("teachers.clip.precision=fp8", "teachers.clip.compile=true") < 0.8 * plain


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mae_vit_l16", "--gpus", "0"], "--gpus 0"),
        (["mae_vit_l16", "--gpus", "12"], "not a multiple of --gpus-per-node 8"),
        (["mae_vit_l16", "--gpu", "h1000"], "did you mean 'h100'"),
        (["mae_vit_l16", "--interconnect", "tin"], "--interconnect tin is unknown"),
        (["mae_vit_l99"], "recipe 'mae_vit_l99' is unknown"),
        (["mae_vit_l16", "schedule.global_batch=4095"], "does not divide over 8 ranks"),
        (["mae_vit_l16", "--samples", "0"], "--samples 0"),
        (["mae_vit_l16", "--measured", "/nowhere.json"], "cannot be read"),
        (["mae_vit_l16", "--samples", "9" * 5000], "in at most 15 digits"),
        (["mae_vit_l16", "--simulate", "8,x"], "--simulate x must be a whole number"),
        (["mae_vit_l16", "--simulate", "8,0"], "--simulate 0 must be a whole number"),
        (["mae_vit_l16", "--simulate", "1,6,12"], "--simulate 12 is not a multiple of --gpus-per-node 8"),
        (["mae_vit_l16", "--plot", "x.svg"], "add --simulate"),
        ([], "plan needs a recipe"),
    ],
)
def test_bad_input_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and len(printed.err.strip().splitlines()) == 1 and not printed.out


def test_a_simulation_of_many_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["mae_vit_b16", "--gpu", "h100", "--simulate", "8,64,512", "--json", "--plot", str(tmp_path / "s.svg")]
    assert main(["plan", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    for kind in ("strong", "weak"):
        assert [one["ranks"] for one in found[kind]] == [8, 64, 512]
        assert all(one["positions"] and one["files"] == one["ranks"] + 2 for one in found[kind])
        assert all(one["uneven"] < 1.01 for one in found[kind])
    assert [one["images"] for one in found["strong"]] == [512, 64, 8]
    assert [one["images"] for one in found["weak"]] == [512] * 3
    strong, weak = ([one["images_per_s"] for one in found[kind]] for kind in ("strong", "weak"))
    assert strong[0] == weak[0] and strong[2] < weak[2] < 64 * weak[0]
    assert "<svg" in (tmp_path / "s.svg").read_text()


def test_a_dollar_in_the_name_of_a_recipe_begins_no_formula(tmp_path: Path) -> None:
    recipe = tmp_path / "a$_{$.yaml"
    recipe.write_text("extends: mae_vit_b16\n")
    words = [str(recipe), "--gpu", "h100", "--simulate", "8,64", "--plot", str(tmp_path / "s.svg")]
    assert main(["plan", *words]) == 0
    assert "<svg" in (tmp_path / "s.svg").read_text()


def test_a_simulation_has_the_nodes_that_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    """Four GPUs on each: twice the nodes read at the start, and 4 GPUs of 8 already share a network."""
    found = plan_json(capsys, "mae_tiny", "--simulate", "4,8", "--gpus-per-node", "4", "--gpus", "2")
    one, two = found["strong"]
    assert one["start_bytes"] == 4 * one["start_bytes_node"] and one["prediction"]["crossing"] == 0
    assert two["start_bytes"] == 4 * two["start_bytes_node"] and two["prediction"]["crossing"] > 0


def test_every_position_is_of_one_rank() -> None:
    assert simulate.covers(48, 6)


def test_flat_parameters_are_fewer_and_as_large() -> None:
    own = planner("mae_vit_b16")
    assert sum(held(own.shapes, 0).sizes) == sum(own.shapes.parameters.values())
