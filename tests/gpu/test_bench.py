"""`bench train` on a CUDA device: CUDA events, kernels, memory, MFU; and a training step without a wait of its own."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from mimscale.bench import _train_case
from mimscale.bench._phases import PhaseMarks
from mimscale.config.recipes import load_recipe
from mimscale.cost import peak
from mimscale.distributed.world import from_environment
from mimscale.monitoring.phase_timer import BACKWARD, BETWEEN, FORWARD, PhaseTimer
from tests import ranks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
SHORT = ["--micro-batch", "16", "--steps", "2", "--repeats", "2", "--warm-up", "2"]


@pytest.mark.parametrize("ds_config", ["zero2_bf16", "zero3_bf16"])
def test_a_step_is_measured_by_events(ds_config: str, tmp_path: Path) -> None:
    file, trace = tmp_path / "train.json", tmp_path / "trace.json"
    words = ["maskalign_tiny", f"engine.ds_config={ds_config}", "engine.device=cuda", *SHORT]
    ranks.run(1, "mimscale", "bench", "train", *words, "--profile", "--trace", str(trace), "--out", str(file))
    (row,) = json.loads(file.read_text())["cases"]
    assert row["images_per_s"] > 0 and row["mfu_measured"] > 0 and 0 < row["host_share"] <= 1
    assert all(row["device_ms"][phase] > 0 for phase in ("teacher", "forward", "backward", "update"))
    assert row["profile"]["counted"] == "kernels"
    assert row["profile"]["kernels"] > 50 and 0 < row["profile"]["kernel_ms"] <= 10 * row["step_ms"]
    assert 0 < row["memory"]["allocated_gib"] <= row["memory"]["reserved_gib"]
    assert any(event.get("cat") == "kernel" for event in json.loads(trace.read_text())["traceEvents"])


def test_marks_do_not_wait_and_sum_to_the_step() -> None:
    device = torch.device("cuda")
    a = torch.randn(4096, 4096, device=device)
    marks = PhaseMarks(device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for phase in ("a", "b"):
            marks.mark(phase)
            for _ in range(4):
                a @ a
        marks.end()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    device_ms, host_ms = marks.read()
    assert device_ms["a"] > 0 and device_ms["b"] > host_ms["b"] / 10


def test_the_product_reaches_a_share_of_the_data_sheet() -> None:
    device = torch.device("cuda")
    rate, known = peak.measured_flops(device, "bf16"), peak.peak_flops(device, "bf16")
    assert rate > 1e12 and (known is None or 0.3 < rate / known < 1.0)


def test_the_share_of_the_host_is_read_without_waiting() -> None:
    timer = PhaseTimer(torch.device("cuda"))
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    a @ a
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        timer.enter(FORWARD)
        for _ in range(20):
            a @ a
        timer.enter(BACKWARD)
        timer.enter(BETWEEN)
        timer.host_share()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    share = timer.host_share()
    assert share is not None and 0 < share < 0.9


def test_out_of_memory_ends_the_search() -> None:
    """No process: an allocation beyond the card fails as `--find-batch` expects it."""
    from mimscale.bench._cases import out_of_memory

    with pytest.raises(torch.OutOfMemoryError) as error:
        torch.empty(1 << 45, dtype=torch.uint8, device="cuda")
    assert out_of_memory(str(error.value), 1)


def test_a_plain_step_in_this_process() -> None:
    config = load_recipe("mae_tiny", ["engine.backend=torch", "engine.device=cuda", "engine.ds_config=zero2_bf16"])
    options = _train_case.Options(micro_batch=8, warm_up=1, repeats=1, steps=1)
    with ExitStack() as closing:
        world = from_environment("cuda")
        step = _train_case.TrainStep(_train_case.prepared(config, options, 1), options, world, closing)
        info = step()
        assert bool(torch.isfinite(info.loss)) and not info.skipped
