"""Exit codes of runs, which batch scripts and users act on: docs/cli.md has the same table."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.__main__ import main as data_prep
from mimscale import methods
from mimscale.__main__ import main
from mimscale.errors import Stopped
from mimscale.fault_tolerance import watchdog
from mimscale.fault_tolerance.preemption import HANDLED, INTERRUPTED
from tests import ranks

METHOD = """
from mimscale.errors import Stopped, UserError
from mimscale.methods import mae

class Ends(mae.MAE):
    '''MAE whose second step ends the run.'''

    def forward(self, batch, targets):
        if not batch.images.is_meta and 1 in batch.positions // 16:
            raise {error}
        return super().forward(batch, targets)
"""


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in HANDLED}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("ended_with_the_test")
@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        ("UserError('a wrong value')", 2, "mimscale train: a wrong value"),
        ("Stopped('it diverged')", 4, "mimscale train: it diverged"),
        ("KeyboardInterrupt", 130, "mimscale train: interrupted"),
    ],
)
def test_a_run_that_ends_early(
    error: str, code: int, line: str, tmp_path: Path, shards: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    name = f"ends_{code}"
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / f"{name}.py").write_text(METHOD.format(error=error))
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path / "methods")])
    engine = {"backend": "torch", "ds_config": "cpu_zero0_fp32"}
    recipe = ranks.recipe(tmp_path, shards, "mae", method={"name": name}, engine=engine)
    assert main(["train", str(recipe), "--run-dir", str(tmp_path / "run")]) == code
    assert capsys.readouterr().err.splitlines()[-1] == line
    assert set(ranks.curve(tmp_path / "run")) == {1}


def test_the_page_names_every_code(shards: Path, tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "cli.md").read_text()
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    assert codes == {0, 1, 2, Stopped.code, watchdog.EXIT_CODE, INTERRUPTED, 141, 143}
    assert main(["recipes", "mae_tiny"]) == 0 and main(["recipes", "no_such_recipe"]) == 2
    assert data_prep(["info", str(shards)]) == 0 and data_prep(["info", str(tmp_path)]) == 2
