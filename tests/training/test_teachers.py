"""A teacher that gives no numbers ends a run before its folder exists, on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import yaml

from tests import ranks
from tests.teachers import tiny

pytestmark = [pytest.mark.multi, pytest.mark.slow]

OPTIONS: dict[str, Any] = {"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 8}


@pytest.mark.parametrize("shard", [False, True])
def test_a_teacher_that_overflows(shard: bool, shards: Path, tmp_path: Path) -> None:
    model: Any = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, **OPTIONS)
    model.patch_embed.proj.weight.data.mul_(1e5)
    path = tiny.saved(model, tmp_path / "w.safetensors")
    config = {"library": "timm", "model": "vit_tiny_patch16_224", "weights": str(path), "options": OPTIONS}
    teacher = {**config, "precision": "fp16", "shard": shard}
    recipe = ranks.recipe(tmp_path, shards, "maskalign")
    values = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump({**values, "teachers": {"tiny": teacher}}))
    done = ranks.run(2, "mimscale", "train", recipe, "--run-dir", tmp_path / "run", check=False)
    lines = [line for line in done.stderr.splitlines() if "teachers.tiny.precision = fp16" in line]
    assert done.returncode and lines and all("use bf16, or take other weights" in line for line in lines)
    assert "Traceback" not in done.stderr and not (tmp_path / "run" / "config.yaml").exists()
