"""The protocols that train heads, from the command line, on one rank and on two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import ranks
from tests.evals.conftest import save_run, small_run

pytestmark = [pytest.mark.multi, pytest.mark.slow]
OPTIONS = {
    "sweep": ["--steps", "12", "--rates", "0.01", "0.1", "1.0"],
    "attentive": ["--steps", "12", "--rates", "1.0", "5.0"],
}


@pytest.mark.parametrize("protocol", OPTIONS)
def test_one_and_two_ranks_agree(data: tuple[Path, Path], tmp_path: Path, protocol: str) -> None:
    run_dir = save_run(tmp_path / "mae", small_run("mae"))
    found: dict[int, Any] = {}
    for count in (1, 2):
        out = tmp_path / f"{count}.json"
        words: list[str | Path] = [
            "--train",
            data[0],
            "--val",
            data[1],
            "--workers",
            "0",
            "--device",
            "cpu",
            "--out",
            out,
        ]
        ranks.run(count, "mimscale", "evaluate", protocol, run_dir, *words, *OPTIONS[protocol])
        (found[count],) = json.loads(out.read_text())["rows"]
    heads = found[1]["heads"]
    assert len(heads) == {"sweep": 2 * 2 * 2 * 3, "attentive": 2}[protocol] and found[1]["steps"] == 12
    assert found[1] == found[2]  # to the bit
    assert found[1][f"{protocol}_val_chosen"] == max(head["val"] for head in heads)
