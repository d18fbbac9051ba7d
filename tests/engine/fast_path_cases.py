"""Fast paths and their plain twins in live engines, started on two ranks by test_fast_paths.py."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mimscale.checkpoint import format as checkpoint
from mimscale.config.deepspeed import load_ds_config
from mimscale.distributed.end_process import end_process
from mimscale.distributed.world import close_process_group, from_environment
from mimscale.engine.deepspeed_engine import DeepSpeedEngine
from mimscale.engine.deepspeed_runtime import open_process_group
from tests.checkpoint.shards import write_shard
from tests.engine import cases
from tests.engine.cases import CPU_CONFIGS, all_configs, copies, engines, train

ENGINE_PATHS = "engine.plain=[flat_parameters,norm_check,fused_update]"
OLD = ("cpu_zero2_fp32", "cpu_zero3_fp32", "cpu_zero2_fp16", "cpu_zero3_bf16", "cpu_zero0_fp32")
NEW = ("cpu_zero3_fp32", "cpu_zero1_fp32", "cpu_zero3_fp16", "cpu_zero2_bf16", "cpu_zero2_fp32")


def bad_element(recipe: str) -> None:
    """One gradient element of one parameter on ONE rank is inf or NaN: all ranks skip, and count, and nothing moves."""
    for name, engine, batches in engines(recipe, all_configs(recipe)):
        assert not train(engine, next(batches), clip=0.5)
        before, scale = copies(engine), engine.loss_scale
        holders = [p for p in engine._module.parameters() if p.requires_grad]
        for number, value in enumerate((math.inf, math.nan, -math.inf), start=1):
            hook = holders[number * len(holders) // 4].register_hook(lambda g, v=value: spoilt(g, v))
            assert train(engine, next(batches), clip=0.5 * (number % 2)), f"{name}: {value} not skipped"
            hook.remove()
            after = copies(engine)
            assert all(torch.equal(before[key], after[key]) for key in before), f"{name}: {value}: moved"
            assert engine.skipped_steps == number, f"{name}: {engine.skipped_steps} skips counted"
        assert engine.describe()["engine"]["counters"]["skipped_steps"] == 3
        if scale is not None:  # the first is forgiven, each further one halves it
            assert engine.loss_scale == scale / 4, f"{name}: loss scale {scale} -> {engine.loss_scale}"
        assert not train(engine, next(batches), clip=0.5) and math.isfinite(engine.gradient_norm())
        assert any(not torch.equal(before[key], tensor) for key, tensor in copies(engine).items()), f"{name}: stuck"


def spoilt(gradient: Tensor, value: float) -> Tensor:
    """A gradient, on rank 1 with `value` as its middle element."""
    changed = gradient.clone()
    if cases.world.rank:
        changed.view(-1)[changed.numel() // 2] = value
    return changed


def equal_numbers(recipe: str) -> None:
    """Three steps of either twin end at the same weights up to rounding, with clipping and activation checkpointing.

    Also where flat parameters are larger than a bucket.
    """
    for name in [*CPU_CONFIGS, *small_buckets(recipe)]:
        ends: list[dict[str, Tensor]] = []
        for overrides in ([], [ENGINE_PATHS]):
            more = [*overrides, "engine.activation_checkpointing=2"]
            for _, engine, batches in engines(recipe, [name], more):
                flat = "flat_parameters (" in engine.notes[0].partition(";")[0]
                assert flat is not bool(overrides), engine.notes
                norms = []
                for _ in range(3):
                    assert not train(engine, next(batches), clip=0.5)
                    norms.append(engine.gradient_norm())
                ends.append({**whole(engine), "norms": torch.tensor(norms)})
        fast, plain = ends
        limit = 1e-5 if "fp32" in name else 1e-4
        assert fast.keys() == plain.keys()
        for key, tensor in fast.items():
            if key.endswith("qkv.bias"):
                continue  # a key's bias has no gradient but rounding, which Adam divides by its own size
            apart = float((tensor - plain[key]).abs().max())
            assert apart < limit, f"{name}: {key} is {apart:.1e} apart"


def small_buckets(recipe: str) -> list[str]:
    """Files with buckets that hold less than a Block."""
    paths = [Path(recipe).with_name(f"small_{name}_{cases.world.rank}.json") for name in ("zero2_bf16", "zero3_fp32")]
    for path in paths:
        values = load_ds_config("cpu_" + "_".join(path.stem.split("_")[1:3]))
        values["zero_optimization"]["reduce_bucket_size"] = 5_000
        path.write_text(json.dumps(values))
    return [str(path) for path in paths]


def whole(engine: Any) -> dict[str, Tensor]:
    """All that a checkpoint would hold, whole, by "kind|name"."""
    pieces: list[Any] = [None] * cases.world.size
    dist.all_gather_object(pieces, copies(engine))
    joined: dict[str, list[Tensor]] = {}
    for key, piece in sorted((item for of_rank in pieces for item in of_rank.items()), key=lambda i: cases.order(i[0])):
        joined.setdefault(key.rpartition("|")[0], []).append(piece)
    return {key: torch.cat(parts) for key, parts in joined.items()}


def old_checkpoints(recipe: str) -> None:
    """Written by the plain twin, read by the fast one at another stage, written again, read by the plain one: the same
    bits each time, and the plain run goes on as if it had never stopped.
    """
    for turn, (old, new) in enumerate(zip(OLD, NEW, strict=True)):
        folder = Path(recipe).parent / f"{turn}"
        for _, engine, batches in engines(recipe, [old], [ENGINE_PATHS]):
            first, bad, second, third = (next(batches) for _ in range(4))
            train(engine, first, clip=0.5)
            assert train(engine, dataclasses.replace(bad, images=bad.images * math.nan))
            train(engine, second, clip=0.5)
            written, start = save(engine, folder / "old"), whole(engine)
            train(engine, third, clip=0.5)
            end = whole(engine)
        for _, engine, _ in engines(recipe, [new]):
            load(engine, written)
            same(whole(engine), start, f"{old} -> flat {new}")
            assert engine.skipped_steps == 1 and engine.describe()["groups"] == written.meta["groups"]
            rewritten = save(engine, folder / "new")
            assert rewritten.meta["shapes"] == written.meta["shapes"]
            train(engine, third, clip=0.5)
            masters = {k: v for k, v in whole(engine).items() if k.startswith("fp32|") and not k.endswith("qkv.bias")}
            apart = max(float((value - end[key]).abs().max()) for key, value in masters.items())
            assert apart < (1e-5 if old.endswith("fp32") else 1e-3), f"{old} -> flat {new}: {apart:.1e} apart"
        for _, engine, _ in engines(recipe, [old], [ENGINE_PATHS]):
            load(engine, rewritten)
            train(engine, third, clip=0.5)
            same(whole(engine), end, f"{old} -> flat {new} -> {old}")
            assert engine.skipped_steps == 1


def save(engine: Any, final: Path) -> checkpoint.CheckpointReader:
    temporary = final.with_name(f"{final.name}.tmp")
    shards: list[Any] = [None] * cases.world.size
    dist.all_gather_object(shards, write_shard(temporary, engine.fragments(), cases.world.rank, cases.world.size))
    if cases.world.rank == 0:
        checkpoint.commit(temporary, final, shards, {"step": 3, **engine.describe()})
    dist.barrier()
    return checkpoint.CheckpointReader(final)


def load(engine: Any, reader: checkpoint.CheckpointReader) -> None:
    engine.load(reader)
    engine.finish_load(reader)
    if isinstance(engine, DeepSpeedEngine):
        engine.layout.check()


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor], what: str) -> None:
    assert ours.keys() == theirs.keys(), what
    different = [key for key in ours if not torch.equal(ours[key], theirs[key])]
    assert not different, f"{what}: {different[:3]} differ"


if __name__ == "__main__":
    cases.world = from_environment("cpu")
    open_process_group(cases.world)
    for case in (bad_element, equal_numbers, old_checkpoints):
        case(sys.argv[1])
    dist.barrier()
    close_process_group()
    end_process(0)
