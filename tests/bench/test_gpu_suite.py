"""jobs/gpu_suite.sh: the folder of wheels from a local index, and the suite with the tests of tests/gpu."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests import ranks

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "jobs" / "gpu_suite.sh"
WORDS = SCRIPT.read_text()
NEEDED = [*re.search(r"PACKAGES=\(([^)]*)\)", WORDS)[1].split(), "deepspeed"]  # type: ignore[index]


EXPECTED = re.search(r"EXPECTED=\(([^)]*)\)", WORDS)[1].split()  # type: ignore[index]


def closure(*names: str) -> set[str]:
    """Distributions that these need, and themselves, in their normal spelling."""
    found: set[str] = set()
    left = [canonicalize_name(name) for name in names]
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            wanted = map(Requirement, importlib.metadata.requires(name) or [])
            left += [canonicalize_name(r.name) for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def test_wheels_and_machine_are_all_that_the_project_needs() -> None:
    """But for ninja: DeepSpeed compiles nothing here."""
    modules = importlib.metadata.packages_distributions()
    machine = closure(*(modules[module][0] for module in EXPECTED))
    assert closure("mimscale") - machine - {"mimscale", "ninja"} <= {canonicalize_name(name) for name in NEEDED}


def wheel(folder: Path, name: str) -> None:
    """An empty wheel of the version that is installed here."""
    version, stem = importlib.metadata.version(name), name.replace("-", "_")
    info = f"{stem}-{version}.dist-info"
    files = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{stem}-{version}-py3-none-any.whl", "w") as archive:
        for path, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(path, text)


def script(*words: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    own = {k: v for k, v in ranks.environment().items() if k not in ("MIMSCALE_NO_SKIPS", "PYTEST_ADDOPTS")}
    environment = {**own, "PYTHON": sys.executable, **variables}
    return subprocess.run(
        ["bash", str(SCRIPT), *map(str, words)], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.mark.multi
def test_make_collects_the_installed_versions(tmp_path: Path) -> None:
    index, folder = tmp_path / "index", tmp_path / "out"
    index.mkdir()
    for name in NEEDED:
        wheel(index, name)
    done = script("make", folder, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(index), PIP_CONFIG_FILE=os.devnull)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in index.iterdir())
    assert f"bash jobs/gpu_suite.sh run {folder}" in done.stdout and f"{len(NEEDED)} wheels" in done.stdout


@pytest.mark.multi
def test_run_writes_results_as_they_come(tmp_path: Path) -> None:
    out = tmp_path / "results"
    done = script("run", tmp_path, "--only", "mae", "fails", SUITE="tiny", OUT=str(out), WORKERS="0", TESTS_S="60")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (out / "suite.jsonl").read_text().splitlines()]
    assert [row["case"] for row in rows] == ["mae", "fails"]
    assert rows[0]["images_per_s"] > 0 and "error" in rows[1]
    assert "| mae |" in (out / "suite.md").read_text() and (out / "tests.txt").read_text()


def test_a_machine_without_a_gpu_is_refused_before_anything_is_installed(tmp_path: Path) -> None:
    done = script("run", tmp_path, OUT=str(tmp_path / "results"), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and not done.stdout and not (tmp_path / "results").exists()
    assert "SUITE=gpu needs a GPU" in done.stderr and done.stderr.count("\n") == 1


def test_a_package_that_is_missing_is_named(tmp_path: Path) -> None:
    bare = tmp_path / "python3"  # without site-packages
    bare.write_text(f'#!/bin/sh\nexec {sys._base_executable} -S "$@"\n')  # type: ignore[attr-defined]
    bare.chmod(0o755)
    done = script("run", tmp_path, PYTHON=str(bare), PYTHONPATH="")
    assert done.returncode == 2 and "lacks torch, torchvision, timm," in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("words", [[], ["make", "a", "b"], ["run"], ["measure"]])
def test_other_words_print_the_usage(words: list[str]) -> None:
    done = script(*words)
    assert done.returncode == 2 and "jobs/gpu_suite.sh make [FOLDER]" in done.stderr
