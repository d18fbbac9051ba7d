"""Lists of cases for `bench train --suite`, the most telling ones first: the machine may be taken away at any time."""

from __future__ import annotations

from pathlib import Path

from mimscale.bench._cases import TrainCase

ZERO2 = "engine.ds_config=zero2_bf16"
EAGER = "engine.compile=off"
BF16_TEACHER, FP8_TEACHER = "teachers.clip.precision=bf16", "teachers.clip.precision=fp8"


def _gpu(
    name: str, recipe: str, micro_batch: int, *words: str, limit_s: float = 60.0, shards: bool = False
) -> TrainCase:
    overrides = tuple(word for word in words if not word.startswith("--"))
    options = tuple(word for word in words if word.startswith("--"))
    given = {word.partition("=")[0] for word in overrides}
    if "engine.ds_config" not in given:
        overrides = (ZERO2, *overrides)
    return TrainCase(name, recipe, overrides, ("--micro-batch", str(micro_batch), *options), limit_s, shards)


FIGURES = (
    _gpu("mae_l", "mae_vit_l16", 896, "--profile", limit_s=120),
    _gpu("mae_h", "mae_vit_h14", 512, "--save", limit_s=120),
    _gpu("maskalign_l", "maskalign_vit_l16", 896, BF16_TEACHER, "--profile", limit_s=120),
    _gpu("maskalign_l_fp8", "maskalign_vit_l16", 896, FP8_TEACHER, limit_s=90),
    _gpu("mae_l_64", "mae_vit_l16", 64),
    _gpu("maskalign_h_fp8", "maskalign_vit_h14", 512, FP8_TEACHER, limit_s=120),
    _gpu("mae_l_eager", "mae_vit_l16", 256, EAGER),
    _gpu("mae_l_torch", "mae_vit_l16", 256, EAGER, "engine.backend=torch"),
    _gpu("mae_l_zero3", "mae_vit_l16", 256, EAGER, "engine.ds_config=zero3_bf16"),
    _gpu("mae_l_recompute", "mae_vit_l16", 256, EAGER, "engine.activation_checkpointing=1"),
    _gpu("mae_l_fp16", "mae_vit_l16", 256, EAGER, "engine.ds_config=zero2_fp16"),
    _gpu("mae_l_jpeg", "mae_vit_l16", 256, EAGER, "data.workers=14", shards=True),
    _gpu("mrmae_l_fp8", "mrmae_vit_l16", 896, FP8_TEACHER, limit_s=90),
    _gpu("mae_h_64", "mae_vit_h14", 64, limit_s=90),
    _gpu("mae_h_jpeg", "mae_vit_h14", 512, "data.workers=14", limit_s=90, shards=True),
)
"""What docs/benchmarks.md names as aims. Large micro-batches fill 80 GB by the memory measured before and by `mimscale
plan`; the eager rows with 256 images are compared with mae_l_eager.
"""
GPU = (
    *FIGURES,
    _gpu("mae_l_64_graphs", "mae_vit_l16", 64, EAGER, "engine.cuda_graphs=on"),
    _gpu("mae_l_plain", "mae_vit_l16", 256, "engine.plain=all"),
    _gpu("maskalign_h_fp16", "maskalign_vit_h14", 512, "engine.ds_config=zero2_fp16", limit_s=120),
    _gpu("mae_b", "mae_vit_b16", 1536, limit_s=90),
    _gpu("mae_l_student_fp8", "mae_vit_l16", 896, "engine.student_fp8=true", limit_s=90),
    _gpu("maskalign_l_int8", "maskalign_vit_l16", 896, EAGER, "teachers.clip.precision=int8", limit_s=90),
    _gpu("maskalign_h_zero3", "maskalign_vit_h14", 128, BF16_TEACHER, EAGER, "engine.ds_config=zero3_bf16"),
    _gpu("mrmae_conv_b", "mrmae_convmae_b", 256),
    _gpu("convmae_b", "convmae_b", 256),
    _gpu("amt_b", "amt_mae_vit_b16", 512),
    _gpu("simmim_b", "simmim_vit_b16", 256),
    _gpu("mff_b", "mff_vit_b16", 512),
)

SHORT = ("--steps", "1", "--repeats", "1", "--warm-up", "1")
TINY = (
    TrainCase("mae", "mae_tiny", words=("--micro-batch", "4", *SHORT)),
    TrainCase("fails", "mae_tiny", ("engine.ds_config=zero2_bf16", "student.heads=7"), SHORT),
    TrainCase("too_slow", "mae_tiny", words=("--micro-batch", "4", "--steps", "100000"), limit_s=6.0),
    TrainCase("torch", "maskalign_tiny", ("engine.backend=torch",), ("--micro-batch", "4", *SHORT)),
)
"""For a CPU: one case that fails and one that takes too long are among them."""

SUITES = {"gpu": GPU, "tiny": TINY}
BUDGETS_S = {"gpu": 520.0, "tiny": 300.0}


def write_shards(folder: Path, images: int) -> Path:
    """JPEGs of the size of ImageNet's, as shards. Returns their folder."""
    from data_prep.__main__ import main as data_prep
    from mimscale.bench._images import write_folder

    if not (folder / "shards").exists():
        write_folder(folder / "images", images)
        if data_prep(["folder", str(folder / "images"), str(folder / "shards")]):
            raise RuntimeError(f"the shards in {folder} could not be written")
    return folder / "shards"
