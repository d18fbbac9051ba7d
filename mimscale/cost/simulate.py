"""`mimscale plan RECIPE --simulate 8,64,256`: what every rank of many would do, computed from pure functions.

Nothing is started. Batches, positions in the data, partitions and files are those that the ranks of a real run compute;
memory and time are the model's. Start-up counts what each rank reads from a shared file system.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mimscale.cost.partition import kept
from mimscale.cost.planner import Planner, Prediction
from mimscale.data.order import rank_positions
from mimscale.engine.base import method_groups
from mimscale.errors import UserError
from mimscale.optim.optimizers.base import optimizer_class

CHECKED_BATCHES = 3
IMPORT_FILES, IMPORT_BYTES = 3_837, 3.8e9
"""Files that a rank opens to import torch (CUDA 13 build), DeepSpeed, timm and this package, counted by an audit hook,
with their size: 82 MB of Python, and 3.7 GB of shared libraries, which are mapped, so that this is the most that is
read."""
INDEX_BYTES = 24
"""Of the manifest's index and labels per sample; both are mapped (mimscale/data/manifest.py)."""


@dataclass(frozen=True)
class Start:
    """What a rank reads at its start: bytes of modules and libraries, of the data set's index, and of teachers'
    weights, at most; files: that it opens.
    """

    imports: float
    manifest: float
    teachers: float
    files: int

    @property
    def per_rank(self) -> float:
        return self.imports + self.manifest + self.teachers


@dataclass(frozen=True)
class Simulated:
    """One number of ranks. images: of the global batch that a rank computes in each step. positions: whether the ranks'
    positions are each of the global batch's exactly once. uneven: the largest rank's share of the optimiser's state
    over the mean. files, file_bytes: of a checkpoint, and of its largest file. messages, sent: collectives of a step,
    and bytes that each rank sends. start_bytes: read by all ranks together from the shared file system at the start;
    start_bytes_node: the same where one rank per node reads for all.
    """

    ranks: int
    prediction: Prediction
    images: int
    positions: bool
    uneven: float
    files: int
    file_bytes: float
    messages: int
    sent: float
    start_bytes: float
    start_bytes_node: float
    start_files: int
    images_per_s: float


def simulate(planner: Planner, counts: Sequence[int], samples: int, *, weak: bool = False) -> list[Simulated]:
    """Each number of ranks, with the best choice for it. weak: the global batch grows with the ranks, from the recipe's
    on the first of `counts`. Raises UserError where a batch does not divide, or nothing fits.
    """
    first, batch = counts[0], planner.config.schedule.global_batch
    return [_simulated(planner.on(ranks, batch * ranks // first if weak else batch), samples) for ranks in counts]


def _simulated(planner: Planner, samples: int) -> Simulated:
    ranks, batch = planner.ranks, planner.config.schedule.global_batch
    found = planner.best() or planner.predict(planner.asked())
    groups = [[p.numel() for p in g["params"]] for g in method_groups(planner.shapes.method, planner.config.optim)]
    if not found.zero.stage:
        groups = [[p.numel() for p in planner.shapes.method.parameters()]]
    elements = kept(groups, found.zero.stage, ranks)
    per_element = 4.0 * (1 + len(optimizer_class(planner.config.optim.name).STATES))
    start = start_of(planner, samples)
    nodes = planner.nodes
    return Simulated(
        ranks=ranks,
        prediction=found,
        images=batch // ranks,
        positions=covers(batch, ranks),
        uneven=float(elements.max() / elements.mean()),
        files=ranks + 2,
        file_bytes=float(elements.max()) * per_element,
        messages=sum(one.messages for one in found.collectives),
        sent=sum(one.wire(ranks) for one in found.collectives),
        start_bytes=start.per_rank * ranks,
        start_bytes_node=start.per_rank * nodes,
        start_files=start.files * ranks,
        images_per_s=batch / found.time.total,
    )


def covers(global_batch: int, ranks: int) -> bool:
    """Whether the positions of all ranks are those of the global batch, each once, for the first batches."""
    for batch in range(CHECKED_BATCHES):
        found = np.concatenate([rank_positions(batch, global_batch, rank, ranks) for rank in range(ranks)])
        if not np.array_equal(np.sort(found), np.arange(batch * global_batch, (batch + 1) * global_batch)):
            return False
    return True


def start_of(planner: Planner, samples: int) -> Start:
    """What one rank reads at its start. The page cache of a node gives later ranks what a first one has read, where the
    file system lets it cache; `jobs/` puts the environment on the nodes' own disks (SITE_ENV_TARBALL).
    """
    teachers = sum(4.0 * sum(p.numel() for p in teacher.parameters()) for teacher in planner.shapes.teachers.values())
    return Start(IMPORT_BYTES, float(INDEX_BYTES * samples), teachers, IMPORT_FILES + 3 + len(planner.shapes.teachers))


# ------------------------------------------------------------------------------------------------------------ report


def table(found: Sequence[Simulated]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows."""
    heads = ["ranks", "images per rank", "micro x acc", "engine", "GiB", "step ms", "images/s", "scaling", "limit"]
    heads += ["messages", "GB sent", "files", "MB per file", "read at start, GB", "one rank per node reads"]
    first = found[0]
    rows = []
    for one in found:
        choice, ideal = one.prediction.choice, first.images_per_s * one.ranks / first.ranks
        rows.append(
            [
                str(one.ranks),
                str(one.images),
                f"{choice.micro_batch} x {choice.accumulation}",
                choice.ds_config,
                f"{one.prediction.memory.total / 2**30:.1f}",
                f"{1e3 * one.prediction.time.total:.0f}",
                f"{one.images_per_s:,.0f}",
                f"{one.images_per_s / ideal:.0%}",
                one.prediction.time.limit,
                str(one.messages),
                f"{one.sent / 1e9:.2f}",
                f"{one.files:,}",
                f"{one.file_bytes / 1e6:,.1f}",
                f"{one.start_bytes / 1e9:,.0f}",
                f"{one.start_bytes_node / 1e9:,.0f}",
            ]
        )
    return heads, rows


def plot(strong: Sequence[Simulated], weak: Sequence[Simulated], title: str, path: Path) -> None:
    """Images per second over the ranks, predicted: strong and weak scaling beside the ideal. PNG or SVG, by the name.

    Raises UserError where matplotlib is not installed or the file cannot be written.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, LogLocator
    except ImportError:
        raise UserError("--plot needs matplotlib; pip install -e '.[demo]'") from None
    matplotlib.rcParams["svg.hashsalt"] = "mimscale"  # the same file for the same numbers
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axes = figure.add_subplot()
    ranks = [one.ranks for one in strong]
    ideal = [strong[0].images_per_s * count / ranks[0] for count in ranks]
    batch = strong[0].images * ranks[0]
    axes.plot(ranks, [one.images_per_s for one in strong], "o-", label=f"strong: global batch {batch:,}")
    axes.plot(ranks, [one.images_per_s for one in weak], "s--", label=f"weak: {weak[0].images} images per GPU")
    axes.plot(ranks, ideal, ":", color="black", label="ideal")  # on top, because weak scaling lies near it
    axes.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="images/s, predicted")
    axes.set_title(title, parse_math=False)  # a dollar in the name of a recipe begins no formula
    axes.set_xticks(ranks, [str(count) for count in ranks])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:,.0f}"))
    axes.legend(frameon=False)
    try:
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot {path} cannot be written: {error}") from None
