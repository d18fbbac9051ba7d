"""Run folders with one checkpoint of a tiny method, as the trainer leaves them, and official files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mimscale.__main__ import main
from mimscale.checkpoint import format as checkpoint
from mimscale.checkpoint import run_folder
from mimscale.config.run import RunConfig
from mimscale.methods.base import Method
from mimscale.methods.finetune import Finetune
from mimscale.methods.mae import MAE
from mimscale.methods.maskalign import MaskAlign
from mimscale.methods.mff import MFF
from mimscale.methods.pixmim import PixMIM
from mimscale.methods.simmim import SimMIM
from mimscale.types import TeacherInfo
from tests.checkpoint.shards import write_shard
from tests.golden import run_config

STUDENT = {"width": 32, "depth": 3, "heads": 2}
MAE_SECTION = {"name": "mae", "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
METHODS: dict[str, tuple[type[Method], dict[str, Any]]] = {
    "mae": (MAE, MAE_SECTION),
    "mff": (MFF, {**MAE_SECTION, "name": "mff", "fusion": {"levels": [0, 1, 2]}}),
    "pixmim": (PixMIM, {**MAE_SECTION, "name": "pixmim", "low_pass_radius": 10}),
    "finetune": (Finetune, {"name": "finetune", "classes": 3, "head_std": 0.1}),
    "maskalign": (MaskAlign, {"name": "maskalign", "levels": "top2", "adaptor": "mlp"}),
    "simmim": (SimMIM, {"name": "simmim"}),
}
DATA = "d" * 64  # the fingerprint of what the runs were trained on
INFO = TeacherInfo("t", dim=24, depth=3, grid=(4, 4), image_size=64, has_cls=True)
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))


def build(name: str, image_size: int = 64, **method: Any) -> tuple[Method, RunConfig]:
    torch.manual_seed(1)
    kind, section = METHODS[name]
    teachers = {"t": {"library": "timm", "model": "vit_tiny_patch16_224"}} if name == "maskalign" else {}
    run = run_config({**section, **method}, STUDENT, image_size, teachers=teachers)
    return kind(run, dict.fromkeys(teachers, INFO)), run


def save_run(folder: Path, method: Method, run: RunConfig, ema: Mapping[str, Tensor] | None = None) -> Path:
    """A run folder with one checkpoint, as the trainer leaves it. ema: parameter of the student -> its average."""
    run_folder.create(folder, run)
    parameters = dict(method.named_parameters())
    state = method.state_dict()
    kind = {name: "fp32" if name in parameters else "buffer" for name in state}
    tensors = {f"{kind[n]}|{n}|0": t.detach().flatten() for n, t in state.items()}
    for moment in ("exp_avg", "exp_avg_sq"):
        tensors |= {f"{moment}|{n}|0": torch.rand(p.numel()) for n, p in parameters.items()}
    tensors |= {f"ema|{n}|0": t.flatten() for n, t in (ema or {}).items()}
    tensors["table|masking|0"] = torch.arange(50, dtype=torch.uint8)  # as AMT's attention of each sample
    part = folder / "checkpoints" / ".new"
    shard = write_shard(part, tensors, 0, 1)
    final = checkpoint.step_folder(folder / "checkpoints", 7)
    shapes = {n: list(t.shape) for n, t in state.items()}
    checkpoint.commit(part, final, [shard], {"step": 7, "data": DATA, "shapes": shapes})
    return folder


def saved_run(folder: Path, name: str, **method: Any) -> tuple[Path, Method]:
    built, run = build(name, **method)
    return save_run(folder, built, run), built


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a wrong `convert` prints, whatever it said of its progress on a slow machine."""
    assert main(["convert", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    (error,) = [line for line in lines if not line.startswith("converting: ")]
    return f"{error}\n"
