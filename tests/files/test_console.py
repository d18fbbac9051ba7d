"""Names of others are printed as they are: neither markup nor what a terminal would obey."""

from __future__ import annotations

import ast
import io
from pathlib import Path

import pytest
from rich.progress import Progress
from rich.table import Table

import data_prep
import mimscale
from mimscale.errors import printable, warn
from mimscale.evals.report import table
from mimscale.fault_tolerance.retrying_writer import RetryingWriter
from mimscale.files.console import plain_console
from mimscale.monitoring.run_logger import RunLogger

NAMES = ["cat[/b]7", "a[v2]", "[bold]x[/bold]", ":smile:", "[link=http://a.b]c[/link]", "[", "\\[x]", "[@click=f()]"]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_no_markup(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = RunLogger(tmp_path, RetryingWriter(), active=True)
    logger.print(f"damaged: {name}")
    assert capsys.readouterr().err == f"damaged: {name}\n"
    rows = [{"network": name, "pool": "mean", "step": 1, "top1": 50.0}]
    report = {"val": {"samples": 3, "shards": name}, "unit": "accuracy", "metrics": {"top1": "top 1"}, "rows": rows}
    out = io.StringIO()
    plain_console(file=out, width=200).print(table(report))
    assert out.getvalue().count(name) == 2


def test_bars_and_titles_are_no_markup() -> None:
    out = io.StringIO()
    console = plain_console(file=out, width=120, force_terminal=True, color_system=None)
    console.print(Table("x", title="a[/b]"))
    with Progress(console=console) as bar:
        bar.add_task("made")
    assert "a[/b]" in out.getvalue()


def test_control_characters_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "a\x1b[2Jb\rc\x07\x9b31m\u202ed\udcff\u2028"
    assert printable(hostile) == "a\\x1b[2Jb\\rc\\x07\\x9b31m\\u202ed\\udcff\\u2028"
    assert printable("äß 日本 é\n\t") == "äß 日本 é\n\t"
    warn(hostile)
    assert capsys.readouterr().err == printable(hostile) + "\n"


def test_only_plain_consoles_and_columns_are_made() -> None:
    """Everywhere rich prints: a console that reads markup, or a column that does, would be a way around."""
    wrong = []
    for root in (Path(mimscale.__file__).parent, Path(data_prep.__file__).parent):
        for path in sorted(root.rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                    continue
                options = {keyword.arg for keyword in node.keywords}
                if node.func.id == "Console" and path.name != "console.py":
                    wrong.append(f"{path}:{node.lineno}: Console")
                takes_field = node.func.id == "TextColumn" and "{" in ast.dump(node)
                if takes_field and "markup" not in options:
                    wrong.append(f"{path}:{node.lineno}: TextColumn")
    assert not wrong, "\n".join(wrong)
