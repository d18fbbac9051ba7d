"""Which rank this process is: read from the variables that a launcher sets, never guessed."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass

from mimscale.errors import UserError

START = "start with torchrun or srun"
LAUNCHED = ("TORCHELASTIC_RUN_ID", "CROSS_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "PMI_RANK")
"""Variables of launchers whose ranks are their children: torchrun, deepspeed, the kinds of mpirun."""

# rank, number of ranks, rank on the node: Open MPI, MVAPICH, then what MPICH, Intel MPI and `srun --mpi=pmi2` set
_OPEN_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
_MVAPICH = ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK")
_PMI = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID")
_SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
_TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@dataclass(frozen=True)
class Place:
    """This process among those of its launch. variable: which one says how many there are."""

    rank: int = 0
    size: int = 1
    local_rank: int | None = 0
    variable: str = "WORLD_SIZE"


def place(environment: MutableMapping[str, str] = os.environ) -> Place:
    """torchrun's variables, else those of mpirun, else those of a bare srun; one plain process without any.

    Raises UserError for variables that contradict each other or are no numbers.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return _torch_place(environment)
    for names in _kinds(environment):
        size = _number(environment, names[1], least=1)
        if size > 1:
            local = _number(environment, names[2]) if names[2] in environment else None
            return _checked(Place(_number(environment, names[0]), size, local, names[1]), names[0])
    return Place()


def _kinds(environment: MutableMapping[str, str]) -> list[tuple[str, str, str]]:
    """Of the launchers whose number of processes is set, the one that started this process before outer ones.

    mpirun starts its daemons with srun, whose variables the ranks inherit; `srun --mpi=pmi2` sets both to one number.
    """
    same = environment.get(_PMI[1]) == environment.get(_SLURM[1])
    order = (_OPEN_MPI, _MVAPICH, *((_SLURM, _PMI) if same else (_PMI, _SLURM)))
    return [names for names in order if names[1] in environment]


def _torch_place(environment: MutableMapping[str, str]) -> Place:
    counted = next((names[1] for names in _kinds(environment)), None)  # by srun or mpirun, which need neither

    def fix(name: str) -> str:
        return f"unset {name}: {counted} is set too" if counted else f"{START}, or unset {name} for one process"

    if "WORLD_SIZE" not in environment:
        raise UserError(f"RANK = {environment['RANK']} without WORLD_SIZE; {fix('RANK')}")
    size = _number(environment, "WORLD_SIZE", least=1)
    if "RANK" not in environment and size > 1:
        raise UserError(f"WORLD_SIZE = {size} without RANK; {fix('WORLD_SIZE')}")
    rank = _number(environment, "RANK") if "RANK" in environment else 0
    local = _number(environment, "LOCAL_RANK") if "LOCAL_RANK" in environment else None
    return _checked(Place(rank, size, local), "RANK")


def _checked(place: Place, name: str) -> Place:
    if place.rank >= place.size:
        raise UserError(f"{name} = {place.rank}, but {place.variable} = {place.size}: ranks count from 0; {START}")
    return place


def _number(environment: MutableMapping[str, str], name: str, least: int = 0, most: int = 2**31 - 1) -> int:
    text = environment.get(name, "")
    if not re.fullmatch(r"[0-9]{1,10}", text) or not least <= int(text) <= most:
        raise UserError(f"{name} = '{text}' is no whole number from {least} to {most}; {START}, or unset it")
    return int(text)


def adopt(environment: MutableMapping[str, str] = os.environ) -> Place:
    """`place`, with torchrun's variables set for it, where other code reads them, and a port that can be reached.

    Raises UserError.
    """
    found = place(environment)
    if found.size == 1:
        return found
    if "RANK" not in environment and found.variable == _SLURM[1]:
        environment["MASTER_ADDR"] = environment.get("MASTER_ADDR") or first_host(environment)
        environment["MASTER_PORT"] = environment.get("MASTER_PORT") or str(step_port(environment))
        tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", "1")  # such as 8(x4),2
        environment.setdefault("LOCAL_WORLD_SIZE", tasks.split("(")[0].split(",")[0])
    if not (environment.get("MASTER_ADDR") and environment.get("MASTER_PORT")):
        advice = START if found.variable == "WORLD_SIZE" else f"{START}, or set them for every rank (mpirun -x)"
        raise UserError(f"{found.variable} = {found.size} without MASTER_ADDR and MASTER_PORT; {advice}")
    _number(environment, "MASTER_PORT", least=1, most=65535)
    local = 0 if found.local_rank is None else found.local_rank
    environment.update({"RANK": str(found.rank), "WORLD_SIZE": str(found.size), "LOCAL_RANK": str(local)})
    return found


def step_port(environment: MutableMapping[str, str]) -> int:
    """A port between 20000 and 39999 for a SLURM step: others for the steps of one job, and for other jobs."""
    job, step = environment.get("SLURM_JOB_ID", "0"), environment.get("SLURM_STEP_ID", "0")
    if job.isdecimal() and step.isdecimal():
        return 20000 + (int(job) + 211 * int(step)) % 20000
    return 20000 + int(hashlib.sha256(f"{job}.{step}".encode()).hexdigest()[:8], 16) % 20000


def first_host(environment: MutableMapping[str, str]) -> str:
    """The node of rank 0 of a SLURM step. Raises UserError.

    `scontrol` knows it best, but is often missing in a container; then the first name of the list is taken.
    """
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or ""
    if shutil.which("scontrol", path=environment.get("PATH")) is not None:
        try:
            done = subprocess.run(
                ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, timeout=60, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            done = None
        if done is not None and done.returncode == 0 and done.stdout.split():
            return done.stdout.split()[0]
    host = first_of(nodes)
    if not host:
        raise UserError(f"SLURM_STEP_NODELIST = '{nodes}' names no node; set MASTER_ADDR and MASTER_PORT")
    return host


def first_of(nodes: str) -> str:
    """The first name in SLURM's short form of a list of nodes: "rack[1-2]n[07,09],login" -> "rack1n07"."""
    outside = re.match(r"(?:[^,\[\]]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", outside[0] if outside else "").strip()


def check_address(resolve: Callable[..., object] = socket.getaddrinfo) -> None:
    """Raises UserError where MASTER_ADDR is not known here: waiting for it would not help."""
    host = os.environ["MASTER_ADDR"]
    try:
        resolve(host, int(os.environ["MASTER_PORT"]))
    except (OSError, UnicodeError):
        raise UserError(
            f"MASTER_ADDR = {host} cannot be resolved on {socket.gethostname()}; set it to a name or an address of the "
            f"node of rank 0 that every node knows"
        ) from None
