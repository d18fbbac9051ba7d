"""`extends`: what carries over from a base and what does not, and the line that everything wrong gets."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from mimscale.config.extends import UNSAID, merged
from mimscale.config.recipes import load_recipe, read_recipe, recipe_names
from mimscale.errors import UserError
from tests import ranks

CLIP = {"library": "timm", "model": "b16", "weights": "clip.safetensors", "sha256": "0" * 64, "image_size": 224}
DINO = {"library": "timm", "model": "dino"}


@pytest.mark.parametrize(
    ("base", "own", "wanted"),
    [
        # key by key, at any depth; a list is a value
        ({"a": {"b": {"c": 1, "d": 2}}}, {"a": {"b": {"d": 3}}}, {"a": {"b": {"c": 1, "d": 3}}}),
        ({"optim": {"betas": [0.9, 0.95]}}, {"optim": {"betas": [0.8]}}, {"optim": {"betas": [0.8]}}),
        ({"method": {"stages": {"depths": [2, 2]}}}, {"method": {"stages": None}}, {"method": {"stages": None}}),
        ({"method": {"fusion": {"kind": "sum"}}}, {"method": {"fusion": "simple"}}, {"method": {"fusion": "simple"}}),
        # null removes what has a name, and only that
        ({"init": {"weights": "a"}, "seed": 1}, {"init": None}, {"seed": 1}),
        ({"seed": 1}, {"init": None}, {"seed": 1, "init": None}),
        ({"teachers": {"a": CLIP, "b": DINO}}, {"teachers": {"a": None}}, {"teachers": {"b": DINO}}),
        (
            {"method": {"name": "mrmae", "targets": {"a": {"weight": 1}, "b": {}}}},
            {"method": {"targets": {"a": None}}},
            {"method": {"name": "mrmae", "targets": {"b": {}}}},
        ),
        ({"data": {"cache": "/disk"}}, {"data": {"cache": None}}, {"data": {"cache": None}}),
        # another method, policy, kind of fusion or teacher leaves nothing of the one before
        (
            {"method": {"name": "mae", "norm_pix_loss": False, "masking": {"policy": "random", "ratio": 0.6}}},
            {"method": {"name": "pixmim"}},
            {"method": {"name": "pixmim"}},
        ),
        (
            {"method": {"name": "mae", "norm_pix_loss": False}},
            {"method": {"name": "mae", "decoder_depth": 1}},
            {"method": {"name": "mae", "norm_pix_loss": False, "decoder_depth": 1}},
        ),
        (
            {"method": {"name": "mae", "masking": {"policy": "random", "ratio": 0.6, "unit": 32}}},
            {"method": {"masking": {"policy": "amt", "refresh": 0.1}}},
            {"method": {"name": "mae", "masking": {"policy": "amt", "refresh": 0.1}}},
        ),
        (
            {"method": {"masking": {"policy": "random", "ratio": 0.6, "unit": 32}}},
            {"method": {"masking": {"ratio": 0.7}}},
            {"method": {"masking": {"policy": "random", "ratio": 0.7, "unit": 32}}},
        ),
        (  # the base's own policy is the method's default, which nobody wrote
            {"method": {"masking": {"ratio": 0.6}}},
            {"method": {"masking": {"policy": "topk"}}},
            {"method": {"masking": {"policy": "topk"}}},
        ),
        (
            {"method": {"fusion": {"kind": "mff", "levels": [0, 11]}}},
            {"method": {"fusion": {"kind": "none"}}},
            {"method": {"fusion": {"kind": "none"}}},
        ),
        (
            {"optim": {"betas": [0.9, 0.95], "clip": 5.0}},
            {"optim": {"name": "lars"}},
            {"optim": {"name": "lars"}},
        ),
        (  # the default, written out
            {"optim": {"clip": 5.0}, "schedule": {"min_lr": 1e-5}, "data": {"crop_scale": [0.5, 1.0]}},
            {"optim": {"name": "adamw"}, "schedule": {"kind": "cosine"}, "data": {"crop": "random_resized"}},
            {
                "optim": {"name": "adamw", "clip": 5.0},
                "schedule": {"kind": "cosine", "min_lr": 1e-5},
                "data": {"crop": "random_resized", "crop_scale": [0.5, 1.0]},
            },
        ),
        ({"teachers": {"clip": CLIP}}, {"teachers": {"clip": DINO}}, {"teachers": {"clip": DINO}}),
        (
            {"teachers": {"clip": CLIP}},
            {"teachers": {"clip": {"precision": "fp16"}, "dino": DINO}},
            {"teachers": {"clip": {**CLIP, "precision": "fp16"}, "dino": DINO}},
        ),
        # other weights are another file
        (
            {"teachers": {"clip": CLIP}},
            {"teachers": {"clip": {"weights": "mine.safetensors"}}},
            {"teachers": {"clip": {k: v for k, v in CLIP.items() if k != "sha256"} | {"weights": "mine.safetensors"}}},
        ),
        (
            {"init": {"weights": "a", "sha256": "0" * 64, "part": "method"}},
            {"init": {"weights": "b"}},
            {"init": {"weights": "b", "part": "method"}},
        ),
        # one takes the place of the other
        ({"schedule": {"epochs": 800}}, {"schedule": {"steps": 60}}, {"schedule": {"steps": 60}}),
        ({"schedule": {"steps": 60}}, {"schedule": {"epochs": 1}}, {"schedule": {"epochs": 1}}),
        (
            {"schedule": {"kind": "multistep", "milestones": [700], "gamma": 0.1, "epochs": 800}},
            {"schedule": {"kind": "timm_cosine"}},
            {"schedule": {"kind": "timm_cosine", "epochs": 800}},
        ),
        (
            {"schedule": {"kind": "openmmlab_cosine", "warmup_start_factor": 1e-9, "epochs": 800}},
            {"schedule": {"kind": "cosine"}},
            {"schedule": {"kind": "cosine", "epochs": 800}},
        ),
        (
            {"student": {"size": "base", "width": 768, "depth": 12, "heads": 12, "patch": 16}},
            {"student": {"size": "large"}},
            {"student": {"size": "large", "patch": 16}},
        ),
        (
            {"student": {"size": "base", "patch": 16}},
            {"student": {"width": 768, "depth": 11, "heads": 12}},
            {"student": {"width": 768, "depth": 11, "heads": 12, "patch": 16}},
        ),
        (
            {"data": {"shards": "wds:/a-{0..7}.tar", "stream": {"samples": 9}, "image_size": 224}},
            {"data": {"shards": "/b"}},
            {"data": {"shards": "/b", "image_size": 224}},
        ),
        (
            {"data": {"crop": "padded", "crop_padding": 8, "flip": 0.0}},
            {"data": {"crop": "random_resized"}},
            {"data": {"crop": "random_resized", "flip": 0.0}},
        ),
    ],
)
def test_rule(base: dict[str, Any], own: dict[str, Any], wanted: dict[str, Any]) -> None:
    before = copy.deepcopy((base, own))
    assert merged(base, own) == wanted
    assert (base, own) == before
    assert merged(base, copy.deepcopy(base)) == base  # the base's own values may be repeated


def test_what_a_recipe_means_that_does_not_say() -> None:
    values = load_recipe("mae_vit_b16").dump()
    for section, defaults in UNSAID.items():
        assert not read_recipe("mae_vit_b16")[0][section].keys() & defaults.keys()
        assert {key: values[section][key] for key in defaults} == defaults


def test_order_of_teachers() -> None:
    """Masks follow the first teacher that has a class token."""
    base = {"teachers": {"b": DINO, "a": CLIP}}
    assert list(merged(base, {"teachers": {"c": DINO, "a": {"precision": "fp16"}}})["teachers"]) == ["b", "a", "c"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text(ranks.recipe(tmp_path, tmp_path / "shards").read_text())
    return tmp_path


def write(path: Path, values: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_bases_are_names_and_relative_paths(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change: dict[str, Any] = {"schedule": {"steps": 13}}
    wanted = load_recipe(str(folder / "base.yaml"), ["schedule.steps=13"])
    assert load_recipe(write(folder / "own.yaml", {"extends": "base.yaml", **change})) == wanted
    assert load_recipe(write(folder / "deep" / "own.yaml", {"extends": "../base.yaml", **change})) == wanted
    assert load_recipe(write(folder / "own.yaml", {"extends": str(folder / "base.yaml"), **change})) == wanted
    monkeypatch.chdir(folder / "deep")
    assert load_recipe("own.yaml") == wanted
    named = load_recipe(write(folder / "own.yaml", {"extends": "mae_vit_b16", **change}))
    assert named == load_recipe("mae_vit_b16", ["schedule.steps=13", "schedule.epochs=null", *NOTHING])
    assert read_recipe(str(folder / "own.yaml"))[1] == "mae_vit_b16" and read_recipe("mae_vit_b16")[1] is None


NOTHING = ["expected={}"]
"""What a recipe should reach does not carry over to one that extends it."""


def test_a_file_may_extend_any_recipe_of_the_package(folder: Path) -> None:
    """mae_vit_l16 extends mae_vit_b16."""
    assert read_recipe("mae_vit_l16")[1] == "mae_vit_b16"
    own = write(folder / "own.yaml", {"extends": "mae_vit_l16", "schedule": {"epochs": 3, "warmup_epochs": 1}})
    assert load_recipe(own) == load_recipe("mae_vit_l16", ["schedule.epochs=3", "schedule.warmup_epochs=1", *NOTHING])


def test_recipes_of_the_package_extend_whole_ones() -> None:
    for name in recipe_names():
        base = read_recipe(name)[1]
        assert base is None or (base in recipe_names() and read_recipe(base)[1] is None), name


def test_the_example_in_the_docs(folder: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    (folder / "own.yaml").write_text(page.split("```yaml\n")[1].split("```")[0])
    changes = ["data.shards=/data/imagenet", "teachers.clip.weights=/local/clip_vit_l14.safetensors"]
    assert load_recipe(str(folder / "own.yaml")) == load_recipe(
        "maskalign_vit_l16", [*changes, "schedule.epochs=400", *NOTHING]
    )


def test_overrides_come_last(folder: Path) -> None:
    own = write(folder / "own.yaml", {"extends": "base.yaml", "schedule": {"steps": 13}})
    assert load_recipe(own, ["schedule.steps=14", "optim.clip=2"]).schedule.steps == 14


def test_a_run_folder_can_be_extended(folder: Path) -> None:
    """Its config.yaml has every key, null and default, and still gives way."""
    whole = load_recipe("maskalign_vit_b16").dump()
    write(folder / "config.yaml", whole)
    student: dict[str, Any] = {"size": "large"}
    teacher = {"library": "timm", "model": "vit_large_patch14_clip_quickgelu_224.openai", "image_size": 196}
    values = {"extends": "config.yaml", "student": student, "teachers": {"clip": teacher}}
    run = load_recipe(write(folder / "own.yaml", values))
    assert (run.student.width, run.student.depth, run.student.heads) == (1024, 24, 16)
    assert run.teachers["clip"].image_size == 196 and run.teachers["clip"].weights is None
    short: dict[str, Any] = {"extends": "config.yaml", "schedule": {"steps": 5, "warmup_epochs": 0}}
    run = load_recipe(write(folder / "own.yaml", short))
    assert (run.schedule.steps, run.schedule.epochs) == (5, None)
    plain: dict[str, Any] = {"extends": "config.yaml", "method": {"name": "mae"}, "teachers": None}
    run = load_recipe(write(folder / "own.yaml", plain))
    assert run.method == load_recipe("mae_vit_b16").method and run.teachers == {}


@pytest.mark.parametrize(
    ("own", "line"),
    [
        (
            {"extends": "mae_vit_b61"},
            "own.yaml: extends = mae_vit_b61: recipe 'mae_vit_b61' is unknown; did you mean 'mae",
        ),
        ({"extends": "nothing_like_it"}, "is unknown; `mimscale recipes` lists them, a path ends in .yaml"),
        ({"extends": "none.yaml"}, "none.yaml' cannot be read: No such file"),
        ({"extends": "list.yaml"}, "list.yaml' must be a mapping of sections, found list"),
        (
            {"extends": "child.yaml"},
            "extends = child.yaml: it extends base.yaml itself; a base is the name of a recipe",
        ),
        ({"extends": "grandchild.yaml"}, "extends = grandchild.yaml: it extends mae_vit_b16 itself"),
        ({"extends": "own.yaml"}, "extends = own.yaml: it extends own.yaml itself"),
        ({"extends": "circle.yaml"}, "extends = circle.yaml: it extends own.yaml itself"),
        ({"extends": 3}, "own.yaml: extends = 3: must be the name of a recipe or a path that ends in .yaml"),
        ({"extends": None}, "own.yaml: extends = None: must be the name"),
        ({"extends": ["base.yaml"]}, "own.yaml: extends = ['base.yaml']: must be the name"),
        ({"extend": "base.yaml"}, "own.yaml: unknown key extend; did you mean 'extends'?"),
        ({"extends": "base.yaml", "optim": "fast"}, "own.yaml (extends base.yaml): optim = 'fast': input should be a"),
        ({"extends": "base.yaml", "method": "mae"}, "method = 'mae': input should be"),
        ({"extends": "base.yaml", "method": None}, "own.yaml (extends base.yaml): method is missing"),
        ({"extends": "base.yaml", "optim": {"clp": 1}}, "unknown key optim.clp; did you mean 'clip'?"),
        ({"extends": "base.yaml", "optin": {}}, "unknown key optin; did you mean 'optim'?"),
        ({"extends": "base.yaml", "method": {"name": "mea"}}, "method.name = 'mea' is unknown; did you mean 'mae'?"),
        ({"extends": "wrong.yaml"}, "own.yaml (extends wrong.yaml): unknown key optim.clp"),
        (
            {"extends": "maskalign_vit_b16", "teachers": {"clop": None}},
            "extends = maskalign_vit_b16: teachers.clop = null: there is nothing to remove; the base has clip",
        ),
        ({"extends": "base.yaml", "schedule": {"epochs": 3, "steps": 4}}, "needs exactly one of epochs and steps"),
    ],
)
def test_one_line(folder: Path, own: dict[str, Any], line: str) -> None:
    base = yaml.safe_load((folder / "base.yaml").read_text())
    write(folder / "list.yaml", [1])
    write(folder / "child.yaml", {"extends": "base.yaml"})
    write(folder / "grandchild.yaml", {"extends": "mae_vit_b16"})
    write(folder / "circle.yaml", {"extends": "own.yaml"})
    write(folder / "wrong.yaml", {**base, "optim": {"clp": 1}})
    with pytest.raises(UserError) as error:
        load_recipe(write(folder / "own.yaml", own))
    assert line in str(error.value) and "\n" not in str(error.value)


def test_extends_is_no_override(folder: Path) -> None:
    with pytest.raises(UserError, match="unknown key extends"):
        load_recipe(str(folder / "base.yaml"), ["extends=mae_vit_b16"])
