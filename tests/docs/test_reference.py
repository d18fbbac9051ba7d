"""docs/reference/ is what docs/reference.py writes, and says something of every key, command and name."""

from __future__ import annotations

from types import ModuleType

import pytest

import mimscale
from mimscale.__main__ import VERBS
from mimscale.config.base import Strict
from mimscale.config.key_texts import key_texts
from mimscale.config.recipes import load_recipe, recipe_names
from tests.scripts import ROOT, load_script


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    return load_script("docs/reference.py")


@pytest.fixture(scope="module")
def pages(reference: ModuleType) -> dict[str, str]:
    return reference.pages()


def test_the_pages_are_current(pages: dict[str, str]) -> None:
    stored = {path.name: path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md")}
    stale = sorted(name for name in {*pages, *stored} if pages.get(name) != stored.get(name))
    assert not stale, f"docs/reference: {stale} are out of date; run python docs/reference.py"


def test_every_key_has_a_description(reference: ModuleType) -> None:
    keys = dict(reference.every_key())
    silent = [name for name, field in keys.items() if not field.description]
    assert not silent, f"no text about {silent}; write 'key: text.' into the docstring of their section"
    assert len(keys) > 200


def test_the_page_has_every_key_that_a_recipe_prints(pages: dict[str, str]) -> None:
    names = {line.split("`")[1] for line in pages["recipe.md"].splitlines() if line.startswith("| `")}
    own = ("teachers", "expected", "method.targets")
    for recipe in recipe_names():
        for key in load_recipe(recipe, []).flat():
            place = next((of for of in own if key.startswith(f"{of}.")), None)
            if place is not None:
                key = ".".join([place, "NAME", *key.removeprefix(f"{place}.").split(".")[1:]])
            known = key in names or any(key.startswith(f"{name}.") for name in ("teachers.NAME.options", "data.shards"))
            assert known or key in ("teachers", "expected", "init", "ema", "evals"), f"{recipe}: {key}"


def test_every_verb_and_name_has_a_heading(pages: dict[str, str]) -> None:
    assert not [verb for verb in VERBS if f"\n## `mimscale {verb}`\n" not in pages["cli.md"]]
    public = [name for name in mimscale.__all__ if name != "__version__"]
    assert not [name for name in public if f"\n## `mimscale.{name}`\n" not in pages["python.md"]]
    assert "\n### `python -m data_prep folder`\n" in pages["cli.md"]


def test_docstrings_become_descriptions() -> None:
    doc = """A section.  every: steps between saves, 0 = none.

    mean, std: of the checkpoint
    (two lines). crops (experimental): steps: many.
    mean: more.

    A paragraph about no key, unknown: word.
    """
    section, texts = key_texts(doc, ["every", "mean", "std", "crops"])
    assert section == "A section. A paragraph about no key, unknown: word."
    assert texts == {
        "every": "steps between saves, 0 = none.",
        "mean": "of the checkpoint (two lines). more.",
        "std": "of the checkpoint (two lines).",
        "crops": "(experimental) steps: many.",
    }


def test_a_subclass_keeps_and_changes_texts() -> None:
    class Above(Strict):
        """one: first. two: second."""

        one: int = 1
        two: int = 2
        three: int = 3

    class Below(Above):
        """two: another. three: third."""

        one: int = 5

    texts = {name: field.description for name, field in Below.model_fields.items()}
    assert texts == {"one": "first.", "two": "another.", "three": "third."}
    assert Above.model_fields["two"].description == "second." and Above.model_fields["three"].description is None
