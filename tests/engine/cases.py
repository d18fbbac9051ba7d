"""Cases for live engines, started on two ranks by test_cases.py:  torchrun -m tests.engine.cases RECIPE CASE"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mimscale.config.deepspeed import load_ds_config
from mimscale.config.recipes import load_recipe
from mimscale.config.run import RunConfig, method_class
from mimscale.data.loader import TrainLoader
from mimscale.data.manifest import Manifest
from mimscale.distributed.end_process import end_process
from mimscale.distributed.world import close_process_group, from_environment
from mimscale.engine.base import Engine, unchanged
from mimscale.engine.deepspeed_engine import DeepSpeedEngine
from mimscale.engine.deepspeed_runtime import open_process_group
from mimscale.engine.factory import make_engine
from mimscale.engine.zero_layout import Layout, LayoutError
from mimscale.errors import UserError
from mimscale.fault_tolerance.config import GuardConfig
from mimscale.fault_tolerance.step_guard import StepGuard
from mimscale.optim.optimizers.adamw import AdamW
from mimscale.types import Batch

CPU_CONFIGS = [f"cpu_zero{s}_fp32" for s in range(4)] + [f"cpu_zero{s}_{p}" for s in (2, 3) for p in ("fp16", "bf16")]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
TORCH = {f"torch {p}": ["engine.backend=torch", f"engine.ds_config=cpu_zero2_{p}"] for p in ("fp32", "bf16")}


def all_configs(recipe: str) -> list[str]:
    """With ZeRO-1 in 16 bit, which has no files of its own; ZeRO-0 in 16 bit is refused."""
    paths = [Path(recipe).with_name(f"zero1_{precision}_{world.rank}.json") for precision in ("fp16", "bf16")]
    for path, precision in zip(paths, ("fp16", "bf16"), strict=True):
        values = {**load_ds_config(f"cpu_zero2_{precision}"), "data_types": {}}
        values["zero_optimization"]["stage"] = 1
        path.write_text(json.dumps(values))
    return [*CPU_CONFIGS, *map(str, paths), *TORCH]


def build(run: RunConfig, method: Any = None) -> Any:
    torch.manual_seed(0)
    method = method_class(run.method.name)(run, {}) if method is None else method
    ds_config = load_ds_config(run.engine.ds_config)
    return make_engine(method, run, world, micro_batch=8, accumulation=1, ds_config=ds_config)


def engines(
    recipe: str, names: Sequence[str], overrides: Sequence[str] = ()
) -> Iterator[tuple[str, Any, Iterator[Batch]]]:
    """names: of ds_configs/, or TORCH."""
    for name in names:
        run = load_recipe(recipe, [*TORCH.get(name, [f"engine.ds_config={name}"]), *overrides])
        engine = build(run)
        assert isinstance(run.data.shards, str)
        loader = TrainLoader(
            Manifest.load(run.data.shards),
            run.data.model_copy(update={"workers": 0}),
            method_class(run.method.name)(run, {}).needs,
            seed=0,
            global_batch=16,
            micro_batch=8,
            rank=world.rank,
            world=world.size,
        )
        yield name, engine, (batch.normalised() for batch in loader)
        engine.close()


def train(engine: Engine, batch: Batch, check_loss: Callable[[Tensor], Tensor] = unchanged, clip: float = 0.0) -> bool:
    """One step; whether it was skipped."""
    engine.forward_backward(batch, {}, check_loss)
    return engine.step(1e-3, clip)


def copies(engine: Engine) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in engine.fragments().items()}


def oracle(recipe: str) -> None:
    """Our fragments equal what DeepSpeed's public, collective functions say, before and after steps."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    for name, engine, batches in engines(recipe, [c for c in CPU_CONFIGS if "zero0" not in c]):
        for _ in range(2):
            train(engine, next(batches))
        holders = {place.holder: None for place in engine.layout.places}
        for holder in holders:
            full = {"fp32": safe_get_full_fp32_param(holder)}
            full |= {kind: safe_get_full_optimizer_state(holder, kind) for kind in AdamW.STATES}
            starts = {place.name: place.start for place in engine.layout.places if place.holder is holder}
            for f in engine.layout.fragments:
                if f.name in starts:
                    for kind, tensor in full.items():
                        mine = engine.layout.view(f, kind)
                        start = starts[f.name] + f.start
                        theirs = tensor.view(-1)[start : start + f.length]
                        assert torch.equal(mine, theirs), f"{name}: {kind} of {f.name}"
        assert engine.layout.optimizer_step() == 2


def no_synchronise(recipe: str) -> None:
    """DeepSpeed's timers would wait for the device in every micro-step; they are off."""
    from deepspeed.accelerator import get_accelerator

    calls = []
    get_accelerator().synchronize = lambda *_: calls.append(1)
    for name, engine, batches in engines(recipe, CPU_CONFIGS):
        gc.collect()  # the engine before this one waits when it goes, and so does building one
        calls.clear()
        for _ in range(4):
            train(engine, next(batches))
        assert not calls, f"{name}: {len(calls)} device-wide waits in 4 steps"


def nonfinite(recipe: str) -> None:
    """A step whose gradients are not finite on ONE rank changes nothing on any, and is counted; the next one trains."""
    for name, engine, batches in engines(recipe, all_configs(recipe)):
        assert not train(engine, next(batches))
        before = copies(engine)
        good = next(batches)
        poison = torch.full_like(good.images, torch.inf) if world.rank else good.images
        assert train(engine, dataclasses.replace(good, images=poison)), f"{name}: not skipped"
        after = copies(engine)
        assert all(torch.equal(before[key], after[key]) for key in before), f"{name}: weights or moments moved"
        assert engine.skipped_steps == 1, f"{name}: {engine.skipped_steps} skips counted"
        if isinstance(engine, DeepSpeedEngine):
            engine.layout.check()
        assert not train(engine, next(batches))
        moved = copies(engine)
        for kind in ("fp32|student.", "ema|student."):
            same = [torch.equal(after[key], moved[key]) for key in after if key.startswith(kind)]
            assert same and not all(same), f"{name}: {kind} stuck"
        assert all(bool(t.isfinite().all()) for t in moved.values()), f"{name}: not finite"
        assert engine.skipped_steps == 1


def guarded(recipe: str) -> None:
    """A loss that is not finite or spikes on ONE rank changes nothing on any; a gradient is limited inside its step."""
    config = GuardConfig(warmup=2, loss_spike=2.0, grad_spike=0.0)
    for name, engine, batches in engines(recipe, all_configs(recipe)):
        train(engine, next(batches), clip=1e-3)
        squares = sum(float(t.square().sum()) for k, t in copies(engine).items() if k.startswith("exp_avg|"))
        total = torch.tensor(squares)
        dist.all_reduce(total)
        assert abs(float(total.sqrt()) / (0.1 * 1e-3) - 1) < 0.02, f"{name}: moments of norm {float(total.sqrt())}"
        guard = StepGuard(config, 1, torch.device("cpu"))
        for _ in range(2):
            train(engine, next(batches), guard.check_loss)
        before, good = copies(engine), next(batches)
        for value, why in ((math.nan, "not finite"), (30.0, "above its limit")):
            skips = engine.skipped_steps
            factor = value if world.rank else 1.0
            skipped = train(engine, good, lambda loss: guard.check_loss(loss * factor))  # noqa: B023
            after = copies(engine)
            assert all(torch.equal(before[key], after[key]) for key in before), f"{name}: {why}: weights moved"
            assert skipped and engine.skipped_steps == skips + 1, f"{name}: {why}: not skipped"
            assert why in guard.cause()["why"], f"{name}: {guard.cause()}"
        train(engine, good, guard.check_loss)
        moved = copies(engine)
        assert not all(torch.equal(before[key], moved[key]) for key in before), f"{name}: stuck"


def whole_parameters(recipe: str) -> None:
    """`parameters` gives the rounded masters, whole and by prefix, and disturbs nothing."""
    for name, engine, batches in engines(recipe, [*CPU_CONFIGS, *TORCH]):
        first, second, third = (next(batches) for _ in range(3))
        train(engine, first)
        pieces: list[Any] = [None] * world.size
        dist.all_gather_object(pieces, copies(engine))
        shapes, masters = engine.describe()["shapes"], dict[str, Tensor]()
        for key, piece in sorted((item for of_rank in pieces for item in of_rank.items()), key=lambda i: order(i[0])):
            if key.startswith("fp32|"):
                parameter = key.split("|")[1]
                masters[parameter] = torch.cat((masters.get(parameter, piece[:0]), piece))
        seen = {n: (p.clone(), p.dtype) for n, p in engine.parameters()}
        assert list(seen) == [n for n in shapes if n in masters], f"{name}: names"
        for parameter, (value, dtype) in seen.items():
            expected = masters[parameter].view(shapes[parameter]).to(dtype)
            assert torch.equal(value, expected), f"{name}: {parameter}"
        assert {dtype for _, dtype in seen.values()} == {DTYPES.get(name.split("_")[-1], torch.float32)}, name
        heads = [n for n, _ in engine.parameters("student.blocks.0.")]
        assert heads and all(n.startswith("student.blocks.0.") for n in heads)
        train(engine, second)
        list(engine.parameters())
        train(engine, third)
        disturbed = copies(engine)
        for _, again, _ in engines(recipe, [name]):
            for batch in (first, second, third):
                train(again, batch)
            undisturbed = copies(again)
        assert all(torch.equal(disturbed[key], undisturbed[key]) for key in disturbed), f"{name}: disturbed"


def order(key: str) -> tuple[str, str, int]:
    kind, name, start = key.split("|")
    return kind, name, int(start)


def planted_faults(recipe: str) -> None:
    """The map's self-test notices weights that differ from their masters, and a step counter that ran away."""
    for name, engine, _ in engines(recipe, ["cpu_zero1_fp32", "cpu_zero2_bf16", "cpu_zero3_fp16"]):
        engine.layout.check()
        first = engine.layout.fragments[0]
        if world.rank == 1:
            with torch.no_grad():
                engine.layout.view(first, "fp32").add_(1.0)
        expect(LayoutError, engine.layout.check, f"{name}: master changed on one rank")
        if world.rank == 1:
            with torch.no_grad():
                engine.layout.view(first, "fp32").sub_(1.0)
        saved, engine.layout.fragments = engine.layout.fragments, engine.layout.fragments[1:]
        expect(LayoutError, engine.layout.check, f"{name}: a fragment is missing")
        engine.layout.fragments = saved
        if len(engine.layout._leaves) > 1:
            engine.layout._base.state[engine.layout._leaves[0]]["step"] += 1
            expect(LayoutError, engine.layout.optimizer_step, f"{name}: one leaf is a step ahead")
        ds, places = engine._ds, engine.layout.places
        for owner, attribute in ((ds.optimizer, "clip_grad"), (ds, "micro_steps")):
            value = getattr(owner, attribute)
            delattr(owner, attribute)
            expect(LayoutError, partial(Layout, ds, AdamW, places), f"{name}: a release without {attribute}")
            setattr(owner, attribute, value)
    run = load_recipe(recipe)
    method = method_class("mae")(run, {})
    method.scale = torch.nn.Parameter(torch.tensor(1.0))
    expect(UserError, lambda: build(run, method), "a 0-dimensional parameter")


def expect(kind: type[Exception], work: Callable[[], object], what: str) -> None:
    try:
        work()
    except kind:
        return
    raise AssertionError(f"not noticed: {what}")


world: Any = None

if __name__ == "__main__":
    world = from_environment("cpu")
    open_process_group(world)
    cases = (oracle, nonfinite, guarded, whole_parameters, planted_faults, no_synchronise)
    {case.__name__: case for case in cases}[sys.argv[2]](sys.argv[1])
    dist.barrier()
    close_process_group()
    end_process(0)
