"""One cluster for the test session; every test has its own site: stub Python, fake nvidia-smi, folders."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import DAEMONS, Cluster

JOBS = Path(__file__).parents[2] / "jobs"
SMALL = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1", "--time=10")

PYTHON = """\
#!/bin/sh
case "$1" in -m) PYTHONPATH="{root}" exec "{python}" -S "{stub}" "$@" ;; *) exec "{python}" "$@" ;; esac
"""
NVIDIA_SMI = """\
#!/bin/sh
[ "$SLURMD_NODENAME" = "$FAKE_BAD_NODE" ] && echo "GPU 0: fake" && exit 0
case "$*" in *ecc*) [ "$SLURMD_NODENAME" = "$FAKE_ECC_NODE" ] && echo 7 || echo 0; exit 0 ;; esac
for gpu in 0 1 2 3 4 5 6 7; do echo "GPU $gpu: fake"; done
"""


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    missing = [name for name in DAEMONS if shutil.which(name, path="/usr/sbin:/usr/bin:/usr/local/sbin") is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not on this machine; tests/run.sh installs SLURM where it may")
    cluster = Cluster()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # otherwise the jobs would survive this process
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@dataclass
class Site:
    """A user of the cluster: the folder from which a test submits, and its jobs/site.env."""

    cluster: Cluster
    folder: Path
    run_dir: Path
    env: dict[str, str]

    def write_env(self, **values: str) -> None:
        lines = "".join(f"export {key}='{value}'\n" for key, value in values.items())
        Path(self.env["SITE_ENV"]).write_text(f'export PATH="{self.folder}/bin:$PATH"\n{lines}')

    def sbatch(self, *arguments: str, env: Mapping[str, str] | None = None) -> str:
        return self.cluster.sbatch(*arguments, env={**self.env, **(env or {})}, cwd=self.folder)

    def pretrain(self, *trainer: str, options: Sequence[str] = (), env: Mapping[str, str] | None = None) -> str:
        """Submit jobs/pretrain_vit_h.sbatch on 2 nodes x 2 ranks into `run_dir`."""
        script = str(JOBS / "pretrain_vit_h.sbatch")
        return self.sbatch(*SMALL, *options, script, *trainer, env={"RUN_DIR": str(self.run_dir), **(env or {})})

    def log(self, job: str) -> str:
        return Path(self.cluster.show(job)["StdOut"]).read_text()

    def launch(self, rank: int = 0, restart: int = 0) -> dict[str, Any]:
        """Arguments, environment and pid that the stub recorded at its start."""
        found: dict[str, Any] = json.loads((self.run_dir / f"launch.{restart}.{rank}.json").read_text())
        return found

    def saves(self) -> list[tuple[int, int]]:
        """(restart, step) of each checkpoint of the stub."""
        lines = (self.run_dir / "saves").read_text().splitlines()
        return [(int(restart), int(step)) for restart, step in map(str.split, lines)]

    def interrupt(self, job: str) -> None:
        """Send the signal that SLURM sends 300 s before the time limit."""
        done = self.cluster.run("scancel", "--batch", "--signal=USR1", job)
        assert done.returncode == 0, done.stderr

    def until_started(self, restart: int = 0, ranks: int = 4) -> None:
        self.cluster.until("start of the ranks", (self.run_dir / f"launch.{restart}.{ranks - 1}.json").exists)

    def until_saved(self, restart: int = 0) -> None:
        def saved() -> bool:
            return (self.run_dir / "saves").exists() and self.saves()[-1][0] == restart

        self.cluster.until("a checkpoint", saved, timeout_s=60)


@pytest.fixture
def site(cluster: Cluster, tmp_path: Path) -> Iterator[Site]:
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    python = PYTHON.format(python=sys.executable, root=JOBS.parent, stub=Path(__file__).with_name("stub.py"))
    for name, text in {"python": python, "nvidia-smi": NVIDIA_SMI}.items():
        (bin_dir / name).write_text(text)
        (bin_dir / name).chmod(0o755)
    site = Site(cluster, tmp_path, tmp_path / "run", {"SITE_ENV": str(tmp_path / "site.env")})
    site.write_env(
        MIMSCALE_PYTHON=str(bin_dir / "python"),
        SITE_RUN_ROOT=str(tmp_path / "runs"),
        SITE_LOCAL_DIR=str(cluster.local),
        MIN_FREE_GB="1",
    )
    yield site
    cluster.repair()
    cluster.cancel_all()
