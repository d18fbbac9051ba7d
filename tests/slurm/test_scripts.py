"""Tests of jobs/ without a cluster: syntax, headers, one body for all sizes, container commands, slow nodes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from mimscale.config.recipes import load_recipe
from mimscale.cost.report import SMALL_MICRO_BATCH
from tests.scripts import ROOT, load_script

JOBS = ROOT / "jobs"
BATCH = sorted(JOBS.glob("*.sbatch"))
PRETRAIN = sorted(JOBS.glob("pretrain_*.sbatch"))
SHELL = sorted([*JOBS.glob("*.sh"), *BATCH, JOBS / "submit", JOBS / "site.env.example"])


def header(path: Path) -> dict[str, str]:
    pairs = (line.removeprefix("#SBATCH --") for line in path.read_text().splitlines() if line.startswith("#SBATCH"))
    return {name: value for name, _, value in (pair.partition("=") for pair in pairs)}


def body(path: Path) -> str:
    """Everything but the header and the recipe."""
    lines = path.read_text().splitlines()
    return "\n".join(line for line in lines if not line.startswith(("#SBATCH", "RECIPE=")))


@pytest.mark.parametrize("path", SHELL, ids=lambda p: p.name)
def test_syntax(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("path", SHELL, ids=lambda p: p.name)
def test_shellcheck(path: Path) -> None:
    command = ["shellcheck", "--shell=bash", "--severity=warning", "--exclude=SC1091,SC2034", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_sizes_differ_in_header_and_recipe_only() -> None:
    assert len(PRETRAIN) >= 2
    assert len({body(path) for path in PRETRAIN}) == 1


@pytest.mark.parametrize("path", PRETRAIN, ids=lambda p: p.name)
def test_sizes_are_what_plan_advises(path: Path) -> None:
    """Each GPU has more images of the recipe's batch than those of which `mimscale plan` says to use fewer GPUs."""
    (recipe,) = re.findall(r"^RECIPE=\$\{RECIPE:-(\w+)\}", path.read_text(), re.MULTILINE)
    gpus = int(header(path)["nodes"]) * int(header(path)["gpus-per-node"])
    assert load_recipe(recipe).schedule.global_batch // gpus > SMALL_MICRO_BATCH
    planned = re.findall(rf"mimscale plan {recipe} --gpus (\d+)", (ROOT / "README.md").read_text())
    assert planned == ([str(gpus)] if path.stem == "pretrain_vit_h" else [])


@pytest.mark.parametrize("path", BATCH, ids=lambda p: p.name)
def test_headers(path: Path) -> None:
    options = header(path)
    site = {"partition", "account", "qos", "constraint", "gres", "exclude", "mail-user", "no-kill"}
    assert not site & options.keys(), "settings of a site belong into site.env"
    assert options.get("gpus-per-node", "1").isdigit(), "the GPU type is a setting of the site"
    assert options["ntasks-per-node"] == options.get("gpus-per-node", "1"), "one rank uses one GPU"
    assert options["output"].startswith("slurm-%x-"), "without the folder there would be no log"
    assert options["job-name"] == path.stem and options["open-mode"] == "append" and "requeue" in options
    of_hours = "_requeue.sh" in path.read_text()
    assert options.get("signal") == ("B:USR1@300" if of_hours else None) and of_hours >= (path in PRETRAIN)


def test_every_site_setting_is_in_the_example() -> None:
    used = set(re.findall(r"\bSITE_\w+", "".join(path.read_text() for path in SHELL if path.suffix != ".example")))
    example = (JOBS / "site.env.example").read_text()
    assert used - {"SITE_ENV"} <= set(re.findall(r"\bSITE_\w+", example))


def test_the_example_is_valid_with_every_line_enabled() -> None:
    text = re.sub(r"^#export", "export", (JOBS / "site.env.example").read_text(), flags=re.MULTILINE)
    done = subprocess.run(
        ["bash", "-euc", f"SHARDS=/mine\n{text}\nenv"],
        capture_output=True,
        text=True,
        env={"USER": "me", "PATH": "/bin:/usr/bin"},
    )
    values = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert values["SITE_CONTAINER_RUNTIME"] == "pyxis" and values["SBATCH_MEM_PER_NODE"] == "0"
    assert values["SHARDS"] == "/mine" and values["VAL_SHARDS"] == "/scratch/me/imagenet/val"


@pytest.mark.parametrize(
    ("runtime", "expected"),
    [
        (
            "pyxis",
            [
                "--container-image=/img",
                "--container-mounts=MOUNTS",
                "--container-workdir=PWD",
                "--no-container-mount-home",
            ],
        ),
        ("apptainer", ["apptainer", "exec", "--nv", "--bind", "MOUNTS", "--pwd", "PWD", "/img"]),
    ],
)
def test_container_commands(tmp_path: Path, runtime: str, expected: list[str]) -> None:
    script = f'source "{JOBS}/_common.sh"; rank_command -m mimscale train; printf "%s\\n" "${{command[@]}}"'
    env = {"SITE_CONTAINER": "/img", "SITE_CONTAINER_RUNTIME": runtime, "SITE_CONTAINER_MOUNTS": "/a:/b",
           "SHARDS": "/s", "LOCAL_DIR": "/l", "RUN_DIR": "/r", "MIMSCALE_PYTHON": "python",
           "PATH": "/bin:/usr/bin"}  # fmt: skip
    done = subprocess.run(["bash", "-c", script], env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
    here, root = str(tmp_path), str(JOBS.parent)
    mounts = f"{root}:{root},{here}:{here},/l:/l,/r:/r,/s:/s,/a:/b"
    words = [
        {"MOUNTS": mounts, "PWD": here}.get(w, w.replace("MOUNTS", mounts).replace("=PWD", f"={here}"))
        for w in expected
    ]
    lines = done.stdout.splitlines()
    first = lines.index(words[0])
    assert lines[first : first + len(words)] == words
    assert lines[-4:] == ["python", "-m", "mimscale", "train"]


# --------------------------------------------------------------------------------------------------- comm_check.py


@pytest.fixture(scope="module")
def comm_check() -> ModuleType:
    return load_script("jobs/comm_check.py")


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 7, 16, 65])
def test_rounds_pair_every_node_with_new_partners(comm_check: ModuleType, nodes: int) -> None:
    plan = comm_check.rounds(nodes)
    pairs = [pair for pairing in plan for pair in pairing]
    assert len(pairs) == len(set(pairs)) and all(0 <= a < b < nodes for a, b in pairs)
    for pairing in plan:
        assert len({node for pair in pairing for node in pair}) == 2 * (nodes // 2)
    if nodes > 1:
        assert {node for pair in pairs for node in pair} == set(range(nodes))


@pytest.mark.parametrize("nodes", [3, 4, 9])
@pytest.mark.parametrize("slow", [0, 1, 2])
def test_only_the_slow_node_is_reported(
    comm_check: ModuleType, nodes: int, slow: int, capsys: pytest.CaptureFixture[str]
) -> None:
    best = [
        min(0.5 if slow in pair else 0.1 for pairing in comm_check.rounds(nodes) for pair in pairing if node in pair)
        for node in range(nodes)
    ]
    comm_check.report([(f"n{i}", 0.01, best[i]) for i in range(nodes)], megabytes=1, factor=2.0)
    bad = [line for line in capsys.readouterr().out.splitlines() if line.startswith("BAD NODE")]
    assert len(bad) == 1 and bad[0].startswith(f"BAD NODE n{slow}: all-reduce with its best partner takes 500.0 ms")


def test_two_nodes_are_compared_by_the_time_inside(comm_check: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    comm_check.report([("n1", 0.1, 0.7), ("n2", 0.5, 0.7)], megabytes=1, factor=2.0)
    assert re.findall(r"BAD NODE (\w+)", capsys.readouterr().out) == ["n2"]


@pytest.mark.parametrize(("name", "line"), [("shared-7", "OK NODE n5"), ("shared-8", "UNSHARED NODE n5")])
def test_a_run_folder_that_a_node_does_not_share(tmp_path: Path, name: str, line: str) -> None:
    """Where the file that the job wrote is missing: on that node RUN_DIR is a folder of its own."""
    (tmp_path / "shared-7").touch()
    environment = {"PATH": os.environ["PATH"], "SLURMD_NODENAME": "n5", "LOCAL_DIR": str(tmp_path), "MIN_FREE_GB": "0"}
    words = ["bash", str(JOBS / "node_check.sh")]
    done = subprocess.run(
        words, env={**environment, "SHARED_FILE": str(tmp_path / name)}, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [line]
