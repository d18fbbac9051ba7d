"""Every launcher's variables are adopted, or refused in one line."""

from __future__ import annotations

import os
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mimscale.__main__ import without_local_rank
from mimscale.distributed import launcher
from mimscale.distributed.launcher import Place, adopt, first_host, first_of, place, step_port
from mimscale.errors import UserError

MASTER = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
STEP = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "n[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "PATH": "/nonexistent",
}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (5, 8, 1)),
        ({"RANK": "5", "WORLD_SIZE": "8"}, (5, 8, None)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}, (1, 2, 1)),
        ({"MV2_COMM_WORLD_RANK": "1", "MV2_COMM_WORLD_SIZE": "2", "MV2_COMM_WORLD_LOCAL_RANK": "0"}, (1, 2, 0)),
        ({"PMI_RANK": "2", "PMI_SIZE": "3", "MPI_LOCALRANKID": "2"}, (2, 3, 2)),
        (STEP, (3, 4, 1)),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, (0, 1, 0)),
        ({**STEP, "PMI_RANK": "9", "PMI_SIZE": "4"}, (3, 4, 1)),  # srun --mpi=pmi2 counts alike
        ({**STEP, "PMI_RANK": "9", "PMI_SIZE": "16", "MPI_LOCALRANKID": "3"}, (9, 16, 3)),  # mpirun's daemons use srun
        ({**STEP, "OMPI_COMM_WORLD_RANK": "6", "OMPI_COMM_WORLD_SIZE": "8"}, (6, 8, None)),
        ({**STEP, "RANK": "0", "WORLD_SIZE": "1"}, (0, 1, None)),
    ],
)
def test_place(variables: dict[str, str], expected: tuple[int, int, int | None]) -> None:
    found = place(dict(variables))
    assert (found.rank, found.size, found.local_rank) == expected


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"RANK": "x"}, "RANK = x without WORLD_SIZE"),
        ({"RANK": "7"}, "RANK = 7 without WORLD_SIZE"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK = 'x' is no whole number"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK = '-1' is no whole number"),
        ({"RANK": "٣", "WORLD_SIZE": "8"}, "is no whole number"),  # a digit that int() would take
        ({"WORLD_SIZE": ""}, "WORLD_SIZE = '' is no whole number"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE = '0' is no whole number"),
        ({"RANK": "0", "WORLD_SIZE": "2.0"}, "WORLD_SIZE = '2.0' is no whole number"),
        ({"WORLD_SIZE": "2", **MASTER}, "WORLD_SIZE = 2 without RANK; start with torchrun or srun, or unset"),
        ({**STEP, "WORLD_SIZE": "4"}, "WORLD_SIZE = 4 without RANK; unset WORLD_SIZE: SLURM_STEP_NUM_TASKS is set too"),
        ({"PMI_SIZE": "4", "PMI_RANK": "1", "RANK": "1"}, "without WORLD_SIZE; unset RANK: PMI_SIZE is set too"),
        ({"RANK": "2", "WORLD_SIZE": "2", **MASTER}, "RANK = 2, but WORLD_SIZE = 2"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "a", **MASTER}, "LOCAL_RANK = 'a' is no whole number"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE = 2 without MASTER_ADDR and MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "2", **MASTER, "MASTER_PORT": "70000"}, "MASTER_PORT = '70000'"),
        ({"RANK": "0", "WORLD_SIZE": "2", **MASTER, "MASTER_ADDR": ""}, "without MASTER_ADDR and MASTER_PORT"),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, r"OMPI_COMM_WORLD_SIZE = 2 .* \(mpirun -x\)"),
        ({"PMI_SIZE": "2"}, "PMI_RANK = '' is no whole number"),
        ({"SLURM_STEP_NUM_TASKS": "many"}, "SLURM_STEP_NUM_TASKS = 'many'"),
        ({**STEP, "SLURM_STEP_NODELIST": ""}, "names no node; set MASTER_ADDR"),
    ],
)
def test_refused(variables: dict[str, str], line: str) -> None:
    with pytest.raises(UserError, match=line) as refused:
        adopt({"PATH": "/nonexistent", **variables})
    assert "\n" not in str(refused.value)


def test_a_slurm_step_without_scontrol() -> None:
    """The variables that torchrun would have set; scontrol is not there."""
    variables = dict(STEP)
    assert adopt(variables) == Place(3, 4, 1, "SLURM_STEP_NUM_TASKS")
    assert [variables[n] for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")] == ["3", "4", "1", "2"]
    assert variables["MASTER_ADDR"] == "n07" and variables["MASTER_PORT"] == "20288"
    variables = {**STEP, **MASTER}
    adopt(variables)
    assert {name: variables[name] for name in MASTER} == MASTER


def test_scontrol_is_asked_where_it_is(tmp_path: os.PathLike[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tool = os.path.join(tmp_path, "scontrol")
    for answer, expected in (("echo first; echo second", "first"), ("exit 1", "n07"), ("true", "n07")):
        with open(tool, "w") as file:
            file.write(f"#!/bin/sh\n{answer}\n")
        os.chmod(tool, 0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        assert first_host({**STEP, "PATH": os.environ["PATH"]}) == expected


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[3-5]", "n3"),
        ("n[007,9]", "n007"),
        ("rack[1-2]n[07-09],login", "rack1n07"),
        ("a-b-[10-12]-x", "a-b-10-x"),
        ("", ""),
        ("[", ""),
    ],
)
def test_first_of_a_list_of_nodes(nodes: str, first: str) -> None:
    assert first_of(nodes) == first


def test_steps_and_jobs_have_ports_of_their_own() -> None:
    def ports(job: int) -> list[int]:
        return [step_port({"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}) for step in range(90)]

    for job in (1, 4711, 39_999, 2**31):
        assert len({*ports(job), *ports(job + 1)}) == 180
        assert all(20_000 <= port < 40_000 for port in ports(job))
    assert 20_000 <= step_port({"SLURM_JOB_ID": "12_3", "SLURM_STEP_ID": "x"}) < 40_000


def test_an_address_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "29500")
    for host in ("no-such-host.invalid", "n" * 300, "a..b"):
        monkeypatch.setenv("MASTER_ADDR", host)
        with pytest.raises(UserError, match="cannot be resolved on"):
            launcher.check_address()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    launcher.check_address()


@pytest.mark.parametrize(
    "words",
    [
        ["--local_rank=3", "train", "mae_tiny"],
        ["--local-rank", "3", "train", "mae_tiny"],
        ["train", "--local_rank", "3", "mae_tiny"],
    ],
)
def test_the_rank_that_launchers_put_before_the_arguments(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")  # so that it is restored
    monkeypatch.delenv("LOCAL_RANK")
    assert without_local_rank(words) == ["train", "mae_tiny"]
    assert os.environ["LOCAL_RANK"] == "3"
    monkeypatch.setenv("LOCAL_RANK", "1")  # what the environment says counts
    without_local_rank(words)
    assert os.environ["LOCAL_RANK"] == "1"


def test_messages_start_with_the_variable() -> None:
    with pytest.raises(UserError) as refused:
        place({"RANK": "1", "WORLD_SIZE": "1"})
    assert re.match("RANK = 1, but WORLD_SIZE = 1: ranks count from 0", str(refused.value))


NAMES = [
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID"),
    *("SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_JOB_ID"),
    *("SLURM_STEP_ID", "SLURM_STEP_TASKS_PER_NODE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    *("OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "PMI_RANK", "PMI_SIZE"),
]
VALUES = [
    "",
    " ",
    "0",
    "1",
    "2",
    "3",
    "-1",
    "+1",
    "1.0",
    "01",
    "x",
    "\u0663",
    "9" * 40,
    "n[1-2]",
    "[",
    "2(x2),1",
    "a\nb",
]


@settings(max_examples=300, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.sampled_from(NAMES), st.sampled_from(VALUES), max_size=8))
def test_any_variables_are_adopted_or_refused_in_one_line(variables: dict[str, str]) -> None:
    environment = {"PATH": "/nonexistent", **variables}
    try:
        found = adopt(environment)
    except UserError as error:
        assert "\n" not in str(error).strip() and len(str(error)) < 400
        return
    assert 0 <= found.rank < found.size
    if found.size > 1:
        assert [environment[name] for name in ("RANK", "WORLD_SIZE")] == [str(found.rank), str(found.size)]
        assert environment["MASTER_ADDR"] and 1 <= int(environment["MASTER_PORT"]) <= 65535
        assert place(environment) == Place(found.rank, found.size, found.local_rank or 0)
