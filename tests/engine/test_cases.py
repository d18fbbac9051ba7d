"""What needs live engines on two ranks: the parameter map, and steps that are not finite."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import ranks

pytestmark = pytest.mark.multi
CASES = ["oracle", "nonfinite", "guarded", "whole_parameters", "planted_faults", "no_synchronise"]


@pytest.mark.parametrize("case", CASES)
def test_on_two_ranks(case: str, shards: Path, tmp_path: Path) -> None:
    recipe = ranks.recipe(tmp_path, shards, ema={"decay": 0.9})
    ranks.run(2, "tests.engine.cases", recipe, case)
