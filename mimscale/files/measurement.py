"""Tables of figures in Markdown, and the line below a table: command, versions, commit and machine."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path


def origin() -> str:
    """One line to print below a table: command, versions, commit, machine."""
    import torch

    command = " ".join(["mimscale", *map(shlex.quote, sys.argv[1:])])
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"`{command}`, {versions}, commit {commit()}, {processor()}, {os.cpu_count()} cores"


def commit() -> str:
    """Commit of the checkout of this package, marked "-dirty" if files differ from it; "unknown" outside of git."""
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def processor() -> str:
    """Model name of the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [heads, rule, *rows])
