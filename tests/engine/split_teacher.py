"""Ranks that run teachers whole and split over the ranks, and write down what each of them saw and held."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mimscale.distributed.world import close_process_group, from_environment
from mimscale.engine.deepspeed_runtime import open_process_group
from mimscale.engine.sharded_module import split_over_ranks
from tests.teachers import tiny

SIZE = 64


def compare(config: Any, rank: int, split: Any) -> dict[str, float]:
    """Largest difference to the whole teacher over two batches of this rank's own images; share of the parameters."""
    whole = tiny.ensemble(config, SIZE)
    ours = tiny.ensemble(config.model_copy(update={"shard": True}), SIZE)
    ours.shard(split)
    error = 0.0
    for step in range(2):
        images = tiny.images(2, SIZE, seed=10 * step + rank)
        a, b = ours(images)["t"], whole(images)["t"]
        assert a.cls_attention is not None and b.cls_attention is not None and a.levels.keys() == b.levels.keys()
        pairs = [(a.levels[i], b.levels[i]) for i in a.levels] + [(a.cls_attention, b.cls_attention)]
        error = max(error, *(float((x.float() - y.float()).abs().max()) for x, y in pairs))
    parameters: list[Any] = list(ours.teachers["t"].parameters())
    resident = sum(p.numel() + p.ds_tensor.numel() for p in parameters)
    return {"error": error, "share": resident / sum(p.numel() for p in whole.teachers["t"].parameters())}


def main(out: Path) -> None:
    world = from_environment("cpu")
    open_process_group(world)
    configs = {
        "dinov3": tiny.timm_config("vit_base_patch16_dinov3", None, random=True),
        "dino bf16": tiny.timm_config("vit_base_patch16_224.dino", None, random=True, precision="bf16"),
        "open_clip": tiny.open_clip_config("ViT-B-16", None, random=True),
    }
    found = {
        name: compare(config, world.rank, lambda module: split_over_ranks(module, world, whole_below=0))
        for name, config in configs.items()
    }
    (out / f"{world.rank}.json").write_text(json.dumps(found))
    close_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
