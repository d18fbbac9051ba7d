"""Overhead of fault tolerance: time per step, time that a save blocks training, and the phases of a resume."""

from __future__ import annotations

import argparse
import time
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the checkpoint of one rank")
    parser.add_argument(
        "--batch", type=int, default=4, help="images of the ViT-B step to which the overhead is compared"
    )
    parser.add_argument("--resume", default="mae_vit_b16", help="recipe of the run that is resumed")
    parser.add_argument("--folder", type=Path, help="a disk with room for its checkpoint (default: /tmp)")


def run(args: argparse.Namespace) -> int:
    from mimscale.bench._report import publish

    step_s = vit_b_step(args.batch)
    overhead_s = step_overhead(args.steps)
    copy_s, memcpy_s = save_blocking(args.gigabytes)
    rows = [
        [f"MAE ViT-B/16 step, {args.batch} images, CPU s", f"{step_s:.3f}"],
        [
            f"guard, watchdog, throughput, comparison of ranks: CPU ms per step over {args.steps} steps",
            f"{1000 * overhead_s:.3f}",
        ],
        ["share of that step", f"{overhead_s / step_s:.3%}"],
        [f"blocking part of a save of {args.gigabytes:g} GB, s", f"{copy_s:.3f}"],
        ["plain memcpy of the same size, s", f"{memcpy_s:.3f}"],
        ["ratio", f"{copy_s / memcpy_s:.2f}"],
    ]
    seconds, cpu_s = resume_phases(args.resume, args.folder)
    phases = [[name.replace("_", " "), f"{seconds[name]:.2f}", f"{cpu_s[name]:.2f}"] for name in seconds]
    phases.append(["until the first step is done", f"{sum(seconds.values()):.2f}", f"{sum(cpu_s.values()):.2f}"])
    publish(args, [(["", "one process"], rows), ([f"{args.resume} resumed, one process", "s", "CPU s"], phases)])
    return 0


def vit_b_step(batch: int) -> float:
    """CPU seconds of forward, backward and AdamW of MAE ViT-B in plain PyTorch; the better of two."""
    import torch

    from mimscale.config.recipes import load_recipe
    from mimscale.config.run import method_class
    from mimscale.types import Batch

    config = load_recipe("mae_vit_b16")
    method = method_class("mae")(config, {})
    optimizer = torch.optim.AdamW(method.parameters())
    shapes = {name: (batch, *wanted.shape) for name, wanted in method.needs.noise.items()}
    images = torch.zeros(batch, 3, config.data.image_size, config.data.image_size)
    none = torch.zeros(batch, dtype=torch.int64)
    data = Batch(images, none, none, {n: torch.rand(s) for n, s in shapes.items()}, torch.zeros(batch, 4), none.bool())
    times = []
    for _ in range(2):
        start_s = time.process_time()
        method(data, {})["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.process_time() - start_s)
    return min(times)


def step_overhead(steps: int) -> float:
    """CPU seconds per step of everything that the loop calls besides the training step."""
    import tempfile

    import torch

    from mimscale.distributed.coordination import Coordinator
    from mimscale.fault_tolerance.config import GuardConfig, WatchdogConfig
    from mimscale.fault_tolerance.step_guard import StepGuard
    from mimscale.fault_tolerance.watchdog import Watchdog
    from mimscale.monitoring.metrics import ThroughputMeter
    from mimscale.monitoring.phase_timer import BACKWARD, BETWEEN, FORWARD, WAITING, PhaseTimer

    device, control = torch.device("cpu"), Coordinator()
    with tempfile.TemporaryDirectory() as folder:
        timer = PhaseTimer(device)
        watch = Watchdog(Path(folder), 0, WatchdogConfig(), timer)
        guard, throughput = StepGuard(GuardConfig(), 1, device), ThroughputMeter(device)
        loss = torch.tensor(0.5)
        start_s = time.process_time()
        for step in range(1, steps + 1):
            timer.enter(WAITING)
            timer.enter(FORWARD)
            timer.enter(BACKWARD)
            guard.check_loss(loss)
            throughput.add({"loss": loss}, images=1)
            watch.beat(step)
            timer.enter(BETWEEN)
            timer.lap()
            guard.clip(0.0)
            guard.update(False, None)
            control.agree(0, 0, 0)
            if step % 20 == 0:
                guard.observe_norm(1.0)
                throughput.read()
            if step % 100 == 0:
                timer.compare(control)
        spent_s = time.process_time() - start_s
        watch.close()
    return spent_s / steps


def resume_phases(recipe: str, folder: Path | None) -> tuple[dict[str, float], dict[str, float]]:
    """(seconds, CPU seconds) of each phase of the second start of a run with two images per step, from its metrics."""
    import json
    import shutil
    import subprocess
    import sys
    import tempfile

    root = Path(tempfile.mkdtemp(prefix="bench-", dir=folder))

    def module(*words: str | Path) -> None:
        done = subprocess.run([sys.executable, "-m", *map(str, words)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, words))}: {done.stderr[-2000:]}")

    try:
        module("data_prep", "synthetic", root / "images")
        module("data_prep", "folder", root / "images", root / "shards")
        small = ["engine.ds_config=cpu_zero2_fp32", "engine.device=cpu", "schedule.global_batch=2", "data.workers=1"]
        length = ["schedule.epochs=null", "schedule.steps=2", "schedule.warmup_epochs=0", "checkpoint.every=1"]
        words = ["mimscale", "train", recipe, f"data.shards={root / 'shards'}", *small, *length]
        module(*words, "checkpoint.keep=9", "--run-dir", root / "run")
        (root / "run" / "done").unlink()
        shutil.rmtree(root / "run" / "checkpoints" / "step-00000002")
        (root / "run" / "metrics.jsonl").unlink()
        module(*words, "checkpoint.keep=9", "--run-dir", root / "run")
        lines = [json.loads(line) for line in (root / "run" / "metrics.jsonl").read_text().splitlines()]
        first = next(line for line in lines if line.get("event") == "first_step")
        return first["seconds"], first["cpu_s"]
    finally:
        shutil.rmtree(root)


def save_blocking(gigabytes: float) -> tuple[float, float]:
    """Seconds of HostBuffer.fill, and of a plain copy of as many bytes; the best of three alternating measurements."""
    import torch

    from mimscale.checkpoint.host_buffer import HostBuffer

    pieces = 300
    each = int(gigabytes * 1e9 / 4 / pieces)
    live = {f"fp32|p{i}|0": torch.full((each,), 0.5) for i in range(pieces)}
    copy = HostBuffer(live)
    source, target = torch.zeros(pieces * each), torch.zeros(pieces * each)
    ours, plain = [], []
    for _ in range(3):
        start_s = time.perf_counter()
        copy.fill(live)
        ours.append(time.perf_counter() - start_s)
        start_s = time.perf_counter()
        target.copy_(source)
        plain.append(time.perf_counter() - start_s)
    return min(ours), min(plain)
