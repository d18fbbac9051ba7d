"""The help of every verb fits a screen and ends with examples that parse; every verb that prints a table has --json."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.__main__ import main as data_prep
from data_prep.__main__ import make_parser as data_prep_parser
from mimscale.__main__ import VERBS, main, make_parser, parse
from mimscale.config.completion import parsers
from mimscale.config.recipes import load_recipe
from mimscale.files.command_line import LINES, WIDTH, end_with_example, plain

ALL = [*parsers(make_parser(VERBS)[0]), *parsers(data_prep_parser())]
LEAVES = [one for one in ALL if not any(isinstance(a, argparse._SubParsersAction) for a in one._actions)]
WRITERS = ("folder", "table", "imagenet", "imagenet21k", "torchvision", "fashion", "finish", "digits", "synthetic")
NO_TABLE = {
    *(f"mimscale {verb}" for verb in ("train", "convert", "reconstruct", "completion")),
    *(f"python -m data_prep {verb}" for verb in WRITERS),
}
"""What prints lines only."""


@pytest.fixture(autouse=True)
def screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(WIDTH))


def examples(parser: argparse.ArgumentParser) -> list[str]:
    """The commands at the end of a help text."""
    text = parser.format_help().rstrip().split("\n\n")[-1].splitlines()
    return [line.strip() for line in text[1:]] if text[0] in ("example:", "examples:") else []


def wrong_in(parser: argparse.ArgumentParser) -> list[str]:
    lines = parser.format_help().splitlines()
    found = [f"{len(lines)} lines"] if len(lines) > LINES else []
    found += [f"{len(line)} columns: {line}" for line in lines if len(line) > WIDTH]
    found += [] if examples(parser) else ["no example at the end"]
    found += [f"%% in {line}" for line in lines if "%%" in line or "%(" in line]
    return [f"{parser.prog}: {fault}" for fault in found]


def test_every_help_fits_a_screen_and_ends_with_an_example() -> None:
    assert len(ALL) > 45
    wrong = [fault for parser in ALL for fault in wrong_in(parser)]
    assert not wrong, "\n".join(wrong)


def test_a_help_without_an_example_is_found() -> None:
    parser = argparse.ArgumentParser("verb", epilog="an example is: verb")
    for number in range(LINES):
        parser.add_argument(f"--option-{number}", help=WIDTH * "x")
    faults = [fault.split(": ")[1] for fault in wrong_in(parser)]
    assert faults[0] == f"{len(parser.format_help().splitlines())} lines" and "no example at the end" in faults
    end_with_example(parser, "verb --option-1 50%")
    assert examples(parser) == ["verb --option-1 50%"]


def test_every_example_parses() -> None:
    """Its recipe and changes are valid too."""
    mine, theirs = make_parser(VERBS)[0], data_prep_parser()
    for parser in ALL:
        for command in examples(parser):
            words = shlex.split(command.partition(" > ")[0])
            if "mimscale" not in words:
                assert words[:3] == ["python", "-m", "data_prep"], command
                rest, expected = words[3:], "python -m data_prep"
            else:
                rest, expected = words[words.index("mimscale") + 1 :], "mimscale"
            verb = parser.prog.removeprefix(expected).split()
            assert rest[: len(verb)] == verb, command
            if rest[-1] == "--help":
                with pytest.raises(SystemExit) as stop:
                    (mine if expected == "mimscale" else theirs).parse_args(rest)
                assert stop.value.code == 0, command
                continue
            args = parse(mine, rest) if expected == "mimscale" else theirs.parse_args(rest)
            if getattr(args, "recipe", None) is not None:
                load_recipe(args.recipe.split(",")[0], getattr(args, "overrides", []))


def test_every_verb_that_prints_a_table_has_json() -> None:
    for parser in LEAVES:
        options = {option for action in parser._actions for option in action.option_strings}
        assert ("--json" in options) != (parser.prog in NO_TABLE), parser.prog


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["recipes", "mae_tiny"], None),
        (["plan", "mae_tiny", "--gpu", "cpu", "--gpus", "1"], "best"),
        (["plan", "--inputs"], "tables"),
        (["doctor"], "tables"),
        (["doctor", "mae_tiny", "data.shards=SHARDS"], "tables"),
        (["doctor", "mae_tiny", "data.shards=nowhere"], "problems"),
        (["doctor", "--teacher", "test_vit.r160_in1k", "--image-size", "64"], "teacher"),
        (["results", "RUN"], "training"),
        (["bench", "order", "--ranks", "8", "--samples", "20000", "--global-batch", "64"], "tables"),
        (["data_prep", "info", "SHARDS", "--classes"], "class_samples"),
        (["data_prep", "verify", "SHARDS"], "image_bytes"),
        (["data_prep", "index", "SHARDS", "--to", "RUN/index"], "fingerprint"),
        (["data_prep", "doctor", "SHARDS", "--ranks", "2", "--global-batch", "8"], "findings"),
    ],
    ids=lambda value: "-".join(value[:3]) if isinstance(value, list) else "",
)
def test_nothing_but_json_on_stdout(
    words: list[str], key: str | None, shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n')
    words = [word.replace("SHARDS", str(shards)).replace("RUN", str(tmp_path)) for word in words]
    command: Callable[[list[str]], int] = data_prep if words[0] == "data_prep" else main
    code = command([*words[words[0] == "data_prep" :], "--json"])
    assert code == {"problems": 2, "findings": 1}.get(str(key), 0)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no number of JSON")

    values = json.loads(capfd.readouterr().out, parse_constant=refuse)
    assert values and (key is None or values[key])


def test_what_json_does_not_have() -> None:
    assert plain({"a": [float("nan"), (1, Path("b"))], 2: float("inf")}) == {"a": [None, [1, "b"]], "2": None}
