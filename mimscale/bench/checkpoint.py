"""Cost of a ViT-H checkpoint at 8, 64 and 512 ranks: files, bytes, and the seconds of the work of single processes.

The ranks are simulated: the shard of rank 0 is copied, written, hashed and synced; the files of the other ranks have
the right size and no content. The manifest is complete and holds the fragments of all ranks under ZeRO-3, the largest.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", default="mae_vit_h14", help="recipe of the student and decoder that are counted")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--folder", type=Path, help="a disk with room for one rank's shard (default: /tmp)")


def run(args: argparse.Namespace) -> int:
    from mimscale.bench._report import publish

    shapes, kinds = parameter_sizes(args.recipe), fragment_kinds(args.recipe)
    rows: list[list[str]] = []
    starts: list[list[str]] = []
    for world in args.ranks:
        folder = Path(tempfile.mkdtemp(prefix="bench-", dir=args.folder))
        try:
            row, start = measure(shapes, kinds, world, folder)
            rows.append(row)
            starts.append(start)
        finally:
            shutil.rmtree(folder)
    shard = ["ranks", "files", "GB in all", "manifest MB", "copy s", "write s", "commit s", "open s", "read share s"]
    manifest = [
        "ranks",
        "open CPU s",
        "sent MB",
        "take CPU s",
        "CPU s of all",
        "if each opened",
        "MB read",
        "if each read",
    ]
    what = f"{args.recipe}: {sum(shapes.values()) / 1e6:.0f} M parameters, of each {', '.join(kinds)} in float32"
    publish(args, [(shard, rows), (manifest, starts)], [what])
    return 0


def parameter_sizes(recipe: str) -> dict[str, int]:
    """Name -> number of elements, without allocating any."""
    import torch

    from mimscale.config.recipes import load_recipe
    from mimscale.config.run import method_class

    config = load_recipe(recipe)
    with torch.device("meta"):
        method = method_class(config.method.name)(config, {})
    return {name: parameter.numel() for name, parameter in method.named_parameters()}


def fragment_kinds(recipe: str) -> tuple[str, ...]:
    """The kinds of fragments that a checkpoint holds of each parameter, all float32."""
    from mimscale.config.recipes import load_recipe
    from mimscale.optim.optimizers.base import optimizer_class

    return ("fp32", *optimizer_class(load_recipe(recipe).optim.name).STATES)


def zero3_slices(sizes: dict[str, int], rank: int, world: int) -> list[tuple[str, int, int]]:
    """(name, start, length) of the slice of each parameter that ZeRO-3 gives a rank."""
    slices = []
    for name, size in sizes.items():
        share = -(-size // world)
        length = max(0, min(share, size - rank * share))
        if length:
            slices.append((name, rank * share, length))
    return slices


def measure(sizes: dict[str, int], kinds: tuple[str, ...], world: int, folder: Path) -> tuple[list[str], list[str]]:
    """A row for the cost of a checkpoint, and a row for the cost of its manifest at the start of a run."""
    import pickle

    import torch

    from mimscale.checkpoint import format as checkpoint
    from mimscale.checkpoint.host_buffer import HostBuffer

    live = {
        f"{kind}|{name}|{start}": torch.full((length,), 0.5)
        for name, start, length in zero3_slices(sizes, 0, world)
        for kind in kinds
    }
    copy = HostBuffer(live)
    copy_s, _ = timed(lambda: copy.fill(live))
    temporary, final = folder / ".tmp-step-00000001", checkpoint.step_folder(folder, 1)
    temporary.mkdir()
    write_s, (size, digest) = timed(lambda: copy.write(temporary / checkpoint.shard_name(0, world)))
    shards: list[dict[str, Any]] = []
    for rank in range(world):
        pieces = zero3_slices(sizes, rank, world)
        rows = [[list(kinds), *piece] for piece in pieces]
        name = checkpoint.shard_name(rank, world)
        bytes_here = size if rank == 0 else 4 * len(kinds) * sum(length for _, _, length in pieces)
        if rank:
            with (temporary / name).open("wb") as file:
                file.truncate(bytes_here)
        shards.append({"file": name, "bytes": bytes_here, "sha256": digest, "fragments": rows})
    meta = {"step": 1, "shapes": {name: [count] for name, count in sizes.items()}}
    commit_s, _ = timed(lambda: checkpoint.commit(temporary, final, shards, meta))
    cpu_s = time.process_time()
    open_s, reader = timed(lambda: checkpoint.CheckpointReader(final))
    open_cpu_s = time.process_time() - cpu_s
    sent = pickle.dumps(reader)
    cpu_s = time.process_time()
    pickle.loads(sent)
    take_s = time.process_time() - cpu_s

    def read_share() -> None:
        for key, tensor in live.items():
            kind, name, start = key.split("|")
            reader.into(kind, name, int(start), tensor)

    read_s, _ = timed(read_share)
    gigabytes = sum(shard["bytes"] for shard in shards) / 1e9
    manifest = (final / "manifest.json").stat().st_size / 1e6
    seconds = [f"{value:.3f}" for value in (copy_s, write_s, commit_s, open_s, read_s)]
    all_s = open_cpu_s + world * take_s
    start = [str(world), f"{open_cpu_s:.3f}", f"{len(sent) / 1e6:.2f}", f"{take_s:.4f}", f"{all_s:.2f}"]
    start += [f"{world * open_cpu_s:.2f}", f"{manifest:.2f}", f"{world * manifest:.0f}"]
    return [str(world), str(len(list(final.iterdir()))), f"{gigabytes:.2f}", f"{manifest:.2f}", *seconds], start


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start_s = time.perf_counter()
    result = work()
    return time.perf_counter() - start_s, result
