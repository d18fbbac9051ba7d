"""README.md of a folder for the Hugging Face Hub, made of what the run left behind. Nothing in it is guessed."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mimscale import __version__
from mimscale.config.run import RunConfig, method_class
from mimscale.convert.networks import Student
from mimscale.convert.read import Loaded
from mimscale.errors import printable
from mimscale.files.eval_reports import BROKEN, Figure, figures_of

FILE = "README.md"
CHANGED = "differs_from_paper"  # an option of reports; `Figure.changed` has it in words
TO_FILL = "to be filled in"
MARKUP = re.compile(r"[\\`*|\[\]]")


@dataclass(frozen=True)
class Card:
    """name: of the model. usage: Python that loads `PATH`. left: what the folder leaves out. report: its JSON."""

    name: str
    library: str
    usage: str
    task: str
    left: Sequence[str]
    report: Mapping[str, Any]


def text(card: Card, loaded: Loaded, vit: Student) -> str:
    """The card, Markdown with the Hub's header."""
    run = loaded.run
    parts = [_header(card, run), f"# {_cell(card.name)}\n", _about(card, loaded, vit), _usage(card)]
    parts += [_results(loaded), _training(loaded), _limits(card, loaded, vit), _licence(), _conversion(card)]
    return "\n".join(parts)


def _header(card: Card, run: RunConfig | None) -> str:
    tags = ["mimscale", "masked-image-modeling", *([run.method.name] if run else [])]
    values = {"library_name": card.library, "pipeline_tag": card.task, "tags": tags}
    fill = f"# license: {TO_FILL}; see section Licence"
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}{fill}\n---\n"


def _about(card: Card, loaded: Loaded, vit: Student) -> str:
    c, size = vit.config, vit.grid[0] * vit.config.patch
    lines = [f"{type(vit).__name__}: width {c.width}, {c.depth} blocks, {c.heads} heads, patches of {c.patch} px,"]
    lines.append(f"images of {size} x {size} px, {sum(p.numel() for p in vit.parameters()):,} parameters (encoder).")
    if loaded.run is not None:
        lines += ["", f"Method: {_method_line(loaded.run.method.name)}"]
    if loaded.ema:
        lines += ["", "The weights are the exponential moving average of the trained ones."]
    return "\n".join(lines) + "\n"


def _usage(card: Card) -> str:
    where = "PATH: this folder" + (
        ", or `hf-hub:ORG/NAME` in place of `local-dir:PATH`" if card.library == "timm" else ", or ORG/NAME on the Hub"
    )
    own = "import mimscale\n\nencoder = mimscale.load_encoder('PATH')  # images -> tokens, class token, mean of patches"
    theirs = f"import {card.library}\n\nmodel = {card.usage}"
    return f"## Use\n\n{where}.\n\n```python\n{theirs}\n```\n\n```python\n{own}\n```\n"


def _results(loaded: Loaded) -> str:
    lines = ["## Results\n"]
    folder = _run_folder(loaded)
    unreadable: list[str] = []
    figures = list(_figures(folder, unreadable)) if folder is not None else []
    if not figures:
        lines.append("No report of `mimscale evaluate` was found: nothing is known of the quality of these weights.\n")
    else:
        lines += ["| protocol | metric | value | pool | weights | options | data |", "|" + " --- |" * 7]
        for figure in figures:
            own = figure.sha256 == loaded.sha256()
            weights = "these" if own else f"other (step {'unknown' if figure.step is None else figure.step})"
            options = [f"{key} = {_plain(value)}" for key, value in figure.options.items() if key != CHANGED]
            words = [*(f"not as published: {line}" for line in figure.changed), *options]
            row = (figure.protocol, figure.metric, f"{figure.value:.1f}", figure.pool, weights, "; ".join(words))
            lines.append(f"| {' | '.join(map(_cell, (*row, (figure.val or 'unknown')[:12])))} |")
        lines.append("")
    lines += [f"Left out, because it is no report: {_cell(name)}\n" for name in unreadable]
    if loaded.run is not None and loaded.run.expected:
        lines += ["The recipe expects (published values, not measured here):\n"]
        for name, wanted in loaded.run.expected.items():
            lines.append(f"- {name}: {wanted.value:.1f} % ({_cell(wanted.source)})")
        lines.append("")
    return "\n".join(lines)


def _training(loaded: Loaded) -> str:
    run, data = loaded.run, loaded.data or "unknown"
    lines = ["## Training\n", f"- data: {TO_FILL} (name and source); fingerprint of content and order: `{data}`"]
    if run is None:
        return "\n".join([*lines, "- recipe: unknown, the source is a file of weights without one\n"])
    length = f"{run.schedule.steps} steps" if run.schedule.steps else f"{run.schedule.epochs} epochs"
    step = "unknown" if loaded.step is None else loaded.step
    folder = _run_folder(loaded)
    ended = folder is not None and _last_step(folder) == loaded.step
    state = "its last one" if ended else "which was not known to be its last one"
    lines.append(f"- checkpoint of step {step} of a run of {length}, {state}")
    lines.append(f"- precision and ZeRO stage: `{_plain(run.engine.ds_config)}`\n")
    recipe = {key: _without_place(value) for key, value in run.shaping().items()}
    shown = yaml.safe_dump(recipe, sort_keys=False, default_flow_style=None, allow_unicode=True, width=100)
    lines.append(f"The values of the recipe that decide the result, without paths:\n\n```yaml\n{shown}```\n")
    return "\n".join(lines)


def _limits(card: Card, loaded: Loaded, vit: Student) -> str:
    size = vit.grid[0] * vit.config.patch
    lines = [f"- Trained and compared at {size} x {size} px. Other sizes need resized positions."]
    if card.task == "image-feature-extraction":
        lines.append("- An encoder of features: it names no classes, and was not trained with texts.")
    lines += [f"- {line[0].upper()}{line[1:]}." for line in card.left]
    lines.append("- Whatever bias the training images have may be in the features; it was not measured.")
    lines.append(f"- Intended use and known failures: {TO_FILL}.")
    return "## Limits\n\n" + "\n".join(lines) + "\n"


def _licence() -> str:
    return (
        f"## Licence\n\n- weights: {TO_FILL} (then set `license` in the header)\n- training images: {TO_FILL}\n"
        f"- weights that the training began with, and teachers: {TO_FILL}\n"
    )


def _conversion(card: Card) -> str:
    found = [f"{name} {value:.1e}" for name, value in card.report["differences"].items()]
    other = card.report["compared_with"]
    with_whom = f"{other} and " if other else ""
    return (
        f"## Conversion\n\nWritten by mimscale {__version__} from {_cell(card.report['source'])} (sha256 "
        f"`{card.report['source_sha256']}`). Compared with {with_whom}its own reader on random input; largest "
        f"difference, of the largest output: {', '.join(found)}.\n"
    )


def _run_folder(loaded: Loaded) -> Path | None:
    """The run that a checkpoint folder lies in."""
    folder = loaded.path.resolve().parent.parent
    return folder if loaded.run is not None and (folder / "config.yaml").is_file() else None


def _figures(folder: Path, unreadable: list[str]) -> Iterator[Figure]:
    """Of all reports in the run, and in runs inside it. unreadable: gets the name of each file that is no report."""
    for path in sorted([*folder.glob("eval/*.json"), *folder.glob("*/eval/*.json")]):
        name = str(path.relative_to(folder))
        try:
            yield from figures_of(path, name)
        except BROKEN:
            unreadable.append(name)


def _last_step(folder: Path) -> int | None:
    """The step at which the run reached its end, None where it has not."""
    try:
        return int((folder / "done").read_text())
    except (OSError, ValueError):
        return None


def _method_line(name: str) -> str:
    """The first paragraph of the method's module, which names the paper."""
    words = sys.modules[method_class(name).__module__].__doc__ or name
    return " ".join(words.split("\n\n")[0].split())


def _without_place(value: Any) -> Any:
    """A path as its last part: the rest says where the run was made, and helps nobody."""
    if isinstance(value, str) and ("/" in value and value.startswith(("/", "~", "."))):
        return Path(value).name
    return [_without_place(item) for item in value] if isinstance(value, list) else value


def _plain(value: Any) -> str:
    return str(_without_place(value if not isinstance(value, Path) else str(value)))


def _cell(value: Any) -> str:
    """One line of text that ends no cell of a table, and is no markup (link, image, code, tag, entity)."""
    line = printable(" ".join(str(value).split())).replace("&", "&amp;").replace("<", "&lt;")
    return MARKUP.sub(r"\\\g<0>", line)
