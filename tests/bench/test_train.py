"""`bench train`: cases in processes of their own, a failure costs one row, and every figure is a number."""

from __future__ import annotations

import json
import math
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from mimscale.__main__ import main
from mimscale.bench import _cases, _find_batch, _suites, _synthetic, train
from mimscale.bench._cases import TrainCase
from mimscale.bench._phases import PhaseMarks
from mimscale.config.recipes import load_recipe
from mimscale.cost import peak
from mimscale.cost.devices import GIB
from mimscale.types import Needs, Noise
from tests import ranks

SHORT = ["--micro-batch", "4", "--steps", "1", "--repeats", "2", "--warm-up", "1"]


def measured(tmp_path: Path, count: int, *words: str) -> dict[str, Any]:
    file = tmp_path / "train.json"
    ranks.run(count, "mimscale", "bench", "train", *words, *SHORT, "--out", str(file))
    values: dict[str, Any] = json.loads(file.read_text())
    return values


def check_figures(row: dict[str, Any]) -> None:
    assert row["images_per_s_min"] <= row["images_per_s"] <= row["images_per_s_max"]
    assert math.isfinite(row["loss"]) and row["loss"] > 0 and row["skipped"] == 0
    parts = [row["device_ms"][phase] for phase in ("data", "teacher", "forward", "backward", "update")]
    assert all(part > 0 for part in parts) and row["memory"]["resident_gib"] > 0
    assert row["mfu"] is None and 0 < row["mfu_measured"] < 1


@pytest.mark.multi
@pytest.mark.parametrize("recipe", ["mae_tiny", "mrmae_convmae_tiny", "amt_tiny"])
def test_a_step_is_measured_with_all_its_parts(recipe: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    values = measured(tmp_path, 1, recipe, "--profile", "--save", "--trace", str(trace))
    (row,) = values["cases"]
    check_figures(row)
    assert row["profile"]["kernels"] > 100 and row["profile"]["kernel_ms"] > 0
    assert row["profile"]["counted"] == "operators"
    assert json.loads(trace.read_text())["traceEvents"]
    assert row["save_stall_ms"] > 0 and row["save_gib"] > 12 * 1e6 * row["parameters_millions"] / 2**30
    assert sum(row["gflop_per_image"].values()) > 0 and values["device"]["peak"]["fp32"] > 1e9
    assert "commit" in values["origin"] and values["device_name"]


@pytest.mark.multi
def test_a_frozen_encoders_precision_is_that_of_the_rates(tmp_path: Path) -> None:
    recipe = tmp_path / "probe.yaml"
    small = "student: {size: null, width: 64, depth: 1, heads: 2}\ninit: null\ndata: {image_size: 32}\n"
    recipe.write_text(f"extends: mae_vit_b16_linear\n{small}method: {{norm_batch: 4}}\n")
    values = measured(tmp_path, 1, str(recipe), "engine.ds_config=cpu_zero0_fp32")
    (row,) = values["cases"]
    assert row["precision"] == "bf16" and set(values["device"]["peak"]) == {"bf16"}


@pytest.mark.multi
def test_jpegs_are_written_for_the_cases_that_read_them(shards: Path) -> None:
    rows: list[dict[str, Any]] = []
    cases = [TrainCase("jpeg", "mae_tiny", ("data.workers=1",), tuple(SHORT), shards=True)]
    list(_cases.run_cases(cases, [], 200.0, rows.append, make_shards=lambda: shards))
    check_figures(rows[0])
    assert rows[0]["case"] == "jpeg"

    def fails() -> Path:
        raise OSError("no room")

    list(_cases.run_cases(cases, [], 200.0, rows.append, make_shards=fails))
    assert rows[1]["error"] == "shards: OSError: no room"


@pytest.mark.multi
def test_two_ranks_with_shards_and_accumulation(shards: Path, tmp_path: Path) -> None:
    words = ["mae_tiny", f"data.shards={shards}", "--data", "--accumulation", "2"]
    (row,) = measured(tmp_path, 2, *words)["cases"]
    check_figures(row)
    assert row["ranks"] == 2 and row["accumulation"] == 2 and row["communication_ms"] > 0


@pytest.mark.multi
def test_a_suite_costs_one_row_for_each_failure(tmp_path: Path) -> None:
    file = tmp_path / "suite.jsonl"
    printed = ranks.run(1, "mimscale", "bench", "train", "--suite", "tiny", "--out", str(file)).stdout
    rows = {row["case"]: row for row in map(json.loads, file.read_text().splitlines())}
    assert list(rows) == [case.name for case in _suites.TINY]
    check_figures(rows["mae"])
    check_figures(rows["torch"])
    assert "divisible by heads" in rows["fails"]["error"] and rows["too_slow"]["error"] == "not finished after 6 s"
    assert printed.count("\n| ") == 2 + len(rows)


@pytest.mark.multi
def test_find_batch_stops_at_the_memory_limit(tmp_path: Path) -> None:
    file = tmp_path / "train.json"
    words = ["mae_tiny", "engine.backend=torch", "--find-batch", "--memory-limit", "1.5", "--out", str(file)]
    short = ["--micro-batch", "256", "--steps", "1", "--repeats", "1", "--warm-up", "1"]
    printed = ranks.run(1, "mimscale", "bench", "train", *words, *short).stdout
    found = json.loads(file.read_text())["cases"][0]["micro_batch"]
    assert 1 <= found < 4096 and f"largest micro-batch that fits: {found}" in printed


@pytest.mark.parametrize("most", [0, 1, 7, 8, 9, 100, 896])
@pytest.mark.parametrize("start", [1, 8, 300])
def test_doubling_and_bisection_end_near_the_limit(most: int, start: int) -> None:
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= most

    found = _find_batch.largest(fits, start)
    assert found <= most <= found + max(1, found // 8) and len(tried) == len(set(tried)) <= 16


def test_what_does_not_fit_is_told_from_what_fails() -> None:
    assert _cases.out_of_memory("torch.OutOfMemoryError: CUDA out of memory. Tried", 1)
    assert _cases.out_of_memory("RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried", 1)
    assert _cases.out_of_memory("", -signal.SIGKILL) and not _cases.out_of_memory("ValueError: no", 1)
    assert _cases.reason("a\nCUDA out of memory. Tried 3 GiB\nb\n", 1).startswith("CUDA out of memory")
    assert _cases.reason("", 3) == "exit code 3" and _cases.reason("x\nlast\n\n", 1) == "last"


def test_no_case_begins_when_the_time_is_over() -> None:
    rows: list[dict[str, Any]] = []
    done = list(_cases.run_cases([TrainCase("a", "mae_tiny"), TrainCase("b", "mae_tiny")], [], 0.0, rows.append))
    assert done == rows and [row["error"] for row in rows] == ["not started: no time left"] * 2


def test_the_cases_of_the_gpu_suite_are_recipes() -> None:
    """Each with its overrides; a typing error would cost a row on the machine."""
    assert len({case.name for case in _suites.GPU}) == len(_suites.GPU)
    for case in _suites.GPU:
        config = load_recipe(case.recipe, case.overrides)
        assert config.schedule.global_batch and "--micro-batch" in case.words
    assert 30 * len(_suites.FIGURES) < _suites.BUDGETS_S["gpu"]
    page = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text()
    aims = page.partition("### After")[2].partition("\n## ")[0]
    assert set(re.findall(r"`(\w+)`", aims)) == {case.name for case in _suites.FIGURES}


def test_variants_and_plain_twins() -> None:
    cases = train.make_cases("mae_tiny,engine.plain=all+seed=3", ["optim.clip=1"], "torch")
    assert [case.overrides for case in cases] == [
        ("optim.clip=1",),
        ("optim.clip=1", "engine.plain=all", "seed=3"),
        ("optim.clip=1", "engine.backend=torch"),
        ("optim.clip=1", "engine.plain=all", "seed=3", "engine.backend=torch"),
    ]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "bench train measures a recipe or a --suite; give one of them"),
        (["mae_tiny", "--trace", "t.json"], "--trace is written by --profile; give both"),
        (["--suite", "tiny", "--only", "none"], "--only none is no case of tiny; it has mae, fails"),
        (["mae_tiny", "--steps", "0"], "--steps 0 must be at least 1"),
        (["mae_tiny", "--warm-up", "-1"], "--warm-up -1 must be at least 0"),
        (["mae_tiny", "--memory-limit", "nan"], "--memory-limit nan must be a number above 0"),
    ],
)
def test_bad_input_is_one_line(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "train", *words]) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1


def test_the_gpu_suite_is_refused_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its first case alone would take a CPU's whole memory."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "train", "--suite", "gpu", "--out", str(tmp_path / "suite.jsonl")]) == 2
    printed = capsys.readouterr()
    assert "--suite gpu needs a GPU" in printed.err and not printed.out and not list(tmp_path.iterdir())


def test_figures_for_plan_name_the_row_that_they_are_for() -> None:
    row = {"peak_tflops": None, "product_tflops": 0.1, "precision": "fp32", "on_gpu": False}
    assert train._for_plan(row) == {"device": {"peak": {"fp32": 1e11}, "matmul": 1.0}, "device_row": "cpu"}
    assert "device_row" not in train._for_plan({**row, "on_gpu": True})  # a GPU that the table lacks
    assert train._for_plan({"error": "killed"}) == {}


def test_several_cases_refuse_torchrun(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["bench", "train", "mae_tiny,seed=1"]) == 2
    assert "call it without torchrun, or with one recipe" in capsys.readouterr().err


def test_synthetic_batches_go_on(tmp_path: Path) -> None:
    """The same pixels, other positions; uncropped images come with the first micro-batch of a step."""
    config = load_recipe("mae_tiny")
    needs = Needs(noise={"mask": Noise("exponential", (36,))}, uncropped_images=2)
    source = _synthetic.batches(config, needs, 4, 2, torch.device("cpu"))
    seen = [next(source) for _ in range(4)]
    assert [int(one.raw.positions[0]) for one in seen] == [0, 4, 8, 12]
    assert [len(one.raw.uncropped) if one.raw.uncropped is not None else -1 for one in seen] == [2, 0, 2, 0]
    assert torch.equal(seen[0].copy.images, seen[2].copy.images) and seen[0].copy.images.dtype == torch.float32
    assert bool((seen[0].raw.noise["mask"] > 0).all())


def test_marks_sum_phases() -> None:
    marks = PhaseMarks(torch.device("cpu"))
    for phase in ("a", "b", "a"):
        marks.mark(phase)
    marks.end()
    device_ms, host_ms = marks.read()
    assert list(device_ms) == ["a", "b"] and device_ms == host_ms and marks.read() == ({}, {})


@pytest.mark.parametrize(
    ("name", "memory", "row"),
    [
        ("NVIDIA H100 80GB HBM3", 80 * GIB, "h100"),
        ("NVIDIA H200", 140 * GIB, "h200"),
        ("NVIDIA A100-SXM4-80GB", 80 * GIB, "a100"),
        ("NVIDIA A100-SXM4-40GB", 40 * GIB, "a100-40"),
        ("Tesla V100-SXM2-32GB", 32 * GIB, "v100"),
        ("NVIDIA H100 PCIe", 80 * GIB, None),
        ("NVIDIA GeForce RTX 4090", 24 * GIB, None),
    ],
)
def test_the_row_of_a_device(name: str, memory: float, row: str | None) -> None:
    assert peak.row_of(name, memory) == row


def test_the_rate_of_a_product_is_measured() -> None:
    assert peak.measured_flops(torch.device("cpu"), "bf16") > 1e8
