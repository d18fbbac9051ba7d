"""The tables of docs/plan.md, in Markdown: inputs, comparison with measured steps, and all published recipes."""

from __future__ import annotations

from collections.abc import Sequence

from mimscale.config.recipes import fingerprint, load_recipe, recipe_names
from mimscale.cost.devices import DEVICES, GIB, INTERCONNECTS, HostCost
from mimscale.cost.measured import Compared
from mimscale.cost.planner import Planner
from mimscale.cost.report import make_plan
from mimscale.cost.run_cost import IMAGENET
from mimscale.files.progress import tracked

Titled = tuple[str, list[str], list[list[str]]]  # title, columns, rows of cells


def inputs() -> list[Titled]:
    """Devices, networks and the host's cost."""
    heads = ["GPU", "peak bf16", "fp16", "a step's products", "memory", "free", "bandwidth", "link", "source"]
    rows = []
    for row in DEVICES.values():
        peaks = [f"{row.peak[name] / 1e12:,.4g}" if name in row.peak else "" for name in ("bf16", "fp16")]
        reached = f"{100 * row.matmul * row.efficiency:.0f} %"
        sizes = [f"{row.memory / GIB:.1f} GiB", f"{(row.memory - row.reserved) / GIB:.1f} GiB"]
        rates = [f"{row.bandwidth / 1e12:.3g} TB/s", f"{row.link / 1e9:.0f} GB/s"]
        rows.append([row.name, *peaks, reached, *sizes, *rates, row.source])
    links = [
        [
            link.name,
            f"{link.bandwidth / 1e9:.4g} GB/s",
            f"{link.efficiency:.0%}",
            f"{1e6 * link.latency:.0f} us",
            link.source,
        ]
        for link in INTERCONNECTS.values()
    ]
    host = HostCost()
    costs = [[name, f"{1e6 * getattr(host, name):,.0f} us"] for name in HostCost.__dataclass_fields__]
    return [
        ("", heads, rows),
        ("", ["network", "per node", "reached", "latency", "source"], links),
        ("", ["cost of the host", "per occurrence"], costs),
    ]


def fit(compared: Sequence[Compared]) -> tuple[list[Titled], list[str]]:
    """Measured steps beside the model's, and remarks on some."""
    heads = [
        "recipe",
        "batch",
        "engine",
        "recompute",
        "ms measured",
        "predicted",
        "error",
        "GiB measured",
        "predicted",
        "error",
    ]
    rows = []
    for one in compared:
        row = one.row
        changed = "".join(f", {word.split('.')[-1]}" for word in row.overrides if word.endswith("fp8"))
        rows.append(
            [
                row.recipe + changed,
                str(row.micro_batch),
                row.ds_config,
                str(row.recompute_every or "off"),
                f"{row.ms:.0f}",
                f"{one.ms:.0f}",
                f"{one.time_error:+.1%}",
                f"{row.gib:.1f}",
                f"{one.gib:.1f}",
                f"{one.memory_error:+.1%}{' *' if row.note else ''}",
            ]
        )
    remarks = [f"\\* {one.row.note}" for one in compared if one.row.note]
    return [("", heads, rows)], remarks


def published() -> list[str]:
    """Recipes for a GPU: not the tiny ones and those of the demo."""
    return [name for name in recipe_names() if not name.endswith("_tiny") and not name.startswith("demo_")]


CLUSTERS = (("a100", "ib8x200", 8), ("h100", "ib8x400", 64))


def all_recipes() -> list[Titled]:
    """A table for each of `CLUSTERS`, a row per published recipe: the best choice in the recipe's precision."""
    heads = [
        "recipe",
        "GFLOP/image",
        "micro x acc",
        "recompute",
        "GiB",
        "step ms",
        "GPU ms",
        "images/s",
        "MFU",
        "GPU-hours",
    ]
    rows: list[list[list[str]]] = [[] for _ in CLUSTERS]
    known: dict[str, Planner] = {}
    names = published()
    for name in tracked(names, len(names), "planning", "recipes"):
        config = load_recipe(name)
        parts = config.model_dump(
            mode="json", include={"data": {"image_size"}, "student": True, "teachers": True, "method": True}
        )
        shape = fingerprint(parts)
        for found, (gpu, link, ranks) in zip(rows, CLUSTERS, strict=True):
            if shape not in known:
                known[shape] = Planner(config, DEVICES[gpu], INTERCONNECTS[link], ranks, 8)
            planner = known[shape].like(config, DEVICES[gpu], INTERCONNECTS[link], ranks)
            found.append(_row(name, planner))
    return [
        (f"{ranks} x {gpu}{f', {link}' if ranks > 8 else ''}:", heads, found)
        for found, (gpu, link, ranks) in zip(rows, CLUSTERS, strict=True)
    ]


def _row(name: str, planner: Planner) -> list[str]:
    plan = make_plan(planner, IMAGENET, True)
    best, cost = plan.chosen, plan.cost
    return [
        name,
        f"{planner.flops.training / 1e9:.0f}",
        f"{best.choice.micro_batch} x {best.choice.accumulation}",
        str(best.choice.recompute_every or "off"),
        f"{best.memory.total / GIB:.1f}",
        f"{1e3 * best.time.total:.0f}",
        f"{1e3 * best.time.gpu:.0f}",
        f"{cost.images_per_s:,.0f}",
        f"{cost.mfu:.0%}",
        f"{cost.gpu_hours:,.0f}",
    ]
