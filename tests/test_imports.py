"""The import arrows of the package point down only, and only the engine needs DeepSpeed."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import mimscale

ROOT = Path(mimscale.__file__).parent

# Packages from the bottom up. One may import those of a lower level, and of its own level those that stand before the
# colon in BESIDE. The light `config.py` of each package belongs to the level of `config`.
LEVELS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("types", "files"),
    ("config", "recipes"),
    ("data", "models", "teachers", "optim", "distributed"),
    ("masking", "checkpoint"),
    ("methods", "engine", "fault_tolerance"),
    ("monitoring", "cost"),
    ("convert",),
    ("evals",),
    ("training", "runs"),
    ("doctor", "api", "report"),
    ("bench",),
    ("__init__",),
    ("__main__",),
)
BESIDE: dict[str, set[str]] = {"config": {"recipes"}}
LEVEL = {package: level for level, packages in enumerate(LEVELS) for package in packages}


def package_of(parts: tuple[str, ...]) -> str:
    """The package that a module below mimscale counts for."""
    return "config" if parts[1:] == ("config",) else parts[0]


def imported(path: Path) -> set[str]:
    """Modules of this package, and outside packages, that a file imports anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def module_parts(name: str) -> tuple[str, ...]:
    """`mimscale.data.config.DataConfig` -> ("data", "config"): the module, without what is taken from it."""
    parts = tuple(name.split("."))[1:]
    while parts and not ((ROOT.joinpath(*parts)).is_dir() or ROOT.joinpath(*parts).with_suffix(".py").is_file()):
        parts = parts[:-1]
    return parts


def parts_of(path: Path) -> tuple[str, ...]:
    return path.relative_to(ROOT).with_suffix("").parts


def test_imports_go_down() -> None:
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        here = package_of(parts_of(path))
        assert here in LEVEL, f"{path}: the package '{here}' has no level in this test"
        for name in imported(path):
            if name.startswith("deepspeed") and here != "engine":
                wrong.append(f"{path.relative_to(ROOT)} imports deepspeed")
            there = package_of(parts) if name.startswith("mimscale.") and (parts := module_parts(name)) else None
            if there in (None, here) or there in BESIDE.get(here, ()):
                continue
            if LEVEL[there] >= LEVEL[here]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(sorted(wrong))


def test_four_files_at_the_root() -> None:
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "__main__.py", "types.py", "errors.py"}


def test_only_the_engine_and_the_loop_need_deepspeed() -> None:
    files = [p for p in ROOT.rglob("*.py") if package_of(parts_of(p)) not in {"engine", "training", "__main__"}]
    names = sorted(".".join(("mimscale", *parts_of(p))).removesuffix(".__init__") for p in files)
    code = (
        "import sys, importlib; sys.modules['deepspeed'] = None\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_configs_are_light() -> None:
    """Reading a recipe does not wait for torch."""
    names = sorted(".".join(("mimscale", *parts_of(p))) for p in ROOT.rglob("config.py"))
    code = (
        "import sys, importlib\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "import mimscale.config.base, mimscale.config.registry; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_preparing_data_and_reading_runs_do_not_wait_for_torch() -> None:
    """Each of its processes starts anew; torch would be nine tenths of that time."""
    names = "data_prep.__main__, mimscale.data.manifest, mimscale.report.cli"
    code = f"import sys; import {names}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# Modules of convert/ from the bottom up; one may import those of a lower level, and `formats` those of its own.
CONVERT: tuple[tuple[str, ...], ...] = (
    ("names", "difference", "saved_folder"),
    ("formats",),
    ("read", "reference", "positions"),
    ("networks", "write"),
    ("check", "model_card"),
    ("full_state", "hub_folder"),
    ("hub_timm",),
    ("hub_transformers", "push"),
    ("cli",),
)


def test_imports_inside_convert_go_down() -> None:
    level = {module: number for number, modules in enumerate(CONVERT) for module in modules}
    graph: dict[str, set[str]] = {}
    wrong = []
    for path in sorted((ROOT / "convert").rglob("*.py")):
        here = parts_of(path)[1:]
        found = {module_parts(name)[1:] for name in imported(path) if name.startswith("mimscale.convert.")}
        graph[".".join(here)] = {".".join(there) for there in found if there}
        if here[-1] == "__init__":
            assert not path.read_text(), f"{path} holds code"
            continue
        assert here[0] in level, f"{path}: the module '{here[0]}' has no level in this test"
        for there in sorted(found):
            beside = here[0] == "formats" == there[0]
            if level[there[0]] >= level[here[0]] and not beside:
                wrong.append(f"convert/{'/'.join(here)} imports {'.'.join(there)}")
    assert not wrong, "\n".join(wrong)
    assert tuple(TopologicalSorter(graph).static_order())  # raises CycleError for a circle among the formats


def test_imported_modules_exist() -> None:
    """Also those inside functions. mypy takes a missing module for an untyped one."""
    checkout = ROOT.parent
    wrong = []
    for path in sorted(p for folder in ("mimscale", "data_prep", "tests") for p in (checkout / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for module in modules:
                if module.split(".")[0] in ("mimscale", "data_prep"):
                    file = checkout.joinpath(*module.split("."))
                    if not file.is_dir() and not file.with_suffix(".py").is_file():
                        wrong.append(f"{path.relative_to(checkout)} imports {module}")
    assert not wrong, "\n".join(wrong)
