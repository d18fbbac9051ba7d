"""The run configuration: a YAML recipe plus `key=value` overrides, strict and typed.

This file holds the envelope. The section under `method:` is validated by the method's own model, found by its name
(`mimscale.by_name`), so adding a method edits nothing here. What `engine.ds_config` names is read by
`mimscale.ds_config`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)

from mimscale.by_name import class_in, first_line, names_in, section_by_name
from mimscale.errors import UserError, nearest

STUDENT_SIZES = {  # width, depth, heads
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
Fraction = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0)]


class Strict(BaseModel):
    """A section: unknown keys are errors, numbers are finite, values do not change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class MethodConfig(Strict):
    """Base of every method's own section."""

    name: str


def default_decoder() -> Literal["simplejpeg", "pillow"]:
    return "simplejpeg" if find_spec("simplejpeg") else "pillow"


class StreamConfig(Strict):
    """samples: how many pictures the shards hold, about; it is the length of an epoch, since a stream has no end.

    buffer: stored pictures among which each worker shuffles, in host memory.
    """

    samples: int = Field(ge=1)
    buffer: int = Field(1000, ge=1)


class DataConfig(Strict):
    """Where the images are and how they are cut.

    shards: a folder that holds manifest.json, or its address: http(s)://, s3://, gs://. Or `wds:` and WebDataset shards
    that have no index (wds:/data/part-{000..127}.tar, several joined by ::), which are streamed: not exact, see
    docs/data.md; then, and only then, `stream` is wanted.
    cache: a folder on each node's own disk for whole shards that are needed next, at most cache_gib of them; an address
    needs one, a slow shared file system may profit.

    crop: random_resized takes a part of random area (crop_scale) and aspect (crop_ratio). padded, the conservative crop
    of PixMIM and MFF, resizes the short side to image_size, reflects crop_padding pixels over each edge and takes a
    random square.

    colour_jitter: most change of brightness, contrast and saturation (0.3: factors from 0.7 to 1.3), in random order,
    computed on the device; no published recipe here has it.

    decoder: decides the pixels, so a run keeps the one that it was started with (see data/decode.py). Default:
    simplejpeg where it is installed; device: in the trainer's process, by nvJPEG on a GPU. decode_short_side:
    larger JPEGs are decoded at a fraction of their size, down to a short side of this many pixels; 0 = off. crops:
    each image is decoded once for so many consecutive steps, each with a crop of its own; crops count as samples.
    max_damaged: a run stops when more samples than this cannot be used; default: one in 10,000, at least 10.
    """

    shards: Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)]
    cache: Path | None = None
    cache_gib: float = Field(200.0, gt=0)
    image_size: int = Field(224, ge=8)
    crop: Literal["random_resized", "padded"] = "random_resized"
    crop_scale: tuple[float, float] = (0.2, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    crop_padding: int = Field(4, ge=0)
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    flip: float = Field(0.5, ge=0, le=1)
    colour_jitter: tuple[NonNegative, NonNegative, NonNegative] = (0.0, 0.0, 0.0)
    workers: int = Field(8, ge=0)
    prefetch: int = Field(2, ge=1)
    streams: int = Field(256, ge=1)
    block: int = Field(8192, ge=1)
    decoder: Literal["simplejpeg", "pillow", "device"] = Field(default_factory=default_decoder)
    decode_short_side: int = Field(0, ge=0)
    crops: int = Field(1, ge=1)
    max_damaged: int | None = Field(None, ge=0)
    stream: StreamConfig | None = None

    @field_validator("decoder")
    @classmethod
    def _installed(cls, value: str) -> str:
        if value == "simplejpeg" and default_decoder() != value:
            raise ValueError("the package is not installed; pip install simplejpeg, or start a run with pillow")
        return value

    @model_validator(mode="after")
    def _possible(self) -> DataConfig:
        for name, (low, high) in (("crop_scale", self.crop_scale), ("crop_ratio", self.crop_ratio)):
            if not 0 < low <= high or (name == "crop_scale" and high > 1):
                raise ValueError(f"{name} = [{low}, {high}]: must rise, stay above 0 and (scale) not exceed 1")
        if self.crop_padding >= self.image_size:
            raise ValueError(f"crop_padding = {self.crop_padding}: must be below image_size = {self.image_size}")
        return self

    @model_validator(mode="after")
    def _fit_for_the_device(self) -> DataConfig:
        """What workers do to whole pictures does not go with pictures that they leave undecoded."""
        wrong = self.crop != "random_resized" or self.crops > 1 or self.decode_short_side or self.stream is not None
        if self.decoder == "device" and wrong:
            raise ValueError(
                "decoder = device: only with crop=random_resized, crops=1, decode_short_side=0 and an indexed data "
                "set; change these, or set decoder=simplejpeg"
            )
        return self

    @model_validator(mode="after")
    def _streamed_or_not(self) -> DataConfig:
        if (self.stream is not None) != self.shards.startswith("wds:"):
            fix = "set data.stream.samples to how many pictures there are" if self.stream is None else "set stream=null"
            raise ValueError(f"shards = {self.shards}: stream is for wds: and wds: needs it; {fix}")
        if self.stream is not None and self.cache is not None:
            raise ValueError(f"cache = {self.cache} with {self.shards}: a stream keeps no copies; set cache=null")
        return self


class StudentConfig(Strict):
    """A plain ViT. `size` names width, depth and heads; for other shapes leave it out and give all three."""

    size: Literal["tiny", "small", "base", "large", "huge"] | None = None
    width: int = Field(0, ge=0)
    depth: int = Field(0, ge=0)
    heads: int = Field(0, ge=0)
    patch: int = Field(16, ge=1)
    mlp_ratio: float = Field(4.0, gt=0)
    drop_path: Fraction = 0.0

    @model_validator(mode="before")
    @classmethod
    def _fill_from_size(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("size") in STUDENT_SIZES:
            named = dict(zip(("width", "depth", "heads"), STUDENT_SIZES[values["size"]], strict=True))
            return {**named, **values}
        return values

    @model_validator(mode="after")
    def _complete(self) -> StudentConfig:
        if not (self.width and self.depth and self.heads):
            raise ValueError("needs size (tiny, small, base, large, huge) or all of width, depth, heads")
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width = {self.width} must be divisible by heads = {self.heads} and by 4")
        if int(self.width * self.mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio = {self.mlp_ratio} of width = {self.width} is less than one channel; raise it")
        return self


class TeacherConfig(Strict):
    """A frozen teacher. `weights` is a local file; without it the file of the library's tag `pretrained` is used.

    options: keyword arguments for the library's model constructor (e.g. embed_dim, depth of a custom ViT).
    activation: required for open_clip with a local file and no tag: a file cannot say whether it wants QuickGELU.
    precision: int8 and fp8 quantise the blocks' linear layers (teachers/quantise.py) and need the extra [fp8].
    compile: torch.compile each block. shard: parameters are split over the ranks and gathered block by block (ZeRO-3),
        for a teacher that one GPU cannot hold.
    random: leave the weights at their seeded random initialisation (a control, not a teacher).
    mean, std, norm_eps: facts of a checkpoint where they differ from what the library says of `model` (LayerNorm eps of
    Hugging Face's DINO: 1e-12; weights trained by this package: ImageNet's mean and std).
    """

    library: Literal["timm", "open_clip"]
    model: str
    weights: Path | None = None
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    pretrained: str | None = None
    precision: Literal["fp32", "bf16", "fp16", "int8", "fp8"] = "bf16"
    image_size: int | None = Field(None, ge=8)
    activation: Literal["gelu", "quickgelu"] | None = None
    random: bool = False
    compile: bool = False
    shard: bool = False
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    norm_eps: float | None = Field(None, gt=0)
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _shardable(self) -> TeacherConfig:
        if self.shard and (self.compile or self.storage != self.precision):
            other = "compile = true" if self.compile else f"precision = {self.precision}"
            raise ValueError(f"shard = true with {other}: parameters are gathered as they are; use one or the other")
        return self

    @property
    def storage(self) -> Literal["fp32", "bf16", "fp16"]:
        """The number format of every tensor that is not quantised."""
        return "bf16" if self.precision == "int8" or self.precision == "fp8" else self.precision


class InitConfig(Strict):
    """Weights that a run starts from: a run folder (its newest checkpoint), a checkpoint folder, or a file, also one of
    an official release.

    sha256: of the file, or of a checkpoint's manifest.json; without it what is found at the first start is kept.
    part: student leaves decoder and heads at their random start; method takes everything, from the same method.
    """

    weights: Path
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    part: Literal["student", "method"] = "student"


class OptimConfig(Strict):
    """AdamW. clip: global gradient norm, 0 = off. layer_decay: 1 = off."""

    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    layer_decay: float = Field(1.0, gt=0, le=1)
    clip: float = Field(0.0, ge=0)


class ScheduleConfig(Strict):
    """How the learning rate moves; the peak is base_lr x global_batch / lr_batch. The curves are in schedule.py.

    kind: cosine is MAE's; timm_cosine and multistep (x gamma at each epoch of `milestones`) are SimMIM's.
    warmup_lr, min_lr: where the warm-up starts and the cosine ends, absolute.
    Give `epochs` (steps per epoch = floor(samples / global_batch)) or, for a short run, `steps`.
    """

    kind: Literal["cosine", "timm_cosine", "multistep"] = "cosine"
    global_batch: int = Field(ge=1)
    epochs: float | None = Field(None, gt=0)
    steps: int | None = Field(None, ge=1)
    warmup_epochs: float = Field(0.0, ge=0)
    base_lr: float = Field(gt=0)
    lr_batch: int = Field(256, ge=1)
    warmup_lr: float = Field(0.0, ge=0)
    min_lr: float = Field(0.0, ge=0)
    milestones: tuple[float, ...] = ()
    gamma: float = Field(0.1, gt=0, le=1)

    @model_validator(mode="after")
    def _one_length(self) -> ScheduleConfig:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("needs exactly one of epochs and steps; set the other to null")
        if self.epochs is not None and self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs = {self.warmup_epochs} must be below epochs = {self.epochs}")
        return self

    @model_validator(mode="after")
    def _milestones_fit(self) -> ScheduleConfig:
        given = f"milestones = {list(self.milestones)}"
        if bool(self.milestones) != (self.kind == "multistep"):
            raise ValueError(f"{given} with kind = {self.kind}: multistep needs some, the cosines have none")
        if list(self.milestones) != sorted(self.milestones) or min(self.milestones, default=inf) < self.warmup_epochs:
            raise ValueError(f"{given}: must rise and not lie inside the warm-up of {self.warmup_epochs:g} epochs")
        if self.kind == "multistep" and self.min_lr:
            raise ValueError(f"min_lr = {self.min_lr} with kind = multistep: only a cosine has a floor; remove it")
        return self

    @property
    def peak_lr(self) -> float:
        return self.base_lr * self.global_batch / self.lr_batch


class EngineConfig(Strict):
    """ds_config: a name in ds_configs/ (`zero2_fp16`) or a path to a JSON file of your own.

    max_micro_batch: images per rank and forward pass at most; accumulation is solved from it and the world size.
    activation_checkpointing: 0 off, k = recompute every k-th block.
    teachers_ahead: the teachers run one micro-batch ahead of the student, on a GPU in a stream of their own, so that
        they compute while the student waits for other ranks; costs the memory of one more micro-batch and its targets.
    """

    ds_config: str = "zero2_bf16"
    max_micro_batch: int = Field(64, ge=1)
    activation_checkpointing: int = Field(0, ge=0)
    teachers_ahead: bool = False
    device: Literal["auto", "cuda", "cpu"] = "auto"


class CheckpointConfig(Strict):
    """every: optimiser steps between saves, 0 = only at the end. keep: newest checkpoints that stay on disk.

    keep_every: those at multiples of this step stay for good, 0 = none. patience_s: how long a write that fails (a full
    disk, a quota, an outage) is tried again before this save is given up and the training goes on. wait_s: how long a
    step that wants to save waits for a save that is still being written, before it goes on without.
    """

    every: int = Field(1000, ge=0)
    keep: int = Field(2, ge=1)
    keep_every: int = Field(0, ge=0)
    patience_s: float = Field(120.0, ge=0)
    wait_s: float = Field(10.0, ge=0)


class GuardConfig(Strict):
    """Steps that must not reach the weights; the mechanism stands in resilience/guard.py. 0 switches a rule off.

    loss_spike: deviations above the mean of the accepted losses from which a step is skipped. grad_spike: multiple of
    the usual gradient norm to which a larger one is scaled down. warmup: steps before either is judged. every: steps
    between readings of the norm. skips: bad steps in a row after which the run goes back to the checkpoint before them
    and jumps over their samples and those of `margin` steps before. rollbacks: how often, before the run ends with a
    report. loss_scale_floor: a loss scale (fp16) at which a skipped step counts as a full row.
    """

    loss_spike: float = Field(10.0, ge=0)
    grad_spike: float = Field(20.0, ge=0)
    warmup: int = Field(200, ge=1)
    every: int = Field(20, ge=1)
    skips: int = Field(10, ge=0)
    margin: int = Field(20, ge=0)
    rollbacks: int = Field(3, ge=0)
    loss_scale_floor: float = Field(16.0, ge=1)


class WatchdogConfig(Strict):
    """stall_s: seconds without a step after which a rank writes down what it does and ends itself, 0 = off.

    startup_s: the same before the first step. every: steps between comparisons of the ranks, 0 = none.
    """

    stall_s: float = Field(900.0, ge=0)
    startup_s: float = Field(3600.0, ge=0)
    every: int = Field(100, ge=0)


class LogConfig(Strict):
    """every: optimiser steps between log lines. panels: steps between pictures, 0 = none."""

    every: int = Field(20, ge=1)
    panels: int = Field(0, ge=0)
    tensorboard: bool = True


class RunConfig(Strict):
    """One run, whole. Sections that shape the result are in `fingerprint`; the others may change at a resume."""

    seed: int = 0
    data: DataConfig
    student: StudentConfig
    init: InitConfig | None = None
    teachers: dict[str, TeacherConfig] = Field(default_factory=dict)
    method: SerializeAsAny[MethodConfig]
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="before")
    @classmethod
    def _method_by_name(cls, values: Any) -> Any:
        section = values.get("method") if isinstance(values, Mapping) else None
        if isinstance(section, Mapping):
            return {**values, "method": section_by_name("mimscale.methods", section, "method.name")}
        return values

    @model_validator(mode="after")
    def _grid(self) -> RunConfig:
        if self.data.image_size % self.student.patch:
            raise ValueError(
                f"data.image_size = {self.data.image_size} is not a multiple of student.patch = {self.student.patch}"
            )
        return self

    @model_validator(mode="after")
    def _one_stream_gathers(self) -> RunConfig:
        split = next((name for name, teacher in self.teachers.items() if teacher.shard), None)
        if split is not None and self.engine.teachers_ahead:
            raise ValueError(
                f"engine.teachers_ahead = true with teachers.{split}.shard = true: a split teacher gathers in the "
                f"student's stream; set one of them to false"
            )
        return self

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the student's patch tokens."""
        side = self.data.image_size // self.student.patch
        return side, side

    def dump(self) -> dict[str, Any]:
        """Plain JSON-able values, complete: what is written into the run folder."""
        return self.model_dump(mode="json")

    def shaping(self) -> dict[str, Any]:
        """The flat `section.key` values that decide the result; a resume refuses a change in any of them."""
        free = (
            "engine.",
            "checkpoint.",
            "guard.",
            "watchdog.",
            "log.",
            "data.workers",
            "data.prefetch",
            "data.shards",
            "data.max_damaged",
            "data.cache",
        )
        flat = dict(_flatten(self.dump()))
        flat["teachers"] = list(self.teachers)  # in this order: masks follow the first that has a class token
        return {key: value for key, value in flat.items() if not key.startswith(free) and not key.endswith(".weights")}


def method_names() -> list[str]:
    return names_in("mimscale.methods")


def method_class(name: str) -> Any:
    """The Method that the file mimscale/methods/<name>.py defines."""
    return class_in("mimscale.methods", name, "method.name")


# ------------------------------------------------------------------------------------------------ reading recipes


def recipe_names() -> list[str]:
    files = (entry.name for entry in resources.files("mimscale.recipes").iterdir())
    return sorted(f[:-5] for f in files if f.endswith(".yaml"))


def load(recipe: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe (a name in mimscale/recipes or a path to YAML) and apply `section.key=value` overrides.

    Raises UserError with one line that names the value, the rule and the fix.
    """
    values = _read_recipe(recipe)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise UserError(f"override '{override}' is not of the form section.key=value")
        _assign(values, key.split("."), _parse_value(key, text))
    return validate(values, source=recipe)


def validate(values: Mapping[str, Any], source: str) -> RunConfig:
    """Plain values -> RunConfig; one line of UserError for the first thing that is wrong."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{source}: {first_line(error, RunConfig, ())}") from None


def _read_recipe(recipe: str) -> dict[str, Any]:
    path = Path(recipe)
    if path.suffix not in (".yaml", ".yml"):
        if recipe not in recipe_names():
            raise UserError(
                f"recipe '{recipe}' is unknown{nearest(recipe, recipe_names())}; or give a path that ends in .yaml"
            )
        text = resources.files("mimscale.recipes").joinpath(f"{recipe}.yaml").read_text()
    else:
        try:
            text = path.read_text()
        except OSError as error:
            raise UserError(f"recipe '{recipe}' cannot be read: {error.strerror}") from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"recipe '{recipe}' is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"recipe '{recipe}' must be a mapping of sections, found {type(values).__name__}")
    return values


def _parse_value(key: str, text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"override {key}={text}: the value is not YAML") from None
    if isinstance(value, str):  # YAML 1.1 reads 1e-4 as text
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _assign(values: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    for depth, key in enumerate(keys[:-1]):
        inner = values.setdefault(key, {})
        if not isinstance(inner, dict):
            raise UserError(f"override {'.'.join(keys)}: {'.'.join(keys[: depth + 1])} is a value, not a section")
        values = inner
    values[keys[-1]] = value


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def fingerprint(values: Mapping[str, Any]) -> str:
    """sha256 of plain values, independent of the order of their keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------ batch arithmetic


def solve_batch(global_batch: int, world: int, max_micro_batch: int) -> tuple[int, int]:
    """(micro-batch per rank, accumulation steps) with micro x accumulation x world = global_batch, fewest steps.

    Raises UserError with the neighbouring values that would work.
    """
    if global_batch % world:
        below, above = global_batch // world * world, -(-global_batch // world) * world
        worlds = [w for w in range(1, 2 * world) if global_batch % w == 0]
        nearest = sorted(worlds, key=lambda w: abs(w - world))[:3]
        raise UserError(
            f"schedule.global_batch = {global_batch} does not divide over {world} ranks; "
            f"use {' or '.join(str(b) for b in (below, above) if b)}, or {', '.join(map(str, sorted(nearest)))} ranks"
        )
    per_rank = global_batch // world
    micro = max(size for size in range(1, min(per_rank, max_micro_batch) + 1) if per_rank % size == 0)
    return micro, per_rank // micro
