"""The command line: exit codes, one line for bad input, and an installed wheel that works from any folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch.distributed as dist

from mimscale.__main__ import main
from tests import ranks

ROOT = Path(__file__).resolve().parent.parent


def refusal(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """The single line that bad input gets; the exit code is 2 and no run folder appears."""
    assert main([str(word) for word in words]) == 2
    captured = capsys.readouterr().err.strip().splitlines()
    assert len(captured) == 1, captured
    return captured[0]


def test_impossible_runs_are_refused_before_any_rank_connects(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MASTER_ADDR", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    recipe = ranks.recipe(tmp_path, shards)
    words = ("train", recipe, "--run-dir", tmp_path / "run")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "WORLD_SIZE = 3 without MASTER_ADDR" in refusal(capsys, *words)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29999")
    assert "does not divide over 3 ranks" in refusal(capsys, *words)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert "unknown key engine.devise; did you mean 'device'?" in refusal(capsys, *words, "engine.devise=cpu")
    assert "no such folder; make it with" in refusal(capsys, *words, f"data.shards={tmp_path / 'nowhere'}")
    assert "exceeds the 80 samples" in refusal(
        capsys, *words, "schedule.global_batch=96", "schedule.steps=null", "schedule.epochs=1"
    )
    assert "has 0 steps" in refusal(
        capsys,
        *words,
        "schedule.steps=null",
        "schedule.epochs=0.5",
        "schedule.warmup_epochs=0",
        "schedule.global_batch=80",
        "schedule.epochs=0.4",
    )
    assert "a warm-up of schedule.warmup_epochs = 50" in refusal(capsys, *words, "schedule.warmup_epochs=50")
    assert "sees no CUDA device" in refusal(capsys, *words, "engine.device=cuda")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").touch()
    assert "holds something that is not a run (thesis.txt)" in refusal(capsys, *words)
    (tmp_path / "run" / "thesis.txt").unlink()
    (tmp_path / "run" / "hang").mkdir()  # of a start that hung before it could write config.yaml
    assert "has no checkpoint to start from" in refusal(capsys, *words, "--fork", tmp_path / "new")
    assert "is --run-dir itself; name a new folder" in refusal(capsys, *words, "--fork", tmp_path / "a" / ".." / "run")
    assert "data.cache" in refusal(capsys, *words, "data.cache=''")
    folder = ("train", recipe, "--run-dir")
    assert "File name too long" in refusal(capsys, *folder, tmp_path / ("x" * 300))
    assert "a\\udcff is not UTF-8; name a folder" in refusal(capsys, *folder, tmp_path / "a\udcff")
    assert "null" in refusal(capsys, *folder, f"{tmp_path}/a\0b")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "broken").symlink_to("nowhere")
    assert "recipe.yaml/x cannot be used: Not a directory" in refusal(capsys, *folder, recipe / "x")
    assert "loop cannot be used: Too many levels of symbolic links" in refusal(capsys, *folder, tmp_path / "loop")
    assert "broken is a link to nothing; make the folder" in refusal(capsys, *folder, tmp_path / "broken")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["hang"]


@pytest.mark.usefixtures("ended_with_the_test")
def test_teacher_mismatches_are_refused(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    words: tuple[str | Path, ...] = (
        "train",
        ranks.recipe(tmp_path, shards, "maskalign"),
        "--run-dir",
        tmp_path / "run",
    )
    assert "sum" in refusal(capsys, *words, "student.depth=5")
    line = refusal(capsys, *words, "teachers.tiny.options.patch_size=16")
    assert "2x2" in line.replace(" ", "") or "(2,2)" in line.replace(" ", ""), line
    assert "bn" in refusal(capsys, *words, "method.target_norm=bn")
    missing = ["teachers.tiny.random=false", "teachers.tiny.weights=nowhere.safetensors"]
    assert "nowhere.safetensors does not exist" in refusal(capsys, *words, *missing)
    assert not (tmp_path / "run").exists() and not dist.is_initialized()


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"RANK": "x"}, "RANK = x without WORLD_SIZE"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE = '' is no whole number"),
        ({"RANK": "7"}, "RANK = 7 without WORLD_SIZE"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, "OMPI_COMM_WORLD_SIZE = 2"),
    ],
)
@pytest.mark.parametrize("verb", ["train", "evaluate"])
def test_variables_of_launchers_are_refused(
    verb: str, variables: dict[str, str], line: str, tmp_path: Path, shards: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    words: tuple[str | Path, ...] = ("train", ranks.recipe(tmp_path, shards), "--run-dir", tmp_path / "run")
    if verb == "evaluate":
        words = ("evaluate", "knn", tmp_path, "--train", shards, "--val", shards)
    assert line in refusal(capsys, *words)


def test_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "mae_tiny", "--run-dir", ""])  # "$RUN_DIR" of a shell that does not know it
    assert "argument --run-dir: an empty path; name a file or folder" in capsys.readouterr().err
    for words in ([], ["fly"], ["train"], ["train", "mae_vit_b16", "--speed"]):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2
    assert "unrecognized arguments: --speed" in capsys.readouterr().err


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(verb in text for verb in ("train", "recipes", "evaluate", "convert", "doctor"))


@pytest.mark.slow
def test_installed_package_works_from_any_folder(tmp_path: Path) -> None:
    """Recipes, DeepSpeed configs and data_prep travel with the package into a folder of their own."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    source = tmp_path / "source"  # a build leaves files in the tree it is run in
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "runs", "__pycache__", "*.egg-info"))
    subprocess.run([*pip, "wheel", "--no-deps", "-w", tmp_path, source], check=True, stderr=subprocess.DEVNULL)
    (wheel,) = tmp_path.glob("mimscale-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"ds_configs/zero2_fp16.json", "mimscale/recipes/mae_vit_b16.yaml", "mimscale/py.typed"} <= names
    assert not any(name.startswith("tests/") for name in names)
    subprocess.run([*pip, "install", "--no-deps", "--target", tmp_path / "site", wheel], check=True)
    code = (
        "import mimscale.config.recipes as c, mimscale.config.deepspeed as d; assert 'site' in c.__file__, c.__file__;"
        "c.load_recipe('maskalign_vit_h14'); d.load_ds_config('zero3_bf16'); print(c.recipe_names())"
    )
    environment = {**ranks.environment(), "PYTHONPATH": str(tmp_path / "site")}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    commands = (["data_prep", "--help"], ["mimscale", "doctor", "--help"], ["mimscale", "recipes"])
    for words in (["-c", code], *(["-m", *command] for command in commands)):
        subprocess.run([sys.executable, *words], cwd=elsewhere, env=environment, check=True, stdout=subprocess.DEVNULL)
