"""Recipes: what is accepted, and the one line that everything else gets."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mimscale.config import deepspeed
from mimscale.config.recipes import load_recipe, validate
from mimscale.distributed.micro_batch import solve_micro_batch
from mimscale.errors import UserError
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
        ("data.crop=pad", "data.crop = 'pad': input should be 'random_resized', 'padded' or 'center'"),
        ("student.heads=5", "width = 32 must be divisible by heads = 5"),
        ("student.drop_path=1.0", "student.drop_path = 1.0: input should be less than 1"),
        ("teachers.a.library=tim", "teachers.a.library = 'tim': input should be 'timm' or 'open_clip'"),
        ("engine", "override 'engine' is not of the form section.key=value"),
        ("seed.x=1", "override seed.x: seed is a value, not a section"),
        ("seed=99999999999999999999", "seed = 1e+20: a number must be at most 1e+12"),
        ("student.size=[1]", "student.size = [1]: input should be 'tiny'"),
        ("student.mlp_ratio=1e308", "student.mlp_ratio = 1e+308: input should be less than or equal to 256"),
        ("method.decoder_mlp_ratio=1e9", "method.decoder_mlp_ratio = 1000000000.0: input should be less than"),
        ("data.cache_gib=.inf", "data.cache_gib = inf: input should be a finite number"),
        ("data.cache_gib=1e10", "data.cache_gib = 10000000000.0: input should be less than or equal to 1000000000"),
        ("data.streams=2147483648", "data.streams = 2147483648: input should be less than or equal to 1048576"),
        ("data.prefetch=2147483648", "data.prefetch = 2147483648: input should be less than"),
        ("data.block=99999999999999999999", "data.block = 99999999999999999999: input should be less than"),
        ("schedule.min_lr=5", "schedule: min_lr = 5 is above the peak of"),
        ("schedule.warmup_lr=5", "schedule: warmup_lr = 5 is above the peak of"),
        ("schedule.base_lr=1e308", "schedule.base_lr = 1e+308: input should be less than or equal to 1000"),
        (
            "schedule={global_batch: 1000, lr_batch: 1, base_lr: 2, steps: 9}",
            "gives a learning rate of 2000, above 1000",
        ),
        ("optim.weight_decay=1e308", "optim.weight_decay = 1e+308: input should be less than or equal to 1000"),
        ("teachers.a={library: timm, model: m, std: [0, 0, 0]}", "teachers.a.std: [0.0, 0.0, 0.0]: pixels are divided"),
        (
            "teachers.a={library: timm, model: m, options: {depth: 1000000}}",
            "teachers.a.options: depth = 1e+06: must be at most 512",
        ),
        (
            "teachers.a={library: timm, model: m, options: {embed_dim: 1.0e+9}}",
            "teachers.a.options: embed_dim = 1e+09: must be at most 1,048,576",
        ),
        ("data.flip=true", "data.flip: true is no number or text; YAML reads yes, no, on and off as true and false"),
        ("seed=yes", "seed: true is no number or text"),
        ("data.colour_jitter=[on, 0, 0.5]", "data.colour_jitter: [true, 0, 0.5] is no number or text"),
        ("schedule.steps=010", "the value is not YAML: '010' is read in several ways"),
        ("schedule.steps=1:30", "the value is not YAML: '1:30' is read in several ways"),
        ("data={shards: a, shards: b}", "override data={shards: a, shards: b}: the value is not YAML"),
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
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    with pytest.raises(UserError, match="pipe.yaml' cannot be read: it is a named pipe, not a file"):
        load_recipe(str(tmp_path / "pipe.yaml"))
    with pytest.raises(UserError, match="zero.json' cannot be read: it is a device, not a file"):
        deepspeed.load_ds_config(str(tmp_path / "zero.json"))
    with pytest.raises(UserError, match="did you mean 'mae_vit_b16'"):
        load_recipe("mae_vit_b61")


def test_a_section_given_twice_is_refused(recipe: Path) -> None:
    """YAML forbids it; PyYAML takes the last one in silence."""
    recipe.write_text(recipe.read_text() + "\nschedule: {global_batch: 16, steps: 2, base_lr: 1.0}\n")
    with pytest.raises(UserError, match="the key 'schedule' is given twice; remove one"):
        load_recipe(str(recipe))


def test_overrides_and_round_trip(recipe: Path, tmp_path: Path) -> None:
    run = load_recipe(str(recipe), ["schedule.base_lr=1e-3"])
    assert run.schedule.base_lr == 1e-3 and run.schedule.peak_lr == pytest.approx(1e-3 * 16 / 256)
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(yaml.safe_dump(run.dump()))
    assert load_recipe(str(dumped)) == run


def test_an_override_fills_a_section_that_a_dump_shows_as_null(recipe: Path, tmp_path: Path) -> None:
    """As `mimscale train RECIPE --show` prints sections that are left out."""
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(yaml.safe_dump(load_recipe(str(recipe)).dump()))
    assert yaml.safe_load(dumped.read_text())["ema"] is None
    run = load_recipe(str(dumped), ["ema.decay=0.5", "init.weights=mae.pth"])
    assert run.ema is not None and run.ema.decay == 0.5 and run.init is not None
    assert run.shaping() == load_recipe(str(recipe), ["ema.decay=0.5", "init.weights=mae.pth"]).shaping()
    with pytest.raises(UserError, match="unknown key ema.decai"):
        load_recipe(str(dumped), ["ema.decai=0.5"])


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
        ([1], "must be {...} with sections, found list"),
        (None, "must be {...} with sections, found NoneType"),
        ({"zero_optimization": None}, "zero_optimization: None is not a section"),
        ({"zero_optimization": True}, "zero_optimization: True is not a section"),
        ({"bf16": True}, "bf16: True is not a section"),
        ({"data_types": []}, "data_types: [] is not a section"),
        ({"bf16": {"enabled": "auto"}}, "bf16.enabled: 'auto' is not true or false; 'auto' means something to Hugging"),
        ({"fp16": {"enabled": "false"}}, "fp16.enabled: 'false' is not true or false; write true or false"),
        ({"fp16": {"enabled": 1}}, "fp16.enabled: 1 is not true or false"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "fp16 and bf16 are both enabled; enable one"),
        ({"fp16": {"enabled": True, "initial_scale_power": 64}}, "initial_scale_power = 64: input should be less than"),
        ({"bf16": {"enabled": True, "loss_scale_window": 9}}, "unknown key bf16.loss_scale_window"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage = 4: input should be 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": "2"}}, "zero_optimization.stage: '2' is not a whole number"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage: True is not a whole number"),
        ({"zero_optimization": {"overlap_com": True}}, "overlap_com; did you mean 'overlap_comm'?"),
        ({"zero_optimization": {"reduce_bucket_size": "auto"}}, "reduce_bucket_size: 'auto' is not a whole number"),
        ({"zero_optimization": {"reduce_bucket_size": -5}}, "reduce_bucket_size = -5: input should be greater"),
        ({"zero_optimization": {"reduce_bucket_size": 2.5}}, "reduce_bucket_size: 2.5 is not a whole number"),
        ({"zero_optimization": {"zenflow": {}}}, "unknown key zero_optimization.zenflow"),
        ({"communication_data_type": "bogus"}, "communication_data_type = 'bogus': input should be 'fp32'"),
        ({"gradient_predivide_factor": 0}, "gradient_predivide_factor = 0: input should be greater than 0"),
        ({"gradient_predivide_factor": "2"}, "gradient_predivide_factor = '2': input should be a valid number"),
        ({"data_types": {"grad_accum_dtype": "fp8"}}, "data_types.grad_accum_dtype = 'fp8': input should be 'fp32'"),
    ],
)
def test_deepspeed_files(tmp_path: Path, change: object, line: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(change))
    with pytest.raises(UserError) as error:
        deepspeed.load_ds_config(str(path))
    assert line in str(error.value)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b'{"zero_optimization": {"stage": 2, "stage": 3}}', "the key 'stage' is given twice"),
        (b'{"bf16": {}, "bf16": {"enabled": true}}', "the key 'bf16' is given twice"),
        (b'{"gradient_predivide_factor": NaN}', "gradient_predivide_factor = nan: input should be"),
        (b'{"zero_optimization": {"stage": 2},}', "is not JSON"),
        (b"\xff\xfe{\x00}\x00", "is not a text file in UTF-8"),
        (b"[" * 100_000, "is not JSON"),
    ],
)
def test_deepspeed_files_that_are_not_whole_json(tmp_path: Path, content: bytes, line: str) -> None:
    path = tmp_path / "ds.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        deepspeed.load_ds_config(str(path))
    assert line in str(error.value) and "\n" not in str(error.value)


def test_buckets_may_be_written_as_deepspeed_writes_them(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2, "reduce_bucket_size": 5e7}}')
    assert deepspeed.load_ds_config(str(tmp_path / "ds.json"))["zero_optimization"]["reduce_bucket_size"] == 5e7


def test_shipped_deepspeed_files() -> None:
    names = deepspeed.ds_config_names()
    assert {f"zero{s}_{p}" for s in (2, 3) for p in ("fp16", "bf16")} <= set(names)
    for name in names:
        values = deepspeed.load_ds_config(name)
        assert deepspeed.precision_of(values) == name.removesuffix("_slow_links").rsplit("_", 1)[1]
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
