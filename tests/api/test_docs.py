"""docs/python.md and the docstrings of the public API, executed in the order in which a reader meets them."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import mimscale
from tests import ranks

PAGE = Path(__file__).resolve().parents[2] / "docs" / "python.md"
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXAMPLES = """
import doctest, sys
from mimscale.api import encoder, reconstruction, shards, training
found = [doctest.testmod(module) for module in (encoder, reconstruction, shards, training)]
print("examples:", sum(one.attempted for one in found))
sys.exit(sum(one.failed for one in found))
"""


def run(words: list[str], folder: Path) -> str:
    done = subprocess.run(words, cwd=folder, env=ranks.environment(), capture_output=True, text=True)
    assert done.returncode == 0, f"{words}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the page was followed: its commands up to the first Python block after them, and then all Python blocks in
    one process, as a reader pastes them; what they print is in printed.txt.
    """
    folder = tmp_path_factory.mktemp("docs")
    blocks = BLOCK.findall(PAGE.read_text())
    commands = [line for kind, text in blocks if kind == "bash" for line in text.splitlines()]
    before, after = commands[:2], commands[2:]
    for line in before:
        run(words_of(line), folder)
    (folder / "page.py").write_text("\n".join(text for kind, text in blocks if kind == "python"))
    (folder / "printed.txt").write_text(run([sys.executable, "page.py"], folder))
    for line in after:
        run(words_of(line), folder)
    return folder


def words_of(line: str) -> list[str]:
    """A command of the page for this interpreter."""
    first, *rest = shlex.split(line)
    return [sys.executable, *(rest if first == "python" else ["-m", first, *rest])]


@pytest.mark.slow
def test_the_blocks_of_the_page_run(folder: Path) -> None:
    printed = (folder / "printed.txt").read_text().splitlines()
    step, finished, _, loss = printed[0].split()
    assert (step, finished) == ("60", "True") and float(loss) < 1.0
    assert printed[1] == "64 8 (6, 6) 48"
    assert printed[2] == "torch.Size([4, 36, 64]) torch.Size([4, 64]) torch.Size([4, 64])"
    assert printed[3] == "1000 10 torch.Size([1000, 64]) torch.Size([1000])"
    assert printed[4] == "torch.Size([4, 3, 48, 48]) torch.Size([4, 3, 48, 48]) [0.75, 0.75, 0.75, 0.75]"
    assert (folder / "runs" / "reconstructed.png").is_file()


@pytest.mark.slow
def test_the_examples_in_docstrings_run(folder: Path) -> None:
    (folder / "examples.py").write_text(EXAMPLES)
    assert int(run([sys.executable, "examples.py"], folder).rpartition("examples:")[2]) >= 15


def test_every_function_has_an_example() -> None:
    for name in mimscale.__all__:
        thing = getattr(mimscale, name)
        if callable(thing) and not isinstance(thing, type):
            assert ">>> " in thing.__doc__, name
