"""The tables of methods in README.md and docs/methods.md follow the tests, the docstrings and the recipes."""

from __future__ import annotations

import json
from types import ModuleType

import pytest

from tests import methods_table


def test_the_committed_tables_are_current() -> None:
    """After a change of docstrings or recipes run it with --render; after one of the comparisons, without.

    A new method without official numbers stops nobody: until the tables are written again it has no row.
    """
    measured = json.loads(methods_table.MEASURED.read_text())
    page = methods_table.DOCS.read_text()
    listed = [name for name in methods_table.rows() if f"\n## {methods_table.facts(name).title}\n" in page]
    assert measured.keys() <= set(listed)
    for path, text in methods_table.written(measured, listed).items():
        assert path.read_text() == text, f"{path.name}: run python -m tests.methods_table --render"


def test_measured_errors_are_within_their_tolerance() -> None:
    measured = json.loads(methods_table.MEASURED.read_text())
    assert {"mae", "maskalign", "amt"} <= measured.keys() <= set(methods_table.rows())
    for cases in measured.values():
        for kinds in cases.values():
            assert all(0 <= error <= tolerance for error, tolerance in kinds.values())


def test_a_compared_method_names_its_paper_and_its_differences() -> None:
    for name in json.loads(methods_table.MEASURED.read_text()):
        facts = methods_table.facts(name)
        assert "none given" not in (facts.source, facts.differences), name


def test_a_method_without_official_numbers_has_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new method needs neither goldens nor the two paragraphs of the docstring."""
    new = ModuleType("new", "Predicts the next patch.\n\nMore about it.")
    monkeypatch.setattr(methods_table, "method_names", lambda: ["new"])
    monkeypatch.setattr(methods_table, "import_module", lambda name: new)
    monkeypatch.setattr(methods_table, "POLICIES", ())
    assert list(methods_table.short_table({}))[-1] == "| new | none given | none | not compared |"
    assert list(methods_table.long_table({}))[-1] == "| new | none given | none | none |"
    assert "Predicts the next patch (none given)." in list(methods_table.page({}))


def test_other_lengths_of_a_recipe_are_left_out_of_the_short_table() -> None:
    names = ["mae_b16", "mae_b16_1600ep", "mae_l16"]
    assert methods_table.one_per_student(names) == ["mae_b16", "mae_l16"]


def test_every_recipe_is_in_the_table() -> None:
    listed = {recipe for name in methods_table.rows() for recipe in methods_table.recipes_of(name)}
    others = set(methods_table.recipe_names()) - listed
    assert all(name.startswith("demo_") or name.endswith("_tiny") for name in others)


def test_whose_comparison_it_is() -> None:
    line = {"kind": "loss", "tolerance": 1e-6}
    lines = [
        {**line, "test": "tests/methods/test_mff.py::test_golden", "golden": "mff_dev", "error": 2e-7},
        {**line, "test": "tests/methods/test_mff.py::test_golden", "golden": "mff_dev", "error": 1e-7},
        {**line, "test": "tests/engine/test_goldens.py::t[maskalign-2]", "golden": "maskalign_train_dev", "error": 0},
        {**line, "test": "tests/models/test_vit.py::test", "golden": "mae_dev", "error": 1e-7},
        {**line, "test": "tests/masking/test_attention.py::t", "golden": "attentive_masking_dev", "error": 0},
        {**line, "test": "tests/data/test_transforms.py::t", "golden": "pixmim_crop", "error": 0},
        {**line, "test": "tests/bench/test_bench.py::t", "golden": "other_dev", "error": 0},
    ]
    assert methods_table.merged(lines) == {
        "mae": {"mae_dev": {"loss": [1e-7, 1e-6]}},
        "maskalign": {"attentive_masking_dev": {"loss": [0.0, 1e-6]}, "maskalign_train_dev": {"loss": [0.0, 1e-6]}},
        "mff": {"mff_dev": {"loss": [2e-7, 1e-6]}},
        "pixmim": {"pixmim_crop": {"loss": [0.0, 1e-6]}},
    }
