"""What all verbs share: help that fits a screen and ends with an example, and JSON in place of tables."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

from mimscale.errors import is_address, printable

WIDTH, LINES = 100, 40
"""The screen that the help of every verb fits."""


class Parser(argparse.ArgumentParser):
    """Arguments of `type=Path` are paths of this machine, and what is refused is printed without secrets."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": Help, **options})
        self.register("type", Path, local_path)

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def local_path(text: str) -> Path:
    """Raises ArgumentTypeError for an address, and for no name, as of a shell's variable that is not set."""
    if not text.strip():
        raise argparse.ArgumentTypeError("an empty path; name a file or folder")
    if is_address(text):
        raise argparse.ArgumentTypeError(f"'{text}' is an address; give a path of this machine")
    return Path(text)


class Help(argparse.RawDescriptionHelpFormatter):
    """At most WIDTH columns, and a usage line without the options, which stand below anyhow."""

    def __init__(self, prog: str, **options: Any) -> None:
        columns = min(WIDTH, shutil.get_terminal_size().columns) - 2
        super().__init__(prog, **{"width": columns, "max_help_position": 27, **options})

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Paragraphs are wrapped; one that has indented lines, such as an example, stays as it is."""
        parts = text.strip("\n").split("\n\n")
        filled = (part if "\n " in part else textwrap.fill(part, width) for part in parts)
        return "\n\n".join(filled)

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        """`RUN ...` for one or more."""
        if action.nargs == argparse.ONE_OR_MORE:
            (name,) = self._metavar_formatter(action, default_metavar)(1)
            return f"{name} ..."
        return super()._format_args(action, default_metavar)

    def _format_usage(
        self,
        usage: str | None,
        actions: Iterable[argparse.Action],
        groups: Iterable[Any],
        prefix: str | None,
    ) -> str:
        actions = list(actions)
        groups = [group for group in groups if group.required]
        needed = {id(action) for group in groups for action in group._group_actions}
        kept = [a for a in actions if not a.option_strings or a.required or id(a) in needed]
        text = super()._format_usage(usage, kept, groups, prefix)
        verbs = any(action.nargs == argparse.PARSER for action in kept)
        if usage is not None or verbs or len(kept) == len(actions):
            return text
        return f"{text.rstrip()} [OPTIONS]\n\n"


def end_with_example(parser: argparse.ArgumentParser, *commands: str, before: str = "") -> None:
    """The help of a verb in the common form; commands at its end work as they stand. before: lines of text."""
    parser.formatter_class = Help
    head = "example:" if len(commands) == 1 else "examples:"
    parser.epilog = before + "\n".join([head, *(f"  {command}" for command in commands)])


def add_json(parser: argparse.ArgumentParser, text: str = "print JSON in place of the tables") -> None:
    """The option `--json`; its verb prints nothing else on stdout (`print_json`)."""
    parser.add_argument("--json", action="store_true", help=text)


def print_json(values: Any) -> None:
    """One JSON document on stdout. Of what JSON does not have, numbers become null, other values text."""
    print(json.dumps(plain(values), indent=1, allow_nan=False), flush=True)  # a full disk is noticed here


def stdout_kept(as_json: bool) -> AbstractContextManager[Any]:
    """While the work of a verb with `--json` goes on: what it says on its way goes to stderr."""
    return redirect_stdout(sys.stderr) if as_json else nullcontext()


def plain(values: Any) -> Any:
    """Values as JSON has them."""
    if isinstance(values, Mapping):
        return {str(key): plain(value) for key, value in values.items()}
    if isinstance(values, (list, tuple, set, frozenset)):
        return [plain(value) for value in values]
    if isinstance(values, float) and not math.isfinite(values):
        return None
    return values if values is None or isinstance(values, str | int | float) else str(values)


def tables_json(tables: Iterable[tuple[str, list[str], list[list[str]]]]) -> list[dict[str, Any]]:
    """(title, columns, rows of cells) of each table -> objects that JSON has."""
    return [{"title": title, "columns": columns, "rows": rows} for title, columns, rows in tables]
