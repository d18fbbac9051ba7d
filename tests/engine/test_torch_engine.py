"""The engine in plain PyTorch: what it does without, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mimscale.__main__ import main
from mimscale.checkpoint import format as checkpoint
from tests import ranks

TORCH = ["engine.backend=torch", "engine.ds_config=cpu_zero2_fp32"]


def test_a_run_needs_no_deepspeed(shards: Path, tmp_path: Path) -> None:
    recipe = ranks.recipe(tmp_path, shards, data={"workers": 0}, schedule={"steps": 3}, checkpoint={"every": 0})
    words = ["train", str(recipe), *TORCH, "--run-dir", str(tmp_path / "run")]
    code = (
        "import sys; sys.modules['deepspeed'] = None\n"
        "from mimscale.distributed.end_process import end_process\n"
        f"from mimscale.__main__ import main; assert main({words!r}) == 0\n"
        "import torch.distributed as dist; assert not dist.is_initialized()\n"
        "end_process(0)"  # as the command does: threads of torch may outlive the interpreter
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=ranks.environment())
    assert checkpoint.newest_step(tmp_path / "run") == 3


@pytest.mark.parametrize(
    ("method", "override", "line"),
    [
        (
            "mae",
            "engine.ds_config=cpu_zero2_fp16",
            "engine.backend = torch has no loss scale for engine.ds_config = cpu",
        ),
        ("maskalign", "teachers.tiny.shard=true", "with teachers.tiny.shard = true: only DeepSpeed splits a teacher"),
    ],
)
def test_refused_with_one_line(
    method: str, override: str, line: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = ranks.recipe(tmp_path, shards, method)
    assert main(["train", str(recipe), *TORCH, override, "--run-dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
