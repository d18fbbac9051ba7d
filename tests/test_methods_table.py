"""The table of methods in README.md and docs/methods.md is what the tests, the docstrings and the recipes say."""

from __future__ import annotations

import json

from tests import methods_table


def test_the_committed_table_is_current() -> None:
    """After a change of docstrings or recipes run it with --render; after one of the comparisons, without."""
    for path, text in methods_table.written(json.loads(methods_table.MEASURED.read_text())).items():
        assert path.read_text() == text, f"{path.name}: run python -m tests.methods_table"


def test_every_published_method_was_compared() -> None:
    measured = json.loads(methods_table.MEASURED.read_text())
    assert measured.keys() == set(methods_table.rows())
    for cases in measured.values():
        for kinds in cases.values():
            assert all(0 <= error <= tolerance for error, tolerance in kinds.values())


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
        {**line, "test": "tests/bench/test_bench.py::t", "golden": "lars_dev", "error": 0},
    ]
    assert methods_table.merged(lines) == {
        "mae": {"mae_dev": {"loss": [1e-7, 1e-6]}},
        "maskalign": {"attentive_masking_dev": {"loss": [0.0, 1e-6]}, "maskalign_train_dev": {"loss": [0.0, 1e-6]}},
        "mff": {"mff_dev": {"loss": [2e-7, 1e-6]}},
        "pixmim": {"pixmim_crop": {"loss": [0.0, 1e-6]}},
    }
