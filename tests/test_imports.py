"""The import arrows of the package point down only, and only the engine needs DeepSpeed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import mimscale

ROOT = Path(mimscale.__file__).parent

# room -> rooms it may import from. A room is a folder or a single file of mimscale/. Every room may import BOTTOM.
BOTTOM = {"errors", "by_name", "contracts", "config", "digest", "ds_config"}
MAY_IMPORT = {
    "errors": set(),
    "contracts": set(),
    "by_name": set(),
    "config": {"by_name"},
    "digest": set(),
    "ds_config": set(),
    "schedule": set(),
    "optim": set(),
    "models": set(),
    "masking": {"models"},
    "methods": {"models", "masking"},
    "teachers": set(),
    "data": set(),
    "resilience": {"outbox"},
    "outbox": set(),
    "observe": {"outbox"},
    "engine": {"optim"},
    "state": set(),
    "run_folder": set(),
    "recipes": set(),
    "convert": {"outbox", "models", "methods", "data", "resilience", "run_folder"},
    "evals": {"models", "methods", "data", "resilience", "convert"},
    "compositions": {"models", "methods", "masking"},
    "doctor": {"compositions", "doctor_teacher", "models", "methods", "teachers", "data", "engine", "convert"},
    "doctor_teacher": {"models", "methods", "teachers", "data"},
    "bench": {"models", "methods", "masking", "teachers", "data", "resilience", "observe", "engine", "optim"},
    "prepare": {
        "outbox",
        "observe",
        "convert",
        "methods",
        "teachers",
        "data",
        "resilience",
        "engine",
        "run_folder",
        "schedule",
    },
    "recovery": {
        "outbox",
        "prepare",
        "methods",
        "teachers",
        "data",
        "resilience",
        "observe",
        "engine",
        "run_folder",
        "state",
    },
    "train": {
        "outbox",
        "prepare",
        "recovery",
        "models",
        "methods",
        "teachers",
        "data",
        "resilience",
        "observe",
        "convert",
        "engine",
        "state",
        "run_folder",
        "schedule",
        "optim",
    },
    "__main__": {"train", "evals", "convert", "doctor", "bench"},
    "__init__": set(),
}


def room(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported(path: Path) -> set[str]:
    """Rooms of this package, and outside packages, that a file imports anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            names |= {f"{module}.{a.name}" for a in node.names} if module == "mimscale" else {module}
    return names


def test_arrows_point_down() -> None:
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        here = room(path)
        assert here in MAY_IMPORT, f"{path}: room '{here}' is not in the map of this test"
        allowed = (
            MAY_IMPORT[here]
            | ({here} if (ROOT / here).is_dir() else set())
            | (BOTTOM if here not in BOTTOM else {"errors"})
        )
        for name in imported(path):
            parts = name.split(".")
            if parts[0] == "mimscale" and len(parts) > 1 and parts[1] not in allowed and parts[1] != "__version__":
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
            if parts[0] == "deepspeed" and here != "engine":
                wrong.append(f"{path.relative_to(ROOT)} imports deepspeed")
    assert not wrong, "\n".join(wrong)


def test_everything_but_the_engine_imports_without_deepspeed() -> None:
    files = [p for p in ROOT.rglob("*.py") if room(p) not in {"engine", "prepare", "recovery", "train", "__main__"}]
    names = sorted(
        ".".join(("mimscale", *p.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__") for p in files
    )
    code = (
        "import sys, importlib; sys.modules['deepspeed'] = None\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_preparing_data_does_not_wait_for_torch() -> None:
    """Each of its processes starts anew; torch would be nine tenths of that time."""
    code = "import sys; import data_prep.__main__, mimscale.data.manifest; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
