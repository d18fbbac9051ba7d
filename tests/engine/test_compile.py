"""Compiled blocks: the numbers of the eager ones, compiled once, chosen with a reason."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from torch._dynamo.utils import counters

from mimscale.checkpoint import run_folder
from mimscale.config.compiler import compile_seconds, uncompiled, use_cache_dir
from mimscale.config.deepspeed import load_ds_config
from mimscale.config.recipes import load_recipe
from mimscale.config.run import RunConfig, method_class
from mimscale.distributed.world import from_environment
from mimscale.engine import compile
from mimscale.engine.compile import Asked, StudentCompiler
from mimscale.engine.config import EngineConfig
from mimscale.engine.factory import make_engine
from mimscale.errors import UserError
from mimscale.types import Batch, Noise, Targets
from tests import ranks

pytestmark = pytest.mark.usefixtures("process_group")

CPU = torch.device("cpu")
GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def batches(run: RunConfig, method: Any, count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)

    def drawn(noise: Noise) -> torch.Tensor:
        values = torch.rand(4, *noise.shape, generator=generator)
        return -torch.log1p(-values) if noise.kind == "exponential" else values

    side = run.data.image_size
    return [
        Batch(
            images=torch.randn(4, 3, side, side, generator=generator),
            ids=torch.arange(4),
            positions=torch.arange(4),
            noise={purpose: drawn(noise) for purpose, noise in method.needs.noise.items()},
            boxes=torch.zeros(4, 4),
            flips=torch.zeros(4, dtype=torch.bool),
        )
        for _ in range(count)
    ]


def train(recipe: Path, *overrides: str, steps: int = 4) -> tuple[list[float], list[int], list[str]]:
    """Losses, compiled graphs after each step, and the engine's notes."""
    run = load_recipe(str(recipe), overrides)
    torch.manual_seed(0)
    method = method_class(run.method.name)(run, {})
    ds_config = load_ds_config(run.engine.ds_config)
    engine = make_engine(method, run, from_environment("cpu"), micro_batch=4, accumulation=1, ds_config=ds_config)
    losses, graphs, targets = [], [], dict[str, Targets]()
    for batch in islice(batches(run, method, steps), steps):
        losses.append(float(engine.forward_backward(batch, targets)["loss"]))
        assert not engine.step(1e-2, 0.0)
        graphs.append(counters["stats"]["unique_graphs"])
    with uncompiled():
        method.visualise(batch, targets)  # all tokens: another shape
    graphs.append(counters["stats"]["unique_graphs"])
    engine.close()
    return losses, graphs, engine.notes


FUSED = "method.fusion.levels=[0,2,4]"
CASES = {
    "drop path": ("mae", ()),
    "every block recomputed": ("mae", ("engine.activation_checkpointing=1",)),
    "every other of five blocks recomputed": (
        "mff",
        ("engine.activation_checkpointing=2", "student.depth=5", FUSED),
    ),
    "relative positions": ("simmim", ()),
    "convolutional stages": ("convmae", ()),
    "plain PyTorch": ("pixmim", ("engine.backend=torch",)),
    "plain PyTorch, bf16": ("mae", ("engine.backend=torch", "engine.ds_config=cpu_zero2_bf16")),
    "ZeRO-2, bf16": ("mae", ("engine.ds_config=cpu_zero2_bf16",)),
}


@pytest.mark.parametrize("case", CASES)
def test_blocks_give_the_eager_losses_and_compile_once(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced and differentiated as by Inductor, without its code, which would take ten times as long."""
    monkeypatch.setattr(compile, "BACKEND", "aot_eager")
    method, overrides = CASES[case]
    recipe = ranks.recipe(tmp_path, tmp_path, method)
    eager, none, _ = train(recipe, *overrides)
    losses, graphs, notes = train(recipe, *overrides, "engine.compile=blocks")
    assert "compile: blocks (engine.compile = blocks)" in notes and none == [0] * 5
    assert losses == pytest.approx(eager, rel=1e-2 if "bf16" in case else 1e-6)
    assert losses[-1] != pytest.approx(losses[0], rel=1e-2)
    assert graphs[0] > 0 and graphs == [graphs[0]] * 5, f"recompiled: {graphs}"
    assert not counters["graph_break"]


def test_the_whole_forward_pass_gives_the_eager_losses_and_compiles_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile, "BACKEND", "aot_eager")
    recipe = ranks.recipe(tmp_path, tmp_path, engine={"activation_checkpointing": 2})
    eager, *_ = train(recipe)
    losses, graphs, _ = train(recipe, "engine.compile=whole")
    assert losses == pytest.approx(eager, rel=1e-6)
    assert graphs[0] > 0 and graphs == [graphs[0]] * 5, f"recompiled: {graphs}"


@pytest.mark.slow
def test_inductor_gives_the_eager_losses(tmp_path: Path) -> None:
    recipe = ranks.recipe(tmp_path, tmp_path, student={"depth": 1})
    eager, *_ = train(recipe, steps=3)
    before_s = compile_seconds()
    losses, graphs, _ = train(recipe, "engine.compile=blocks", steps=3)
    assert losses == pytest.approx(eager, rel=1e-5)
    assert graphs[0] > 0 and graphs == [graphs[0]] * 4, f"recompiled: {graphs}"
    assert compile_seconds() > before_s


def test_equal_segments_share_a_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the decoder's, of another width and length, is of static shape: no size is an argument of a graph."""
    sizes: list[int] = []

    def count_sizes(graph: torch.fx.GraphModule, inputs: list[Any]) -> torch.fx.GraphModule:
        sizes.append(sum(isinstance(value, (int, torch.SymInt)) for value in inputs))
        return graph

    monkeypatch.setattr(compile, "BACKEND", count_sizes)
    recipe = ranks.recipe(tmp_path, tmp_path, student={"drop_path": 0.0, "depth": 8})
    train(recipe, "engine.compile=blocks")
    assert sizes == [0, 0]  # eight blocks of the encoder in two segments, one of the decoder


@pytest.mark.parametrize(
    ("asked", "device", "stage", "fault", "chosen"),
    [
        ("off", GPU, 2, "", "off"),
        ("auto", CPU, 2, "", "off"),
        ("auto", GPU, 2, "", "measure"),
        ("auto", GPU, 3, "", "off"),
        ("auto", GPU, 2, "no C++ compiler", "off"),
        ("blocks", CPU, 1, "", "blocks"),
        ("whole", CPU, 0, "", "whole"),
        ("whole", CPU, 0, "no C++ compiler", "off"),
    ],
)
def test_choice_and_its_reason(asked: Asked, device: torch.device, stage: int, fault: str, chosen: str) -> None:
    assert asked in get_args(Asked)
    kind, why = compile.choose(asked, device, stage, fault)
    assert kind == chosen and why
    assert (why == fault) is bool(fault)
    plain = compile.choose(asked, device, stage, fault, all_plain=True)
    assert plain[0] == ("off" if asked == "auto" else chosen)


def test_without_a_compiler_it_stays_eager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    notes: list[str] = []
    StudentCompiler(torch.nn.Linear(1, 1), EngineConfig(compile="blocks"), CPU, 2, notes)
    assert notes == ["compile: off (no C++ compiler was found (g++, clang++))"]


def test_auto_measures_once_and_a_resume_takes_its_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile, "BACKEND", "aot_eager")
    run = load_recipe(str(ranks.recipe(tmp_path, tmp_path)))
    torch.manual_seed(0)
    method = method_class("mae")(run, {})
    batch = batches(run, method, 1)[0]
    passes: list[int] = []

    def compute_loss() -> torch.Tensor:
        passes.append(1)
        loss: torch.Tensor = method(batch, {})["loss"]
        return loss

    notes: list[str] = []

    def undecided() -> StudentCompiler:
        compiler = StudentCompiler(method, run.engine, CPU, 2, notes)
        compiler.chosen = "measure"  # as on a GPU
        return compiler

    first = undecided()
    first.before_forward(compute_loss)
    assert first.chosen in ("off", "blocks") and len(passes) == 2 * (2 + compile.TRIALS)
    assert "eager" in notes[-1] and "compiled" in notes[-1]
    assert all(parameter.grad is None for parameter in method.parameters())
    assert any(hasattr(module, "runner") for module in method.modules()) is (first.chosen == "blocks")
    for chosen in ("off", "blocks"):
        resumed = undecided()
        resumed.load({"compiled": chosen})
        resumed.before_forward(compute_loss)
        assert resumed.state() == chosen and len(passes) == 2 * (2 + compile.TRIALS)
    older = undecided()
    older.load({})
    assert older.state() == "off"


def test_what_cannot_be_compiled_stays_eager_under_auto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(compile, "BACKEND", broken)
    run = load_recipe(str(ranks.recipe(tmp_path, tmp_path)))
    method = method_class("mae")(run, {})
    notes: list[str] = []
    compiler = StudentCompiler(method, run.engine, CPU, 2, notes)
    compiler.chosen = "measure"
    batch = batches(run, method, 1)[0]
    compiler.before_forward(lambda: method(batch, {})["loss"])
    assert compiler.chosen == "off" and "no such kernel" in "".join(notes)
    assert not any(hasattr(module, "runner") for module in method.modules())


def test_refused_under_zero3(tmp_path: Path) -> None:
    recipe = ranks.recipe(tmp_path, tmp_path)
    with pytest.raises(UserError, match="engine.compile = blocks with ZeRO-3: its hooks run between") as error:
        train(recipe, "engine.ds_config=cpu_zero3_fp32", "engine.compile=blocks")
    assert "\n" not in str(error.value)


def test_yaml_reads_off_as_a_boolean() -> None:
    assert EngineConfig.model_validate(yaml.safe_load("{compile: off}")).compile == "off"
    with pytest.raises(ValueError, match="'auto', 'off', 'blocks' or 'whole'"):
        EngineConfig.model_validate(yaml.safe_load("{compile: on}"))


def test_kernels_are_kept_in_the_jobs_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("CACHE_DIR", "/node/cache")
    use_cache_dir()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/node/cache/inductor"
    monkeypatch.setenv("CACHE_DIR", "/other")
    use_cache_dir()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/node/cache/inductor"


def test_a_resume_compiles_its_teachers_as_the_run_began(tmp_path: Path) -> None:
    wanted = load_recipe(str(ranks.recipe(tmp_path, tmp_path, "maskalign")))
    older = load_recipe(str(ranks.recipe(tmp_path, tmp_path, "maskalign")), ["teachers.tiny.compile=false"])
    run_folder.refuse_changes(older, wanted, tmp_path)
    assert wanted.teachers["tiny"].compile == "auto"
    assert run_folder.compiled_as_before(older, wanted).teachers["tiny"].compile is False
    asked = load_recipe(str(tmp_path / "recipe.yaml"), ["teachers.tiny.compile=true"])
    assert run_folder.compiled_as_before(older, asked) == asked
