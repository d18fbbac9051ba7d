"""Recipes and DeepSpeed files with one odd value: taken and buildable, or one line that names it.

MIMSCALE_FUZZ=2000 python -m pytest -n 0 tests/config/test_fuzz.py --hypothesis-seed=1      # the long run
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mimscale.config.deepspeed import ds_config_names, load_ds_config, precision_of
from mimscale.config.recipes import load_recipe, recipe_names
from mimscale.config.run import method_class
from mimscale.errors import UserError
from mimscale.teachers.ensemble import build_skeletons, describe
from mimscale.training.checked_run import prepare
from tests.fuzz import FUZZ, no_hang
from tests.training.test_tiny_recipes import TINY

RECIPES = {name: load_recipe(name).dump() for name in recipe_names()}
DS_CONFIGS = {name: load_ds_config(name) for name in ds_config_names()}

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 2, 3, 7, 13, 2**31, 2**63, 10**20, -(2**63)]),
    st.sampled_from([0.0, -0.0, 0.5, 1.0, 1.5, -1e-9, 1e-320, 1e9, 1e308, float("inf"), float("-inf"), float("nan")]),
    st.sampled_from(["", " ", "auto", "true", "none", "1e-4", "0", "é", "\u2028", "[/red]", "../..", "a" * 5000, "\0"]),
)
odd = st.one_of(
    scalars,
    st.lists(scalars, max_size=3),
    st.dictionaries(st.sampled_from(["name", "a", "policy", "enabled", "ratio", ""]), scalars, max_size=2),
)


def places(values: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value and every section."""
    inner = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [place for key, value in inner for place in ((*before, key), *places(value, (*before, key)))]


@st.composite
def mutated(draw: st.DrawFn, originals: dict[str, dict[str, Any]]) -> tuple[str, dict[str, Any], str]:
    """(name, the values with one to three changes, what was changed)."""
    name = draw(st.sampled_from(sorted(originals)))
    values, changes = copy.deepcopy(originals[name]), []
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(places(values)))
        parent = values
        for key in place[:-1]:
            parent = parent[key]
        kind = draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename", "another"]))
        if kind == "remove":
            del parent[place[-1]]
        elif kind == "rename" and isinstance(parent, dict):
            parent[f"{place[-1]}x"] = parent.pop(place[-1])
        elif kind == "another" and isinstance(parent[place[-1]], (int, float)):
            parent[place[-1]] = draw(st.one_of(st.integers(-5, 5000), st.floats(allow_nan=False, width=32)))
        else:
            parent[place[-1]] = draw(odd)
        changes.append(f"{kind} {'.'.join(map(str, place))}")
        if not values:
            break
    return name, values, ", ".join(changes)


def one_line(error: UserError) -> None:
    assert str(error) and "\n" not in str(error) and len(str(error)) < 1000


@FUZZ
@given(mutated(RECIPES))
def test_recipes(tmp_path_factory: pytest.TempPathFactory, case: tuple[str, dict[str, Any], str]) -> None:
    """A recipe that is taken says the same after it was written, and makes a method of finite size."""
    path = tmp_path_factory.getbasetemp() / "recipe.yaml"
    path.write_text(yaml.safe_dump(case[1], allow_unicode=True), encoding="utf-8", errors="surrogateescape")
    try:
        with no_hang():
            config = load_recipe(str(path))
            path.write_text(yaml.safe_dump(config.dump()))
            assert load_recipe(str(path)).dump() == config.dump()
            teachers = describe(build_skeletons(config.teachers, config.data.image_size))
            with torch.device("meta"):
                method_class(config.method.name)(config, teachers)
    except UserError as error:
        one_line(error)


@FUZZ
@given(mutated({name: RECIPES[name] for name in TINY}))
def test_starts(shards: Path, tmp_path_factory: pytest.TempPathFactory, case: tuple[str, dict[str, Any], str]) -> None:
    """Every check before a run is built, on a real data set. What is refused leaves no folder behind."""
    base = tmp_path_factory.getbasetemp()
    values = copy.deepcopy(case[1])
    if isinstance(values.get("data"), dict) and "shards" in values["data"]:
        values["data"]["shards"] = str(shards)
    (base / "start.yaml").write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    try:
        with no_hang():
            prepare(load_recipe(str(base / "start.yaml"), ["engine.device=cpu"]), base / "no-run", None, ("test",))
    except UserError as error:
        one_line(error)
    assert not (base / "no-run").exists()


@FUZZ
@given(mutated(DS_CONFIGS))
def test_deepspeed_files(tmp_path_factory: pytest.TempPathFactory, case: tuple[str, dict[str, Any], str]) -> None:
    """A file that is taken says what it was written to say: its precision is that of the section that is enabled."""
    path = tmp_path_factory.getbasetemp() / "ds.json"
    path.write_text(json.dumps(case[1]))
    try:
        with no_hang():
            values = load_ds_config(str(path))
    except UserError as error:
        one_line(error)
        return
    precision = precision_of(values)
    enabled = [name for name in ("fp16", "bf16") if values.get(name, {}).get("enabled") is True]
    assert enabled == ([] if precision == "fp32" else [precision])
    assert values.get("zero_optimization", {}).get("stage", 0) in (0, 1, 2, 3)
