"""Real trainer processes for tests: a tiny data set, a tiny recipe, torchrun, and what a run left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from mimscale.checkpoint import format as checkpoint
from tests import forked

DECODER = {"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 4}
STAGES = {"patches": [2, 2, 2], "widths": [8, 16], "depths": [1, 1]}
AMT = {"policy": "amt", "ratio": 0.45, "drop_ratio": 0.4, "warmup_epochs": 0.4, "refresh": 0.3}  # uniform for two steps
METHODS: dict[str, dict[str, Any]] = {  # the section `method` of a tiny run
    "mae": {"norm_pix_loss": True, **DECODER},
    "maskalign": {"levels": "top2", "fusion": "linear"},
    "mff": {"fusion": {"levels": [0, 1, 2]}, **DECODER},
    "pixmim": {"low_pass_radius": 8, **DECODER},
    "simmim": {"masking": {"unit": 16}},
    "amt": {"name": "mae", "masking": AMT, **DECODER},
    "amt_simmim": {"name": "simmim", "masking": {**AMT, "ratio": 0.25, "drop_ratio": 0.25, "unit": 16}},
    "convmae": {"stages": STAGES, **DECODER},
    "mrmae": {"fusion": {"kind": "mff", "levels": [0, 2]}, **DECODER},
    "finetune_beit": {"name": "finetune", "classes": 4, "beit": {}, "head_std": 0.02},
    "finetune_mixed": {"name": "finetune", "classes": 4, "mixup": 0.8, "cutmix": 1.0, "head_std": 0.02},
    "mrmae_convmae": {"name": "mrmae", "stages": {**STAGES, "class_token": True}, **DECODER},
}
BARE_TARGET = {"weight": 0.5, "levels": [1, 3], "target_norm": "l2", "cls_target": False}
COMPOSED: dict[str, dict[str, Any]] = {
    "mrmae_mff": {"name": "mrmae", "fusion": {"kind": "mff", "levels": [0, 2], "feeds": "both"}, **DECODER},
    "pixmim_attention": {"name": "pixmim", "masking": {"policy": "attention"}, **METHODS["pixmim"]},
    "maskalign_amt": {"name": "maskalign", "masking": AMT, **METHODS["maskalign"]},
    "maskalign_two": {"name": "maskalign", "fusion": "sum", "levels": "top2", "targets": {"bare": BARE_TARGET}},
    "maskalign_before": {"name": "maskalign", "adaptor_position": "before", **METHODS["maskalign"]},
}
METHODS |= COMPOSED
TAUGHT = ("maskalign", "mrmae", "mrmae_convmae", *COMPOSED)


def recipe(folder: Path, shards: Path, method: str = "mae", /, **sections: dict[str, Any]) -> Path:
    """A recipe file for a network of a few thousand parameters, drop path on. `sections` replace keys."""
    values: dict[str, dict[str, Any]] = {
        "data": {"shards": str(shards), "image_size": 32, "workers": 1},
        "student": {"width": 32, "depth": 3, "heads": 4, "patch": 8, "drop_path": 0.1},
        "method": {"name": method, **METHODS.get(method, {})},
        "schedule": {"global_batch": 16, "steps": 12, "warmup_epochs": 0.4, "base_lr": 1.6e-2, "min_lr": 1e-5},
        "engine": {"ds_config": "cpu_zero2_fp32", "max_micro_batch": 8, "device": "cpu"},
        "checkpoint": {"every": 4, "keep": 100},
        "log": {"every": 1, "trackers": []},
    }
    if method in TAUGHT:
        options: dict[str, Any] = {"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 8}
        teacher = {"library": "timm", "model": "vit_tiny_patch16_224", "random": True, "precision": "fp32"}
        values["teachers"] = {"tiny": {**teacher, "options": options}}
    if method == "maskalign_two":  # another width, depth and resolution, no class token, other pixels
        options = {"embed_dim": 48, "depth": 4, "num_heads": 3, "patch_size": 4}
        options |= {"class_token": False, "global_pool": "avg"}
        pixels = {"image_size": 16, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
        values["teachers"]["bare"] = {**teacher, **pixels, "options": options}
    for name, changes in sections.items():
        values[name] = {**values.get(name, {}), **changes}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def cut_back(source: Path, target: Path, step: int) -> None:
    """A copy of a finished run as it was right after it saved `step`."""
    shutil.copytree(source, target)
    (target / "done").unlink()
    for path in checkpoint.steps(target / "checkpoints"):
        if checkpoint.step_of(path) > step:
            shutil.rmtree(path)


def command(ranks: int, *words: str | Path) -> list[str]:
    if ranks == 1:
        return [sys.executable, "-m", *map(str, words)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"]
    return [*launcher, *map(str, words)]


def environment() -> dict[str, str]:
    """This environment without what an outer launcher or test left in it."""
    drop = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "MIMSCALE_STOP_FILE")
    return {**{k: v for k, v in os.environ.items() if k not in drop}, "OMP_NUM_THREADS": "1"}


def run(
    count: int, *words: str | Path, check: bool = True, meanwhile: Callable[[list[int]], None] = lambda pids: None
) -> subprocess.CompletedProcess[str]:
    """Run a module on that many ranks and wait; on failure show what it printed. meanwhile: gets their process ids."""
    done = forked.run(count, list(map(str, words)), environment(), meanwhile)
    if check and done.returncode:
        errors = "\n".join(line for line in done.stderr.splitlines() if not line.startswith("frame #"))
        raise AssertionError(f"exit {done.returncode}\n{done.stdout[-4000:]}\n{errors[-8000:]}")
    return done


def train(ranks: int, recipe: Path, run_dir: Path, *overrides: str) -> None:
    run(ranks, "mimscale", "train", recipe, *overrides, "--run-dir", run_dir)


def train_until(
    step: int, ranks: int, recipe: Path, run_dir: Path, number: signal.Signals, overrides: Sequence[str] = ()
) -> None:
    """Start a run, signal its ranks once it has logged `step`, and wait until they have left with 0."""

    def strike(pids: list[int]) -> None:
        until(lambda: len(curve(run_dir)) >= step, pids)
        for pid in pids:
            os.kill(pid, number)

    run(ranks, "mimscale", "train", recipe, *overrides, "--run-dir", run_dir, meanwhile=strike)


def until(what: Callable[[], object], pids: Sequence[int]) -> None:
    """Wait for something that a run of these processes does."""
    while not what():
        assert all(Path(f"/proc/{pid}").exists() for pid in pids), "the run has ended"
        time.sleep(0.05)


def lines(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def curve(run_dir: Path, name: str = "loss") -> dict[int, float]:
    """step -> logged value; where a step was redone the later counts."""
    return {line["step"]: line[name] for line in lines(run_dir) if "step" in line}


def tensors(run_dir: Path) -> dict[str, Tensor]:
    """Everything in the newest checkpoint, whole, by "kind|name"."""
    path = checkpoint.newest(run_dir)
    assert path is not None, f"{run_dir} has no checkpoint"
    reader = checkpoint.CheckpointReader(path)
    return {f"{kind}|{name}": reader.full(kind, name) for kind in reader.kinds() for name in reader.names(kind)}


def meta(run_dir: Path) -> dict[str, Any]:
    path = checkpoint.newest(run_dir)
    assert path is not None
    return checkpoint.CheckpointReader(path).meta


def difference(a: Path, b: Path) -> float:
    """Largest absolute difference between the weights in two runs' newest checkpoints."""
    ours, theirs = tensors(a), tensors(b)
    assert ours.keys() == theirs.keys()
    return max(float((ours[k] - theirs[k]).abs().max()) for k in ours if k.startswith("fp32"))


def identical(a: Path, b: Path) -> bool:
    """Weights, moments, buffers, the optimiser's step, counters and scaler, to the bit."""
    ours, theirs = tensors(a), tensors(b)
    same = ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    return same and meta(a)["engine"] == meta(b)["engine"]
