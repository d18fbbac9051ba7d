"""docs/adding_a_method.md works as written, and a new method or masking policy needs no edit anywhere else."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests import ranks

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# (\S+/\S+)\n")

pytestmark = [pytest.mark.multi, pytest.mark.slow]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the parts of the project that a method touches, or that a test of all methods reads."""
    for name in ("mimscale", "data_prep", "ds_configs", "tests", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "slurm", "faults"))
    for name in ("README.md", "setup.cfg"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def shell(folder: Path, script: str) -> None:
    environment = {**ranks.environment(), "PYTHONPATH": str(folder)}
    done = subprocess.run(["bash", "-euc", script], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{script}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


def test_the_document_works_as_written(checkout: Path) -> None:
    blocks = BLOCK.findall((ROOT / "docs" / "adding_a_method.md").read_text())
    assert [kind for kind, _ in blocks] == ["python", "python", "bash", "yaml", "bash", "bash"]
    for kind, text in blocks:
        if kind == "bash":
            shell(checkout, text)
        else:
            name = FILE.match(text)
            assert name is not None, "the first line of a block names its file"
            (checkout / name[1]).write_text(text.partition("\n")[2])
    curve = ranks.curve(checkout / "runs" / "selfalign_tiny")
    assert curve[max(curve)] < 0.3
    assert ranks.curve(checkout / "runs" / "zero3")[max(curve)] == pytest.approx(curve[max(curve)], abs=1e-5)


def test_a_new_method_and_a_new_policy_need_no_edit(checkout: Path) -> None:
    """A copy of each under another name passes every test that goes through all methods, policies and recipes."""
    package = checkout / "mimscale"
    method = (package / "methods" / "mae.py").read_text()
    (package / "methods" / "another.py").write_text(method.replace('"""MAE: ', '"""Another: ', 1))
    shutil.copy(package / "masking" / "random.py", package / "masking" / "elsewhere.py")
    recipe = (package / "recipes" / "mae_tiny.yaml").read_text()
    recipe = recipe.replace("name: mae", "name: another").replace("policy: random", "policy: elsewhere")
    (package / "recipes" / "another_tiny.yaml").write_text(recipe)
    run = "python -m pytest -n 0 -q -p no:cacheprovider"
    whole = (
        "tests/test_methods_table.py tests/config/test_recipe_table.py tests/masking/test_base.py tests/test_imports.py"
    )
    shell(checkout, f"{run} tests/config/test_recipes.py {whole}")
    # of those that train, what is new: every other one is trained where it stands
    shell(
        checkout,
        f"{run} -k 'another or elsewhere' tests/doctor/test_compositions.py tests/training/test_tiny_recipes.py",
    )
