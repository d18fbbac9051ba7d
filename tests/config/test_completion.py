"""Completion in a real bash: the script is sourced, its function called as TAB does, and its replies read."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mimscale import bench
from mimscale.__main__ import VERBS, main
from mimscale.config.completion import keys_of
from mimscale.config.recipes import load_recipe, recipe_names

TAB = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}; COMPREPLY=()
$(complete -p mimscale | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "mimscale"
    with pytest.MonkeyPatch.context() as patch, path.open("w") as file:
        patch.setattr(sys, "stdout", file)
        assert main(["completion", "bash"]) == 0
    return path


def completed(script: Path, *words: str, folder: Path | None = None) -> list[str]:
    """What bash offers for the last of the words, in a shell where no Python can be started."""
    bash = shutil.which("bash")
    assert bash is not None
    tools = script.parent / "bin"
    tools.mkdir(exist_ok=True)
    for tool in ("sed", "sort"):
        if not (tools / tool).exists():
            (tools / tool).symlink_to(str(shutil.which(tool)))
    command = [bash, "--norc", "--noprofile", "-c", TAB, "tab", str(script), "mimscale", *words]
    done = subprocess.run(command, cwd=folder, env={"PATH": str(tools)}, capture_output=True, text=True, check=True)
    assert not done.stderr
    return done.stdout.split()


def test_verbs_options_and_names(script: Path) -> None:
    assert completed(script, "") == list(VERBS)
    assert completed(script, "ev") == ["evaluate"]
    assert "--run-dir" in completed(script, "train", "mae_tiny", "--r")
    assert {"knn", "linear", "top1", "transfer", "linear_mae"} <= set(completed(script, "evaluate", ""))
    assert completed(script, "bench", "") == bench.names()
    assert completed(script, "evaluate", "knn", "run", "--device", "") == ["auto", "cpu", "cuda"]
    assert {"timm", "student", "run"} <= set(completed(script, "convert", "--to", ""))
    assert completed(script, "completion", "") == ["bash", "zsh"]


def test_recipes_and_files(script: Path, tmp_path: Path) -> None:
    (tmp_path / "mae_own.yaml").touch()
    (tmp_path / "mae_notes.txt").touch()
    (tmp_path / "mae_runs").mkdir()
    tiny = completed(script, "train", "mae_", folder=tmp_path)
    assert set(tiny) == {*(name for name in recipe_names() if name.startswith("mae_")), "mae_own.yaml", "mae_runs/"}
    assert completed(script, "train", "mae_tiny", "--run-dir", "mae_", folder=tmp_path) == ["mae_runs"]
    assert set(completed(script, "evaluate", "knn", "mae_", folder=tmp_path)) == {p.name for p in tmp_path.iterdir()}
    assert "mae_vit_l16" in completed(script, "reconstruct", "a", "b", "c", "--recipe", "mae_vit_l", folder=tmp_path)


def test_keys_of_a_recipe(script: Path) -> None:
    keys = {key for key in load_recipe("mae_tiny").flat() if key.startswith("optim.")}
    assert set(completed(script, "train", "mae_tiny", "optim.")) == {f"{key}=" for key in keys}
    assert "method.fusion." in completed(script, "train", "mae_tiny", "--run-dir", "x", "method.")
    assert completed(script, "train", "maskalign_tiny", "teachers.") == ["teachers.random."]
    assert "teachers.random.precision=" in completed(script, "train", "maskalign_tiny", "teachers.random.")
    assert not completed(script, "train", "mae_tiny", "teachers.random.")
    assert "ema.decay=" in completed(script, "plan", "mae_tiny", "--json", "ema.")  # a section that is left out
    assert "optim." in completed(script, "train", "own.yaml", "op")  # of a file nothing is known: the keys of all
    assert "teachers." in completed(script, "bench", "host", "own.yaml", "te")


def test_values_of_a_key(script: Path) -> None:
    """bash cuts words at the equals sign."""
    assert completed(script, "train", "mae_tiny", "engine.device", "=") == ["auto", "cuda", "cpu"]
    assert completed(script, "train", "mae_tiny", "engine.device", "=", "c") == ["cuda", "cpu"]
    assert completed(script, "train", "mae_tiny", "engine.teachers_ahead", "=", "") == ["true", "false"]
    assert completed(script, "train", "mae_tiny", "optim.clip", "=", "") == []


def test_keys_are_those_that_a_recipe_takes() -> None:
    """Each is known to the recipe, and none of its own is left out."""
    for name in ("mae_tiny", "maskalign_tiny", "convmae_tiny", "mae_vit_b16_linear"):
        config = load_recipe(name)
        known = set(keys_of(config))
        missing = {key for key in config.flat() if key not in known and not any(k.startswith(key) for k in known)}
        inside = {key for key in missing if any(key.startswith(f"{section}.") for section in known)}  # plain mappings
        assert missing == inside, name


def test_zsh_gets_the_same_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "zsh"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("#compdef mimscale") and "_mimscale_recipes" in text and "mae_tiny" in text
