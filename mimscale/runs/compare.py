"""What differs between runs: their recipes, key by key, and their last metrics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mimscale.config.difference import differences
from mimscale.errors import UserError
from mimscale.files.regular import read_regular
from mimscale.runs.find import is_run
from mimscale.runs.summary import summary_of

MOST_VALUES = 100_000
"""Of a recipe."""


def compare(run_dirs: Sequence[Path]) -> dict[str, Any]:
    """runs: summary of each. recipe: `section.key` -> its value in each run, where they differ. metrics: name -> last
    value in each run, None where a run has none. Raises UserError.
    """
    recipes = [recipe_of(run_dir) for run_dir in run_dirs]
    summaries = [summary_of(run_dir) for run_dir in run_dirs]
    names = dict.fromkeys(name for summary in summaries for name in summary.metrics)
    best = [{figure.name: figure.value for figure in summary.figures} for summary in summaries]
    return {
        "runs": [summary.plain() for summary in summaries],
        "recipe": differences(recipes),
        "metrics": {name: [summary.metrics.get(name) for summary in summaries] for name in names},
        "evaluations": {name: [of.get(name) for of in best] for name in sorted({name for of in best for name in of})},
    }


def recipe_of(run_dir: Path) -> dict[str, Any]:
    """The plain values of a run's config.yaml, which may be of another release. Raises UserError."""
    path = run_dir / "config.yaml"
    if not run_dir.is_dir():
        raise UserError(f"{run_dir} is no folder; name the folder of a run")
    if not path.exists() and not is_run(run_dir):
        raise UserError(f"{run_dir} is no run: it has no config.yaml; name the folder of a run")
    try:
        values = yaml.load(read_regular(path), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); copy it back from a checkpoint") from None
    except (yaml.YAMLError, ValueError, RecursionError):
        raise UserError(f"{path} is not YAML; copy it back from the manifest.json of a checkpoint") from None
    if not isinstance(values, dict) or not _is_small(values):
        raise UserError(f"{path} holds no recipe; copy it back from the manifest.json of a checkpoint")
    return values


def _is_small(values: Any) -> bool:
    """Whether it has no more than MOST_VALUES: aliases of YAML can make a few bytes endless."""
    waiting, seen = [values], 0
    while waiting and seen <= MOST_VALUES:
        value = waiting.pop()
        seen += 1
        waiting += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return not waiting
