"""The same recipe in plain PyTorch: DistributedDataParallel, AdamW, no DeepSpeed. Run by torchrun from test_zero.py."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mimscale.config.recipes import load_recipe
from mimscale.config.run import method_class
from mimscale.data.loader import TrainLoader
from mimscale.data.manifest import Manifest
from mimscale.optim import lr_schedule
from mimscale.optim.param_groups import parameter_groups
from mimscale.training.micro_batch import solve_micro_batch


def main(recipe: str, out: str) -> None:
    dist.init_process_group("gloo")
    run, manifest = load_recipe(recipe), Manifest.load(load_recipe(recipe).data.shards)
    curve, world = run.schedule, dist.get_world_size()
    micro, accumulation = solve_micro_batch(curve.global_batch, world, run.engine.max_micro_batch)
    torch.manual_seed(run.seed)
    method = method_class(run.method.name)(run, {})
    model = DistributedDataParallel(method)
    optimizer = torch.optim.AdamW(
        parameter_groups(method, weight_decay=run.optim.weight_decay), lr=0.0, betas=run.optim.betas, eps=run.optim.eps
    )
    loader = TrainLoader(
        manifest,
        run.data,
        method.needs,
        seed=run.seed,
        global_batch=curve.global_batch,
        micro_batch=micro,
        rank=dist.get_rank(),
        world=world,
    )
    batches, result = iter(loader), {"loss": [], "norm": [], "lr": []}  # type: ignore[var-annotated]
    per_epoch = manifest.samples // curve.global_batch
    for step in range(curve.steps or 0):
        rate = lr_schedule.lr(
            step,
            per_epoch,
            peak=curve.peak_lr,
            min_lr=curve.min_lr,
            warmup_epochs=curve.warmup_epochs,
            epochs=(curve.steps or 0) / per_epoch,
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        total = torch.zeros(())
        for index in range(accumulation):
            batch = next(batches).normalised()
            with model.no_sync() if index + 1 < accumulation else nullcontext():
                loss = model(batch, {})["loss"] / accumulation
                loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(method.parameters(), run.optim.clip)
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(total)
        result["loss"].append(float(total / world))
        result["norm"].append(float(norm))
        result["lr"].append(rate)
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(result))
    loader.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
