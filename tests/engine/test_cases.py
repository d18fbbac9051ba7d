"""What needs live engines on two ranks: the parameter map, and steps that are not finite."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import ranks

pytestmark = pytest.mark.multi


@pytest.mark.parametrize("case", ["oracle", "nonfinite", "guarded", "planted_faults", "no_synchronise"])
def test_on_two_ranks(case: str, shards: Path, tmp_path: Path) -> None:
    ranks.run(2, "tests.engine.cases", ranks.recipe(tmp_path, shards), case)
