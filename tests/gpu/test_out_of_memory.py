"""On a CUDA device: a real error of memory, the snapshot of its allocator, and kernels in the profile of a window."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path

import pytest
import torch

from mimscale.monitoring.config import ProfileConfig
from mimscale.monitoring.profile_window import ProfileWindow
from mimscale.training.out_of_memory import is_out_of_memory, memory_of, write_snapshot

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_a_snapshot_of_what_was_allocated(tmp_path: Path) -> None:
    device = torch.device("cuda", 0)
    held = torch.zeros(3 << 20, device=device)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        torch.empty(1 << 50, dtype=torch.uint8, device=device)
    assert is_out_of_memory(caught.value)
    assert held.nbytes < memory_of(device, 1) <= torch.cuda.get_device_properties(0).total_memory
    file = write_snapshot(tmp_path, 0, device)
    assert file is not None and file.name == "out_of_memory-rank-0.pickle"
    segments = pickle.loads(file.read_bytes())["segments"]
    assert sum(segment["allocated_size"] for segment in segments) >= held.nbytes


def test_a_window_holds_kernels(tmp_path: Path) -> None:
    device, said = torch.device("cuda", 0), list[str]()
    window = ProfileWindow(tmp_path, ProfileConfig(at=1, steps=1), 0, device, said.append, lambda *a, **k: None)
    window.before_step(1)
    torch.ones(64, 64, device=device).matmul(torch.ones(64, 64, device=device))
    window.after_step(1)
    (trace,) = tmp_path.glob("profile/*.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert any(event.get("cat") == "kernel" for event in events) and "| on the host |" in said[0]
