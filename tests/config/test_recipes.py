"""Every recipe loads, says what it should reach and cost, and builds the published model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml

from mimscale.config import recipe_table
from mimscale.config.deepspeed import load_ds_config
from mimscale.config.extends import merged
from mimscale.config.recipes import load_recipe, read_recipe, recipe_names, validate
from mimscale.config.run import RunConfig, method_class
from mimscale.distributed.micro_batch import solve_micro_batch
from mimscale.methods.base import Method
from mimscale.methods.mae import MAE, MAEConfig
from mimscale.optim.lr_schedule import lr_at_step
from mimscale.teachers.ensemble import build_skeletons, describe
from mimscale.types import Noise, TeacherInfo, TeacherNeeds

CLIP_B = TeacherInfo("clip", dim=768, depth=12, grid=(14, 14), image_size=224, has_cls=True)
CLIP_L_196 = TeacherInfo("clip", dim=1024, depth=24, grid=(14, 14), image_size=196, has_cls=True)
CLIP_L_224 = TeacherInfo("clip", dim=1024, depth=24, grid=(16, 16), image_size=224, has_cls=True)

MAE_MILLIONS = {"mae_vit_b16": 111.9, "mae_vit_l16": 329.5, "mae_vit_h14": 657.1}  # the official models
MASKALIGN = {
    "maskalign_vit_b16": (CLIP_B, "vit_base_patch16_224"),
    "maskalign_amt_vit_b16": (CLIP_B, "vit_base_patch16_224"),
    "maskalign_vit_l16": (CLIP_L_196, "vit_large_patch16_224"),
    "maskalign_vit_l16_clip_b16": (CLIP_B, "vit_large_patch16_224"),
    "maskalign_vit_h14": (CLIP_L_224, "vit_huge_patch14_224"),
    "maskalign_vit_h16": (CLIP_L_196, "vit_huge_patch14_224"),
}


def text_of(name: str) -> str:
    return resources.files("mimscale.recipes").joinpath(f"{name}.yaml").read_text()


def own_values(name: str) -> dict[str, Any]:
    """What stands in the recipe's own file."""
    values: dict[str, Any] = yaml.safe_load(text_of(name))
    return values


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_loads_and_has_a_header(name: str) -> None:
    run = load_recipe(name)
    load_ds_config(run.engine.ds_config)
    first = next(iter(own_values(name)))
    assert first in ("extends", "data")
    header = text_of(name)[: text_of(name).index(f"\n{first}:")]
    assert all(line.startswith("#") for line in header.splitlines())
    assert all(recipe_table.header_of(header)[:4])


@pytest.mark.parametrize("name", recipe_names())
def test_the_method_takes_it(name: str) -> None:
    """Grids, depths and units fit, with the teachers as they really are; and the networks can be built."""
    run = load_recipe(name)
    teachers = describe(build_skeletons(run.teachers, run.data.image_size))
    built(name, teachers)


def leaves(values: dict[str, Any], place: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*place, key))
        else:
            yield (*place, key)


def without(values: dict[str, Any], leaf: tuple[str, ...]) -> dict[str, Any]:
    key, *rest = leaf
    if not rest:
        return {name: value for name, value in values.items() if name != key}
    return {**values, key: without(values[key], tuple(rest))}


EXTENDING = [name for name in recipe_names() if "extends" in own_values(name)]


@pytest.mark.parametrize("name", EXTENDING)
def test_it_says_only_what_differs_from_its_base(name: str) -> None:
    own = own_values(name)
    base = read_recipe(own.pop("extends"))[0]
    needless = [".".join(leaf) for leaf in leaves(own) if merged(base, without(own, leaf)) == merged(base, own)]
    assert not needless


def what_is_trained(run: RunConfig) -> dict[str, Any]:
    """All values but those that say what the run should reach, and what it reports."""
    return {key: value for key, value in run.dump().items() if key not in ("expected", "log")}


def test_values_that_must_not_change() -> None:
    """Recipes that runs were started from, written out whole: a run goes on only with the values that it began with.

    Changed twice: the published MFF and PixMIM recipes (and pixmim_attention_vit_b16, which extends one) had MAE's
    warm-up in place of OpenMMLab's, which reaches the peak one step earlier and starts at 1e-9 or 1e-4 of it. And the
    recipes of fine-tuning lacked mixup, CutMix, RandAugment and random erasing; a run that began so goes on with
    method.mixup=0 method.cutmix=0 data.rand_augment=null data.random_erasing=0.
    """
    whole = json.loads((Path(__file__).parent / "whole_recipes.json").read_text())
    assert len(whole) == 50
    for name, values in whole.items():
        wanted = what_is_trained(validate(values, name))
        assert what_is_trained(load_recipe(name)) == wanted, name
        assert list(load_recipe(name).teachers) == list(wanted["teachers"]), name


PUBLISHED = [n for n in recipe_names() if not n.startswith("demo_") and not n.endswith("_tiny")]


@pytest.mark.parametrize("name", PUBLISHED)
def test_batch_divides_over_8_to_512_gpus(name: str) -> None:
    run = load_recipe(name)
    most = run.engine.max_micro_batch
    assert isinstance(most, int)
    for world in (8, 64, 256, 512):
        micro, accumulation = solve_micro_batch(run.schedule.global_batch, world, most)
        assert micro * accumulation * world == run.schedule.global_batch and micro <= most


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_cost_is_the_arithmetic_that_it_names(name: str) -> None:
    """GFLOP per image over the epochs of 1,281,167 images, at 40 % of an A100's 312 TFLOP/s. That plan counts as many
    is tests/cost/test_flops.py's.
    """
    run, cost = load_recipe(name), recipe_table.header_of(text_of(name)).cost
    hours, epochs = recipe_table.header_of(text_of(name)).a100_hours, run.schedule.epochs
    found = re.search(r"([\d.]+) GFLOP per\s+image(?: in the warm-up and ([\d.]+) after it, ([\d.]+) more)?", cost)
    assert hours is not None and epochs is not None and found is not None, cost
    assert "A100-hours, by the FLOPs of `mimscale plan`: " in cost
    first, after, more = (float(number or 0) for number in found.groups())
    warmup = 41 if after else epochs
    gflop = first * warmup + after * (epochs - warmup) + more * epochs
    assert hours == pytest.approx(gflop * 1e9 * 1_281_167 / (0.4 * 312e12) / 3600, rel=0.03)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_result_that_nobody_published_is_of_a_recipe_of_ours(name: str) -> None:
    header = recipe_table.header_of(text_of(name))
    if header.result.startswith("not known"):
        assert header.source.startswith("ours")


def test_every_method_has_a_large_and_a_huge_recipe() -> None:
    """AMT too, on both methods that it was published for. A method with a tiny recipe only is left alone."""
    widths: dict[str, set[int]] = {}
    for run in map(load_recipe, PUBLISHED):
        masking = getattr(run.method, "masking", None)
        amt = masking is not None and masking.policy == "amt"
        widths.setdefault(f"amt on {run.method.name}" if amt else run.method.name, set()).add(run.student.width)
    published = ("mae", "maskalign", "mff", "pixmim", "simmim", "convmae", "mrmae", "finetune")
    for name in (*published, "amt on mae", "amt on simmim"):
        assert {1024, 1280} <= widths[name], name


LARGE_BATCH = {"engine.max_micro_batch": 128, "engine.ds_config": "zero2_bf16"}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {  # recipe -> (the one that it follows, the only differences)
    "mae_vit_b16_1600ep": ("mae_vit_b16", {"schedule.epochs": 1600}),
    "mae_vit_l16_1600ep": ("mae_vit_l16", {"schedule.epochs": 1600}),
    "mae_vit_h14_1600ep": ("mae_vit_h14", {"schedule.epochs": 1600}),
    "mae_vit_b16_batch1024": ("mae_vit_b16", {"schedule.global_batch": 1024}),
    "mae_vit_l16_batch1024": ("mae_vit_l16", {"schedule.global_batch": 1024}),
    "mff_vit_b16_300ep": ("mff_vit_b16", {"schedule.epochs": 300, "schedule.warmup_start_factor": 1e-4}),
    "pixmim_vit_b16_300ep": ("pixmim_vit_b16", {"schedule.epochs": 300, "schedule.warmup_start_factor": 1e-4}),
    **{
        f"mae_vit_{size}_batch8192": (
            f"mae_vit_{size}",
            {"schedule.global_batch": 8192, "schedule.base_lr": 1.061e-4, "schedule.warmup_epochs": 80, **LARGE_BATCH},
        )
        for size in ("l16", "h14")
    },
    **{
        f"{method}_vit_{size}_batch{batch}": (
            f"{method}_vit_{size}",
            {
                "schedule.global_batch": batch,
                "schedule.base_lr": lr,
                "schedule.warmup_epochs": 40,
                **LARGE_BATCH,
                **clip,
            },
        )
        for method, batch, lr in (("maskalign", 4096, 7.5e-5), ("maskalign", 8192, 5.303e-5), ("mrmae", 4096, 7.5e-5))
        for size, clip in (("l16", {}), ("h14", {"teachers.clip.precision": "bf16"}))
    },
    "convmae_b_200ep": ("convmae_b", {"schedule.epochs": 200}),
    "mrmae_convmae_b_200ep": ("mrmae_convmae_b", {"schedule.epochs": 200}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_differs_in_nothing_else(name: str) -> None:
    base, changes = VARIANTS[name]
    changed = load_recipe(base, [f"{key}={value}" for key, value in changes.items()])
    assert what_is_trained(load_recipe(name)) == what_is_trained(changed)


def built(name: str, teachers: dict[str, TeacherInfo]) -> tuple[RunConfig, Method, int]:
    """The recipe, its method without memory, and how many numbers its state holds."""
    run = load_recipe(name)
    with torch.device("meta"):
        method = method_class(run.method.name)(run, teachers)
    return run, method, sum(tensor.numel() for tensor in method.state_dict().values())


@pytest.mark.parametrize("name", MAE_MILLIONS)
def test_mae(name: str) -> None:
    run, _, count = built(name, {})
    assert count / 1e6 == pytest.approx(MAE_MILLIONS[name], abs=0.05)
    assert run.schedule.peak_lr == pytest.approx(2.4e-3)


RELATIVES = {"mff_vit_b16": 6, "mff_vit_l16": 6, "mff_vit_h14": 6, "mff_vit_s16": 4}  # and their levels
RELATIVES |= {"pixmim_vit_b16": 1, "pixmim_vit_l16": 1, "pixmim_vit_h14": 1}


@pytest.mark.parametrize(("name", "levels"), RELATIVES.items())
def test_relatives_of_mae(name: str, levels: int) -> None:
    """MAE's size, and for each level but the last a linear layer; one logit per level."""
    run, method, count = built(name, {})
    values = run.method.model_dump() | {"name": "mae"}
    with torch.device("meta"):
        kept = {key: values[key] for key in MAEConfig.model_fields if key != "fusion"}
        mae = MAE(run.model_copy(update={"method": MAEConfig(**kept)}), {})
    width = run.student.width
    fusion = (levels - 1) * (width * width + width) + levels if levels > 1 else 0
    assert count == sum(tensor.numel() for tensor in mae.state_dict().values()) + fusion
    assert run.schedule.peak_lr == pytest.approx(2.4e-3)
    assert (run.data.crop, run.data.interpolation) == ("padded", "bilinear")
    assert method.no_weight_decay() == {"student.cls_token", "decoder.mask_token"}


@pytest.mark.parametrize(
    ("name", "teachers", "trained"),
    [
        ("convmae_b", {}, 114.79),  # the official model
        ("mrmae_vit_b16", {"clip": CLIP_B}, 111.66 + 0.59),  # MAE's and the head
        ("mrmae_mff_vit_b16", {"clip": CLIP_B}, 111.66 + 0.59 + 5 * 0.59),  # and MFF's projections
        ("mrmae_convmae_b", {"clip": CLIP_B}, 114.79 + 0.59),
        ("mrmae_vit_l16", {"clip": CLIP_L_196}, 329.24 + 1.05),
        ("mrmae_vit_h14", {"clip": CLIP_L_224}, 656.61 + 1.31),
    ],
)
def test_convmae_and_mrmae(name: str, teachers: dict[str, TeacherInfo], trained: float) -> None:
    run, method, _ = built(name, teachers)
    assert sum(p.numel() for p in method.parameters()) / 1e6 == pytest.approx(trained, abs=0.01)
    assert run.teachers.keys() == method.needs.teachers.keys()
    assert run.schedule.peak_lr == pytest.approx(1.5e-4 * run.schedule.global_batch / 256)


@pytest.mark.parametrize("name", MASKALIGN)
def test_maskalign(name: str) -> None:
    """timm's ViT without its last norm, five linear adaptors and the mixing rows of five levels."""
    info, timm_name = MASKALIGN[name]
    run, method, count = built(name, {"clip": info})
    with torch.device("meta"):
        reference = timm.create_model(timm_name, num_classes=0, patch_size=run.student.patch)
    width, depth = run.student.width, run.student.depth
    vit = sum(p.numel() for p in reference.parameters()) - 2 * width
    assert count == vit + 5 * (width * info.dim + info.dim) + 5 * depth
    assert run.schedule.peak_lr == pytest.approx(6e-4)
    assert run.teachers.keys() == method.needs.teachers.keys()


def test_maskalign_with_two_teachers() -> None:
    """The real teachers' grids meet the student's; a second mixing and five more adaptors, nothing else."""
    run = load_recipe("maskalign_clip_dinov2_vit_b16")
    teachers = describe(build_skeletons(run.teachers, run.data.image_size))
    _, method, count = built("maskalign_clip_dinov2_vit_b16", teachers)
    assert count == built("maskalign_vit_b16", {"clip": CLIP_B})[2] + 5 * (768 * 768 + 768) + 5 * 12
    assert {name: (info.grid, info.image_size) for name, info in teachers.items()} == {
        "clip": ((14, 14), 224),
        "dinov2": ((14, 14), 196),
    }
    assert [name for name, needs in method.needs.teachers.items() if needs.cls_attention] == ["clip"]


SIMMIM = {  # recipe -> (timm's arguments, units of the mask)
    "simmim_vit_b16": ({}, 49),
    "simmim_vit_l16": ({"embed_dim": 1024, "depth": 24, "num_heads": 16}, 49),
    "simmim_vit_h14": ({"embed_dim": 1280, "depth": 32, "num_heads": 16, "patch_size": 14}, 64),
}


@pytest.mark.parametrize("name", SIMMIM)
def test_simmim(name: str) -> None:
    """timm's BEiT with one shared bias table, a mask token and a linear head; the released rates."""
    run, method, count = built(name, {})
    shape, units = SIMMIM[name]
    options: dict[str, Any] = {
        "use_abs_pos_emb": False,
        "use_shared_rel_pos_bias": True,
        "init_values": 0.1,
        "global_pool": "token",
        **shape,
    }
    with torch.device("meta"):
        reference = timm.models.beit.Beit(num_classes=0, **options)
    width, pixels = run.student.width, 3 * run.student.patch**2
    assert count == sum(p.numel() for p in reference.parameters()) + width + (width * pixels + pixels)
    wanted = {"mask": (units,), "drop_path": (run.student.depth, 2)}
    assert {noise: needed.shape for noise, needed in method.needs.noise.items()} == wanted
    steps = 1_281_167 // 2048
    rates = [lr_at_step(run.schedule, step, steps, 800 * steps) for step in (0, 1, 10 * steps + 1, 700 * steps + 1)]
    assert rates == pytest.approx([2e-6, 2e-6, 4e-4, 4e-5])


FINETUNED = {  # recipe -> (timm's network, peak rate, layer decay)
    "finetune_mae_vit_b16": ("vit_base_patch16_224", 2e-3, 0.65),
    "finetune_mff_vit_b16": ("vit_base_patch16_224", 2e-3, 0.65),
    "finetune_amt_mae_vit_b16": ("vit_base_patch16_224", 4e-3, 0.75),
    "finetune_mae_vit_l16": ("vit_large_patch16_224", 4e-3, 0.75),
    "finetune_mae_vit_h14": ("vit_huge_patch14_224", 4e-3, 0.75),
    "finetune_maskalign_vit_b16": ("vit_base_patch16_224", 1.2e-3, 0.55),
    "finetune_maskalign_vit_l16": ("vit_large_patch16_224", 1.2e-3, 0.75),
    "finetune_maskalign_vit_h14": ("vit_huge_patch14_224", 1.2e-3, 0.75),
}


@pytest.mark.parametrize("name", FINETUNED)
def test_finetuning(name: str) -> None:
    timm_name, peak, layer_decay = FINETUNED[name]
    run, method, count = built(name, {})
    with torch.device("meta"):
        reference = timm.create_model(timm_name, global_pool="avg", num_classes=1000)
    assert count == sum(p.numel() for p in reference.parameters())
    assert (run.schedule.peak_lr, run.optim.layer_decay) == (pytest.approx(peak), layer_decay)
    assert {method.layer_of(parameter) for parameter, _ in method.named_parameters()} == set(
        range(run.student.depth + 2)
    )


def test_finetuning_of_simmim() -> None:
    """timm's BEiT-B with a table of relative positions in each block; the released rates."""
    run, method, count = built("finetune_simmim_vit_b16", {})
    options: dict[str, Any] = {"use_abs_pos_emb": False, "use_rel_pos_bias": True, "init_values": 0.1}
    with torch.device("meta"):
        reference = timm.models.beit.Beit(num_classes=1000, global_pool="avg", **options)
    assert count == sum(p.numel() for p in reference.parameters())
    assert (run.schedule.peak_lr, run.optim.layer_decay) == (pytest.approx(5e-3), 0.65)
    assert {method.layer_of(name) for name, _ in method.named_parameters()} == set(range(14))


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith("finetune_")])
def test_finetuning_augments_as_the_releases_do(name: str) -> None:
    """All of them with one set of values, from the commands that their authors give."""
    run = load_recipe(name)
    config: Any = run.method
    assert (config.mixup, config.cutmix, config.label_smoothing) == (0.8, 1.0, 0.1)
    assert (run.data.rand_augment, run.data.random_erasing) == ("rand-m9-mstd0.5-inc1", 0.25)
    assert (run.data.crop_scale, run.data.eval_crop_pct) == ((0.08, 1.0), 0.875)
    mixing = built(name, {})[1].needs.mixing
    assert mixing is not None and (mixing.classes, mixing.smoothing) == (1000, 0.1)


def test_finetuning_of_amt_on_simmim() -> None:
    """The class token of a network with learned positions."""
    run, method, _ = built("finetune_amt_simmim_vit_b16", {})
    names = {name for name, _ in method.named_parameters()}
    assert "student.pos_embed" in names and "student.norm.weight" in names and "fc_norm.weight" not in names
    assert run.schedule.peak_lr == pytest.approx(5e-3)


def test_finetuning_of_convmae() -> None:
    """The official encoder without its fusion, and the head."""
    run, method, _ = built("finetune_convmae_b", {})
    assert run.schedule.peak_lr == pytest.approx(2e-3)
    assert run.method.stages == load_recipe("convmae_b").method.stages  # type: ignore[attr-defined]
    pretrained = built("convmae_b", {})[1]
    encoder = {n for n, _ in pretrained.student.named_parameters() if not n.startswith(("norm", "stage"))}
    assert encoder <= {n for n, _ in method.student.named_parameters()}


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith("finetune_")])
def test_finetuning_starts_from_a_recipe_of_this_package(name: str) -> None:
    start = load_recipe(name).init
    assert start is not None and start.weights.parent.name == "runs" and start.weights.name in PUBLISHED
    pretraining = load_recipe(start.weights.name)
    assert pretraining.student.model_dump(exclude={"drop_path"}) == load_recipe(name).student.model_dump(
        exclude={"drop_path"}
    )


def test_pixmim_with_attentive_masks() -> None:
    """PixMIM's network; the teacher chooses patches and nothing else of it is read."""
    dino = replace(CLIP_B, name="dino")
    run, method, count = built("pixmim_attention_vit_b16", {"dino": dino})
    assert count == built("pixmim_vit_b16", {})[2]
    assert method.needs.teachers == {"dino": TeacherNeeds(cls_attention=True)} and run.teachers.keys() == {"dino"}
    assert method.needs.noise["mask"] == Noise("exponential", (196,))
