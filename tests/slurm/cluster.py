"""A real SLURM of a few nodes on this host: own folder, ports and key; nothing outside the folder is touched.

The daemons run in the foreground as children of this process, and the kernel kills them if it dies. Where namespaces
are permitted each node has its own hostname, an /etc/hosts that knows its neighbours, and its own `local` folder.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
GPUS, CPUS = 8, 16

CONFIG = """\
ClusterName=mimscale
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={root}/run/munge.sock,cred_expire=5
StateSaveLocation={root}/state
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmdLogFile={root}/log/slurmd.%n.log
SlurmdSpoolDir={root}/spool.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,sched_min_interval=100000,bf_interval=2,batch_sched_delay=0
JobRequeue=1
MinJobAge=3600
KillWait=5
ReturnToService=2
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs={cpus} Boards=1 \
SocketsPerBoard=1 CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=16000 Gres=gpu:{gpus} State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=gpu Nodes=ALL Default=YES MaxTime=7-00:00:00 State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes=ALL MaxTime=7-00:00:00 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
"""


class Cluster:
    """Start with `start()`, and always `stop()`. `root` holds everything; `local` is node-local where isolated."""

    def __init__(self, nodes: int = 2) -> None:
        self.nodes = [f"n{i + 1}" for i in range(nodes)]
        self.root = Path(tempfile.mkdtemp(prefix="ms", dir="/tmp"))  # a unix socket's path is limited to 108 bytes
        self.local = self.root / "local"
        self.isolated = subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True).returncode == 0
        self.config = self.root / "etc" / "slurm.conf"
        self._daemons: list[subprocess.Popen[bytes]] = []

    # -------------------------------------------------------------------------------------------- start and stop

    def start(self) -> None:
        self._write_files()
        munge = self.root / "munge"
        run, log = self.root / "run", self.root / "log"
        files = {"key-file": munge / "key", "seed-file": munge / "seed", "socket": run / "munge.sock",
                 "pid-file": run / "munged.pid", "log-file": log / "munged.log"}  # fmt: skip
        self._daemon("munged", "--foreground", "--force", *(f"--{name}={path}" for name, path in files.items()))
        self._until("munged", (run / "munge.sock").exists, 20)
        self._daemon("slurmctld", "-D", "-i", "-f", str(self.config))
        for node in self.nodes:
            slurmd = ["slurmd", "-D", "-f", str(self.config), "-N", node]
            if self.isolated:
                setup = 'hostname "$1"; mount --bind "$2/etc/hosts" /etc/hosts; mount --bind "$2/local.$1" "$2/local"; '
                slurmd = ["unshare", "--uts", "--mount", "bash", "-ec", f'{setup} shift 2; exec "$@"', "node",
                          node, str(self.root), *slurmd]  # fmt: skip
            self._daemon(*slurmd)
        self._until("the nodes", lambda: self._idle() == set(self.nodes), 60)

    def stop(self) -> None:
        try:
            if len(self._daemons) > 1:
                with contextlib.suppress(TimeoutError, subprocess.TimeoutExpired):
                    self.cancel_all()
        finally:
            for daemon in reversed(self._daemons):
                daemon.terminate()
                try:
                    daemon.wait(10)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()
            self._kill_leftovers()
            shutil.rmtree(self.root, ignore_errors=True)

    # ----------------------------------------------------------------------------------------------------- clients

    def environment(self, **more: str) -> dict[str, str]:
        """This process's environment without anything that a user may have set for another SLURM."""
        mine = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "SITE_", "MIMSCALE_"))}
        return {**mine, "SLURM_CONF": str(self.config), **more}

    def run(
        self, *command: str, env: Mapping[str, str] | None = None, cwd: Path | None = None, timeout_s: float = 60
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            env=self.environment(**(env or {})),
            cwd=cwd or self.root,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    def sbatch(self, *arguments: str, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
        """Submit; returns the job's number."""
        done = self.run("sbatch", "--parsable", *arguments, env=env, cwd=cwd)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def show(self, job: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        fields = self._client("scontrol", "show", "job", job).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def wait(self, job: str, timeout_s: float = 60) -> dict[str, str]:
        """The job's fields once it has ended."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        self._until(f"job {job}", lambda: self.show(job)["JobState"] in ended, timeout_s)
        return self.show(job)

    def cancel_all(self) -> None:
        """End every job and wait until the nodes are free again."""
        self._client("scancel", "-u", getpass.getuser())
        self._until("the queue to be empty", lambda: not self._client("squeue", "-h").strip(), 30)

    def until(self, what: str, condition: Callable[[], bool], timeout_s: float = 30) -> None:
        self._until(what, condition, timeout_s)

    def start_now(self, job: str, timeout_s: float = 30) -> None:
        """A requeued job waits until its old credential has expired; shorten that.

        Not to zero: a credential of the second in which the old one was revoked is taken for the old one.
        """
        self._until(f"requeue of job {job}", lambda: self.show(job)["JobState"] == "PENDING", timeout_s)
        self._client("scontrol", "update", f"jobid={job}", "starttime=now+2")

    # ---------------------------------------------------------------------------------------------------- plumbing

    def _write_files(self) -> None:
        for name in ("etc", "log", "run", "state", "munge", "dev", "local", *(f"local.{n}" for n in self.nodes)):
            (self.root / name).mkdir()
        for node in self.nodes:
            (self.root / f"spool.{node}").mkdir()
        self.root.chmod(0o755)  # munge wants a socket that others may reach, behind a key that they may not read
        (self.root / "munge").chmod(0o700)
        key = self.root / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        for gpu in range(GPUS):  # a GPU is a character device to SLURM
            (self.root / "dev" / f"nvidia{gpu}").symlink_to("/dev/null")
        port, host = free_ports(len(self.nodes) + 1), socket.gethostname().split(".")[0]
        self.config.write_text(
            CONFIG.format(root=self.root, host=host, user=getpass.getuser(), port=port, first=port + 1,
                          last=port + len(self.nodes), nodes=len(self.nodes), cpus=CPUS, gpus=GPUS)
        )  # fmt: skip
        devices = f"File={self.root}/dev/nvidia[0-{GPUS - 1}]"
        self.config.with_name("gres.conf").write_text(
            f"AutoDetect=off\nNodeName=n[1-{len(self.nodes)}] Name=gpu {devices}\n"
        )
        known = Path("/etc/hosts").read_text().rstrip("\n")
        self.config.with_name("hosts").write_text("\n".join([known, *(f"127.0.0.1 {n}" for n in self.nodes), ""]))

    def _daemon(self, *command: str) -> None:
        log = (self.root / "log" / f"start.{len(self._daemons)}").open("wb")
        dies_with_us = ["setpriv", "--pdeathsig", "KILL", *command]
        self._daemons.append(
            subprocess.Popen(dies_with_us, env=self.environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        )
        log.close()

    def _client(self, *command: str) -> str:
        return self.run(*command).stdout

    def _idle(self) -> set[str]:
        return set(self._client("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split())

    def _until(self, what: str, condition: Callable[[], bool], timeout_s: float) -> None:
        end_s = time.monotonic() + timeout_s
        while not condition():
            dead = [d.args for d in self._daemons if d.poll() is not None]
            if dead or time.monotonic() > end_s:
                raise TimeoutError(
                    f"{what}: {f'daemon ended: {dead}' if dead else f'not after {timeout_s} s'}\n{self._logs()}"
                )
            time.sleep(0.1)

    def _logs(self) -> str:
        return "\n".join(
            f"== {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:])
            for path in sorted((self.root / "log").iterdir())
        )

    def _kill_leftovers(self) -> None:
        """Step daemons and tasks that outlived their slurmd: whatever was started under our configuration."""
        mark = f"SLURM_CONF={self.config}".encode()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (process / "environ").read_bytes().split(b"\0") and int(process.name) != os.getpid():
                    os.kill(int(process.name), signal.SIGKILL)


def free_ports(count: int) -> int:
    """The first of `count` consecutive free ports below the ephemeral range."""
    for first in range(30000 + os.getpid() * count % 2000, 32700, count):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first
    raise RuntimeError("no free ports between 30000 and 32700")
