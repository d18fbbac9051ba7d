"""`mimscale recipes` and `mimscale train --show`: what they print, and what they do not import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mimscale.__main__ import main
from mimscale.config import recipe_table
from mimscale.config.recipes import load_recipe, recipe_names
from tests import ranks


def test_every_recipe_has_a_row(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    first_words = [line.split()[1] for line in lines if line.startswith("│ ") and line.split()[1] != "│"]
    assert first_words == recipe_names()
    (line,) = (line for line in lines if line.startswith("│ mff_vit_b16 "))
    assert all(words in line for words in ("mff", "ViT-B/16", "800", "135 A100-hours", "83.7"))


def test_a_narrow_terminal_gets_fewer_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["recipes", "mff", "mae_vit_l16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    (line,) = (line for line in lines if line.startswith("│ mff_vit_b16 "))
    assert all(words in line for words in ("mff", "ViT-B/16", "800", "135"))
    assert any(line.startswith("│ mae_vit_l16 ") for line in lines)
    assert not any(line.startswith("│ simmim") for line in lines)


def test_a_name_that_no_recipe_has_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "nosuch"]) == 2
    assert "no recipe's name contains nosuch" in capsys.readouterr().err


def test_rows_say_what_the_resolved_recipes_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["recipe"] for row in rows] == recipe_names()
    for row in rows:
        run = load_recipe(row["recipe"])
        masking = getattr(run.method, "masking", None)
        assert (row["method"], row["masking"]) == (run.method.name, masking and masking.policy), row["recipe"]
        assert (row["epochs"], row["steps"]) == (run.schedule.epochs, run.schedule.steps)
        assert row["global_batch"] == run.schedule.global_batch
        assert row["teachers"] == {name: teacher.model for name, teacher in run.teachers.items()}
        assert row["student"].endswith(f"/{run.student.patch}")
        assert row["title"] and row["source"] and row["expected_result"] and row["expected_cost"]


def test_header() -> None:
    text = (
        "# A title\n# in two lines.\n#\n# Source: somebody,\n#   somewhere: there.\n# Expected result: 83.1 (a card).\n"
        "# Expected cost: about 1,330 A100-hours.\n# Precision: fp16.\nextends: mae_vit_b16\n# Source: not the header\n"
    )
    header = recipe_table.header_of(text)
    assert header[:4] == (
        "A title in two lines.",
        "somebody, somewhere: there.",
        "83.1 (a card).",
        "about 1,330 A100-hours.",
    )
    assert header.a100_hours == 1330 and header.notes == {"Precision": "fp16."}
    with pytest.raises(ValueError, match="no paragraph 'Expected cost'"):
        recipe_table.header_of(text.replace("Expected cost", "Cost"))


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("mae_vit_l16_1600ep", []),
        ("mae_tiny", ["schedule.steps=3", "student.drop_path=0.1"]),
        ("maskalign_clip_dinov2_vit_b16", ["engine.ds_config=zero3_bf16"]),
        ("finetune_simmim_vit_b16", ["init=null"]),
    ],
)
def test_what_is_shown_is_the_recipe(
    name: str,
    overrides: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", name, *overrides, "--show"]) == 0
    shown = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    values = yaml.safe_load(shown)
    wanted = load_recipe(name, overrides)
    assert values == wanted.dump() and "extends" not in values and "watchdog" in values
    assert main(["train", name, "--show", *overrides]) == 0 and capsys.readouterr().out == shown
    (tmp_path / "shown.yaml").write_text(shown)
    again = load_recipe("shown.yaml")
    assert again == wanted and list(again.teachers) == list(wanted.teachers)


def test_showing_what_cannot_be_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "mae_vit_b61", "--show"]) == 2
    error = capsys.readouterr().err.strip()
    assert error == (
        "mimscale train: recipe 'mae_vit_b61' is unknown; did you mean 'mae_vit_b16'? `mimscale recipes` lists them, a "
        "path ends in .yaml"
    )


def test_help_has_no_wall_of_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    named = [name for name in recipe_names() if name in text.replace("\n", " ").split()]
    assert "`mimscale recipes`" in text and len(named) <= 2  # in the examples


@pytest.mark.parametrize(
    ("words", "unwanted"),
    [(["recipes"], "torch"), (["train", "--help"], "torch"), (["train", "mae_vit_b16", "--show"], "deepspeed")],
)
def test_nothing_heavy_is_imported(words: list[str], unwanted: str) -> None:
    code = (
        "import sys\nfrom mimscale.__main__ import main\n"
        f"try: main({words!r})\nexcept SystemExit: pass\nassert {unwanted!r} not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], env=ranks.environment(), check=True, stdout=subprocess.DEVNULL)
