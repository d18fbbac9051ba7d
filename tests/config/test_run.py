"""Recipes: what is accepted, and the one line that everything else gets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mimscale.config import deepspeed
from mimscale.config.recipes import load_recipe, validate
from mimscale.errors import UserError
from mimscale.distributed.micro_batch import solve_micro_batch
from tests import ranks


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return ranks.recipe(tmp_path, tmp_path / "shards")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("engine.max_microbatch=8", "unknown key engine.max_microbatch; did you mean 'max_micro_batch'?"),
        ("enginee.device=cpu", "unknown key enginee; did you mean 'engine'?"),
        ("method.norm_pix_los=false", "unknown key method.norm_pix_los; did you mean 'norm_pix_loss'?"),
        ("method.masking.ration=0.5", "unknown key method.masking.ration; did you mean 'ratio'?"),
        ("method.masking.policy=atention", "method.masking.policy = 'atention' is unknown; did you mean 'attention'?"),
        ("method.masking.ratio=1.5", "method.masking.ratio = 1.5: input should be less than 1"),
        ("method.masking=attention", "method.masking = 'attention': must be a section, such as {policy: attention}"),
        ("method.name=mea", "method.name = 'mea' is unknown; did you mean 'mae'?"),
        ("schedule.global_batch=many", "schedule.global_batch = 'many': input should be a valid integer"),
        ("schedule.global_batch=0", "schedule.global_batch = 0: input should be greater than or equal to 1"),
        ("schedule.epochs=3", "schedule: needs exactly one of epochs and steps; set the other to null"),
        ("optim.betas=[0.9,1.5]", "optim.betas.1 = 1.5: input should be less than 1"),
        ("optim.name=adamm", "optim.name = 'adamm' is unknown; did you mean 'adamw'?"),
        ("optim.momentum=0.9", "unknown key optim.momentum"),
        ("optim={name: sgd, momentum: 1.0}", "optim.momentum = 1.0: input should be less than 1"),
        ("optim=sgd", "optim = 'sgd': input should be a valid dictionary or instance of OptimConfig"),
        ("ema.decay=1.0", "ema.decay = 1.0: input should be less than 1"),
        ("ema.decai=0.9", "unknown key ema.decai; did you mean 'decay'?"),
        ("engine.backend=tourch", "engine.backend = 'tourch': input should be 'deepspeed' or 'torch'"),
        ("data.image_size=36", "data.image_size = 36 is not a multiple of student.patch = 8"),
        ("data.crop_scale=[0.5,0.2]", "crop_scale = [0.5, 0.2]: must be ascending"),
        ("data.crop_padding=32", "crop_padding = 32: must be below image_size = 32"),
        ("data.crop=pad", "data.crop = 'pad': input should be 'random_resized' or 'padded'"),
        ("student.heads=5", "width = 32 must be divisible by heads = 5"),
        ("student.drop_path=1.0", "student.drop_path = 1.0: input should be less than 1"),
        ("teachers.a.library=tim", "teachers.a.library = 'tim': input should be 'timm' or 'open_clip'"),
        ("engine", "override 'engine' is not of the form section.key=value"),
        ("seed.x=1", "override seed.x: seed is a value, not a section"),
    ],
)
def test_one_line(recipe: Path, override: str, line: str) -> None:
    if override.startswith("seed.x"):
        recipe.write_text(recipe.read_text() + "seed: 3\n")
    with pytest.raises(UserError) as error:
        load_recipe(str(recipe), [override])
    assert line in str(error.value) and "\n" not in str(error.value)


def test_unreadable_recipes(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    for text, line in (("a: [1", "is not YAML"), ("- 1", "must be a mapping of sections, found list")):
        bad.write_text(text)
        with pytest.raises(UserError, match=line):
            load_recipe(str(bad))
    with pytest.raises(UserError, match="No such file"):
        load_recipe(str(tmp_path / "none.yaml"))
    with pytest.raises(UserError, match="did you mean 'mae_vit_b16'"):
        load_recipe("mae_vit_b61")


def test_overrides_and_round_trip(recipe: Path, tmp_path: Path) -> None:
    run = load_recipe(str(recipe), ["schedule.base_lr=1e-3"])
    assert run.schedule.base_lr == 1e-3 and run.schedule.peak_lr == pytest.approx(1e-3 * 16 / 256)
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(yaml.safe_dump(run.dump()))
    assert load_recipe(str(dumped)) == run


def test_what_may_change_at_a_resume(recipe: Path) -> None:
    run = load_recipe(str(recipe))
    free = [
        "engine.ds_config=zero3_bf16",
        "engine.backend=torch",
        "data.workers=3",
        "log.every=9",
        "checkpoint.every=1",
        "data.shards=/other",
    ]
    assert load_recipe(str(recipe), free).shaping() == run.shaping()
    for override in ("seed=1", "data.image_size=64", "method.masking.ratio=0.5", "schedule.steps=13", "optim.clip=1",
                     "optim={name: sgd}", "ema.decay=0.99"):  # fmt: skip
        assert load_recipe(str(recipe), [override]).shaping() != run.shaping(), override
    values = load_recipe("maskalign_clip_dinov2_vit_b16").dump()
    reordered = {**values, "teachers": dict(reversed(values["teachers"].items()))}  # masks follow the first
    assert validate(reordered, "test").shaping() != validate(values, "test").shaping()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"train_batch_size": 8}, "'train_batch_size' is owned by the recipe; remove it there and set schedule.gl"),
        ({"gradient_clipping": 1.0}, "'gradient_clipping' is owned by the recipe; remove it there and set optim.clip"),
        ({"zero_allow_untested_optimizer": True}, "'zero_allow_untested_optimizer' is owned by the recipe; remove it"),
        ({"gradient_cliping": 1.0}, "unknown top-level key 'gradient_cliping'"),
        ({"zero_optimisation": {}}, "unknown top-level key 'zero_optimisation'; did you mean 'zero_optimization'?"),
        ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, "round_robin_gradients breaks"),
        ({"zero_optimization": {"stage": 3}}, "memory_efficient_linear"),
        (
            {"zero_optimization": {"stage": 2}, "bf16": {"check_grad_overflow": False}},
            "bf16.check_grad_overflow would switch off",
        ),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {}}}, "zero_optimization.offload_optimizer would"),
        ({"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}}, "stage 0 in 16 bit"),
        (
            {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
            "in bf16 with data_types.grad_accum_dtype = fp32 DeepSpeed's optimizer for ZeRO stage 1 lets",
        ),
    ],
)
def test_deepspeed_files(tmp_path: Path, change: dict[str, object], line: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(change))
    with pytest.raises(UserError) as error:
        deepspeed.load_ds_config(str(path))
    assert line in str(error.value)


def test_shipped_deepspeed_files() -> None:
    names = deepspeed.ds_config_names()
    assert {f"zero{s}_{p}" for s in (2, 3) for p in ("fp16", "bf16")} <= set(names)
    for name in names:
        values = deepspeed.load_ds_config(name)
        assert deepspeed.precision_of(values) == name.rsplit("_", 1)[1]
        assert f"zero{values['zero_optimization']['stage']}" in name


@given(st.integers(1, 5000), st.integers(1, 600), st.integers(1, 300))
def test_batch_arithmetic(global_batch: int, world: int, most: int) -> None:
    if global_batch % world:
        with pytest.raises(UserError, match="does not divide over"):
            solve_micro_batch(global_batch, world, most)
        return
    micro, accumulation = solve_micro_batch(global_batch, world, most)
    assert micro * accumulation * world == global_batch and 1 <= micro <= most
    assert not any((global_batch // world) % larger == 0 for larger in range(micro + 1, most + 1))


def test_batch_error_names_values_that_work() -> None:
    with pytest.raises(UserError) as error:
        solve_micro_batch(1000, 24, 64)
    assert "use 984 or 1008, or" in str(error.value)
    for text in str(error.value).split("or ")[-1].removesuffix(" ranks").split(", "):
        assert 1000 % int(text) == 0


@pytest.mark.parametrize(
    ("override", "fragment"),
    [
        ("optim.weight_decay=.inf", "optim.weight_decay = inf: input should be a finite number"),
        ("schedule.base_lr=.nan", "schedule.base_lr = nan"),
        ("student.mlp_ratio=0.001", "mlp_ratio = 0.001 of width = 64 is less than one channel"),
        ("method.decoder_mlp_ratio=0.001", "decoder_mlp_ratio = 0.001 of decoder_width = 64 is less than one channel"),
    ],
)
def test_numbers_that_no_network_has(override: str, fragment: str) -> None:
    with pytest.raises(UserError, match=fragment) as error:
        load_recipe("mae_tiny", [override])
    assert "\n" not in str(error.value)
