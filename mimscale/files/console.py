"""The terminal: what is printed may hold names of others, which are never markup."""

from __future__ import annotations

from typing import Any

from rich.console import Console


def plain_console(**options: Any) -> Console:
    """A console that shows text as it is: "[/b]" in the name of a file is neither an error nor bold.

    It holds for tables and progress bars too. options: as for rich's Console.
    """
    return Console(markup=False, emoji=False, highlight=False, **options)
