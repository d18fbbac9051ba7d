"""Cost of attention-driven masking (AMT): CPU time that it adds to a training step, and the memory of its table.

CPU time of this process on one thread: the step and all parts are measured in every round, and the median is printed. A
part that is needed for a fraction of the images counts with this fraction. Memory: growth of the peak of a new process.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from mimscale.bench._report import publish

RECIPE = "amt_mae_vit_b16"
LIMIT_MB = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", default=RECIPE, help=f"recipe of the step that is measured (default: {RECIPE})")
    parser.add_argument("--batch", type=int, default=8, help="images per step (default: 8)")
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds (default: 3)")
    parser.add_argument("--samples", type=int, default=14_000_000, help="rows of the table (default: 14 million)")
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 8, 64], help="numbers of ranks (default: 1 8 64)")


def run(args: argparse.Namespace) -> int:
    parts = costs(args.recipe, args.batch, args.rounds)
    memory = [memory_row(args.samples, world) for world in args.worlds]
    heads = ["part of a step", "CPU ms per image", "of the step"]
    publish(args, [(heads, parts), (["ranks", "MB per rank", "limit"], memory)])
    return 0


# --------------------------------------------------------------------------------------------------------------- time


def costs(recipe: str, batch: int, rounds: int, overrides: Sequence[str] = ()) -> list[list[str]]:
    """Rows of the first table: the step, each part that AMT adds, and their sum."""
    import torch

    from mimscale.config.recipes import load_recipe

    torch.set_num_threads(1)
    run = load_recipe(recipe, [f"schedule.global_batch={batch}", "method.masking.warmup_epochs=0", *overrides])
    refresh = run.dump()["method"]["masking"]["refresh"]
    parts = {**_step_parts(run, batch, refresh), **_loader_parts(run, batch, refresh)}
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(rounds):
        for name, (work, _) in parts.items():
            seconds[name].append(_cpu_s(work))
    ms = {name: 1000 * statistics.median(seconds[name]) * share / batch for name, (_, share) in parts.items()}
    ms["resize the uncropped image"] -= ms.pop("load") * refresh  # it was measured together with the crop
    step = ms.pop("step")
    ms["draw the masks by importance"] -= ms.pop("draw uniform masks")
    rows = [["step: forward, backward, AdamW", f"{step:.1f}", "100 %"]]
    rows += [[name, f"{value:.2f}", f"{100 * value / step:.2f} %"] for name, value in ms.items()]
    total = sum(ms.values())
    return [*rows, ["AMT in all", f"{total:.2f}", f"{100 * total / step:.2f} %"]]


Part = tuple[Callable[[], Any], float]  # (work for one batch, fraction of the images that need it)


def _step_parts(run: Any, batch: int, refresh: float) -> dict[str, Part]:
    import torch

    from mimscale.config.run import method_class
    from mimscale.types import Batch, normalised

    torch.manual_seed(0)
    method = method_class(run.method.name)(run, {})
    method.before_run(100_000)
    policy, side = method.masking, run.data.image_size
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-4)
    noise = {name: torch.rand(batch, *n.shape).clamp_min(1e-6) for name, n in method.needs.noise.items()}
    pixels = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8)
    host = Batch(
        images=pixels,
        ids=torch.randint(0, 100_000, (batch,)),
        positions=torch.arange(batch),
        noise=noise,
        boxes=torch.rand(batch, 4) / 2,
        flips=torch.rand(batch) < 0.5,
        uncropped=pixels[:0],
        uncropped_rows=torch.arange(0),
    )
    ready = method.prepare(host).normalised()

    def step() -> None:
        method(ready, {})["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    def attend() -> None:
        with torch.no_grad():
            method.student(normalised(pixels), attention=True)

    step()  # the first step allocates the optimizer state
    return {
        "step": (step, 1.0),
        "forward pass of uncropped images": (attend, refresh),
        "read the importance": (lambda: method.prepare(host), 1.0),
        "draw the masks by importance": (lambda: policy.choose(ready, {}), 1.0),
        "draw uniform masks": (lambda: policy.warmup.choose(ready, {}), 1.0),
    }


def _loader_parts(run: Any, batch: int, refresh: float) -> dict[str, Part]:
    from data_prep.__main__ import main as data_prep
    from mimscale.data.loader import TrainLoader
    from mimscale.data.manifest import Manifest
    from mimscale.data.synthetic import make_image_folder
    from mimscale.types import Needs

    with tempfile.TemporaryDirectory() as folder:
        make_image_folder(Path(folder) / "images", classes=1, per_class=batch, side=400)
        with redirect_stdout(None), redirect_stderr(None):
            data_prep(["folder", f"{folder}/images", f"{folder}/shards"])
        manifest = Manifest.load(Path(folder) / "shards")
        data = run.data.model_copy(update={"shards": manifest.folder, "workers": 0})

        def batches(uncropped: int) -> Any:
            needs = Needs(uncropped_images=uncropped)
            loader = TrainLoader(manifest, data, needs, seed=0, global_batch=batch, micro_batch=batch, rank=0, world=1)
            endless = iter(loader)
            next(endless)  # opens the shard, which stays readable
            return endless

        plain, both = batches(0), batches(batch)
    return {"load": (lambda: next(plain), 1.0), "resize the uncropped image": (lambda: next(both), refresh)}


def _cpu_s(work: Callable[[], Any]) -> float:
    start_s = time.process_time()
    work()
    return time.process_time() - start_s


# ------------------------------------------------------------------------------------------------------------- memory


def memory_row(samples: int, world: int) -> list[str]:
    """[ranks, MB, limit] of the table of a 14 x 14 grid, on one of `world` ranks."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        grown = pool.apply(_grown_bytes, (samples, 196, world))
    return [str(world), f"{grown / 1e6:.0f}", f"{2900 / world * samples / 14e6 + LIMIT_MB:.0f}"]


def _grown_bytes(samples: int, width: int, world: int) -> int:
    """Growth of the peak memory of this process while a table is made, read and written."""
    import numpy as np
    import torch

    from mimscale.masking._amt_table import ImportanceTable

    torch.set_num_threads(1)
    before = _peak_bytes()
    rows = ImportanceTable(samples, width, 255, torch.device("cpu"), rank=0, world=world)
    random = np.random.default_rng(0)
    for number in range(50):
        ids = random.integers(0, math.floor(samples / world), (1, 64))  # rows that this rank has
        values = rows.read(ids)
        rows.write([ids[0]], [np.arange(64) + 64 * number], values, torch.ones(64, dtype=torch.bool))
    return _peak_bytes() - before


def _peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
