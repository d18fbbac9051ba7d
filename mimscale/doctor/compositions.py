"""Which method works with which masking policy and fusion, according to the checks before a run.

`mimscale doctor --compositions` prints the table of docs/compositions.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

from mimscale.config.recipes import validate
from mimscale.config.registry import names_in
from mimscale.config.run import method_class, method_names
from mimscale.errors import UserError
from mimscale.methods.base import MaskedConfig
from mimscale.models.fusion import FusionConfig
from mimscale.types import TeacherInfo

DEPTH, SIZE = 12, 64
NO_CLASS_TOKEN = TeacherInfo("t", dim=24, depth=DEPTH + 1, grid=(4, 4), image_size=SIZE, has_cls=False)
OTHER_DEPTH = replace(NO_CLASS_TOKEN, has_cls=True)
TEACHERS = {  # from no teacher to the one that satisfies most requirements
    "yes": {},
    "teacher": {"t": NO_CLASS_TOKEN},
    "teacher with class token": {"t": OTHER_DEPTH},
    "teacher with class token, as deep": {"t": replace(OTHER_DEPTH, depth=DEPTH)},
}


def methods() -> list[str]:
    """The methods that mask."""
    return [name for name in method_names() if issubclass(method_class(name).Config, MaskedConfig)]


def fusions(method: str) -> list[tuple[str, dict[str, Any]]]:
    """The fusions of a method: (label, section of the recipe)."""
    field: Any = method_class(method).Config.model_fields.get("fusion")
    if field is None:
        return [("none", {})]
    if not isinstance(field.default, FusionConfig):
        return [(kind, {"fusion": kind}) for kind in get_args(field.annotation)]
    options = type(field.default).model_fields
    found = []
    for kind in get_args(options["kind"].annotation):
        for feeds in get_args(options["feeds"].annotation) if "feeds" in options and kind != "none" else [None]:
            section = {"kind": kind, "levels": [] if kind == "none" else [0, DEPTH - 1]}
            section |= {"feeds": feeds} if feeds else {}
            found.append((f"{kind}, feeds {feeds}" if feeds else kind, {"fusion": section}))
    return found


def answer(method: str, policy: str, section: dict[str, Any]) -> tuple[str, list[str]]:
    """(the first of `TEACHERS` with which the checks pass, or "no"; the reasons why those before were refused)."""
    values = {
        "data": {"shards": "shards", "image_size": SIZE},
        "student": {"width": 32, "depth": DEPTH, "heads": 2},
        "method": {"name": method, "masking": {"policy": policy}, **section},
        "schedule": {"global_batch": 1024, "epochs": 400, "base_lr": 1e-3},
    }
    reasons: list[str] = []
    for text, teachers in TEACHERS.items():
        try:
            method_class(method).check(validate(values, source=method), teachers)
            return text, reasons
        except UserError as error:
            reasons.append(str(error))
    return "no", reasons


def table(names: Sequence[str] = (), policies: Sequence[str] = ()) -> str:
    """`cells` in Markdown, and below the table the reasons, numbered."""
    columns, rows, reasons = cells(names, policies)
    lines = [columns, ["---"] * len(columns), *rows]
    text = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([*text, "", *(f"{number}. {reason}" for number, reason in enumerate(reasons, start=1))])


def cells(names: Sequence[str] = (), policies: Sequence[str] = ()) -> tuple[list[str], list[list[str]], list[str]]:
    """(columns: method, fusion and each policy; a row per method and fusion; the reasons of refusals).

    names, policies: of the rows and columns; without them all that there are.
    """
    policies = policies or names_in("mimscale.masking")
    rows = []
    known: dict[str, int] = {}
    for method in names or methods():
        for fusion, section in fusions(method):
            row = [method, fusion]
            for policy in policies:
                text, reasons = answer(method, policy, section)
                marks = [str(known.setdefault(reason, len(known) + 1)) for reason in dict.fromkeys(reasons)]
                row.append(f"{text} ({', '.join(marks)})" if marks else text)
            rows.append(row)
    return ["method", "fusion", *policies], rows, list(known)
