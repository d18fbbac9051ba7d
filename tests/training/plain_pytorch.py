"""A training run written out by hand in plain PyTorch, without our loop, engines, optimisers and parameter groups.

    torchrun -m tests.training.plain_pytorch RECIPE OUT.json

Both engines share the loop above them, so comparing them with each other would not notice its mistakes: when the rate
changes, how micro-batches are averaged, what is clipped. From the package come the model, the data and the schedule,
which have tests of their own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mimscale.config.recipes import load_recipe
from mimscale.config.run import method_class
from mimscale.data.loader import TrainLoader
from mimscale.data.manifest import Manifest
from mimscale.optim import lr_schedule


def main(recipe: str, out: str) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    run = load_recipe(recipe)
    optim: Any = run.optim
    assert isinstance(run.data.shards, str) and isinstance(run.engine.max_micro_batch, int)
    curve, manifest, micro = run.schedule, Manifest.load(run.data.shards), run.engine.max_micro_batch
    accumulation = curve.global_batch // (micro * world)
    torch.manual_seed(run.seed)
    model = method_class(run.method.name)(run, {})
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=optim.betas, eps=optim.eps)
    loader = TrainLoader(
        manifest,
        run.data,
        model.needs,
        seed=run.seed,
        global_batch=curve.global_batch,
        micro_batch=micro,
        rank=rank,
        world=world,
    )
    batches, per_epoch = iter(loader), manifest.samples // curve.global_batch
    result: dict[str, list[float]] = {"loss": [], "norm": [], "lr": []}
    for step in range(curve.steps or 0):
        rate = lr_schedule.cosine_at_step(
            step,
            per_epoch,
            peak=curve.peak_lr,
            min_lr=curve.min_lr,
            warmup_epochs=curve.warmup_epochs,
            epochs=(curve.steps or 0) / per_epoch,
        )
        total = torch.zeros(())
        for _ in range(accumulation):
            loss = model(next(batches).normalised(), {})["loss"] / accumulation
            loss.backward()
            total += loss.detach()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= world
        dist.all_reduce(total)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), run.optim.clip)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        for name, value in (("loss", float(total / world)), ("norm", float(norm)), ("lr", rate)):
            result[name].append(value)
    if rank == 0:
        Path(out).write_text(json.dumps(result))
    loader.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
