"""A real SLURM of a few nodes on this host, with its own folder, ports and key; no other files are changed.

The daemons run in the foreground as children of this process, and the kernel kills them if it dies. If namespaces are
permitted, each node has its own hostname, an /etc/hosts with the names of all nodes, and its own `local` folder.
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
from collections.abc import Callable, Iterable, Iterator, Mapping
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
SlurmdTimeout=300
TCPTimeout=1
MessageTimeout=5
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs={cpus} Boards=1 \
SocketsPerBoard=1 CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=16000 Gres=gpu:{gpus} State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=gpu Nodes=ALL Default=YES MaxTime=7-00:00:00 State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes=ALL MaxTime=7-00:00:00 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
"""


class Cluster:
    """`start()` it, and always `stop()` it. `root` holds all files; `local` is node-local if the nodes are isolated."""

    def __init__(self, nodes: int = 2) -> None:
        self.nodes = [f"n{i + 1}" for i in range(nodes)]
        self.root = Path(tempfile.mkdtemp(prefix="ms", dir="/tmp"))  # the path of a unix socket is limited to 108 bytes
        self.local = self.root / "local"
        self.isolated = subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True).returncode == 0
        self.config = self.root / "etc" / "slurm.conf"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    # -------------------------------------------------------------------------------------------- start and stop

    def start(self) -> None:
        self._write_files()
        munge = self.root / "munge"
        run, log = self.root / "run", self.root / "log"
        files = {"key-file": munge / "key", "seed-file": munge / "seed", "socket": run / "munge.sock",
                 "pid-file": run / "munged.pid", "log-file": log / "munged.log"}  # fmt: skip
        options = (f"--{name}={path}" for name, path in files.items())
        self._daemon("munged", "munged", "--foreground", "--force", *options)
        self._until("munged", (run / "munge.sock").exists, 20)
        self._start_controller()
        for node in self.nodes:
            self._start_node(node)
        for node in self.nodes:
            self._until_up(node)

    def stop(self) -> None:
        try:
            if len(self._daemons) > 1:
                with contextlib.suppress(TimeoutError, subprocess.TimeoutExpired):
                    self.cancel_all()
        finally:
            for daemon in reversed(self._daemons.values()):
                daemon.terminate()
                try:
                    daemon.wait(10)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()
            survivors = [process for node in self.nodes for process in self._daemons_of(node)]
            _send(signal.SIGKILL, [*survivors, *self.tasks()])
            shutil.rmtree(self.root, ignore_errors=True)

    # ----------------------------------------------------------------------------------------------------- clients

    def environment(self, **more: str) -> dict[str, str]:
        """The environment of this process without variables for another SLURM."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "SITE_", "MIMSCALE_"))}
        return {**clean, "SLURM_CONF": str(self.config), **more}

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
        """Start a requeued job early: SLURM delays it until its old credential has expired.

        Not at once: a credential made in the same second in which the old one was revoked counts as revoked.
        """
        self._until(f"requeue of job {job}", lambda: self.show(job)["JobState"] == "PENDING", timeout_s)
        self._client("scontrol", "update", f"jobid={job}", "starttime=now+2")

    def end_in(self, job: str, seconds: int) -> None:
        """Shorten the time limit of a job. SLURM checks time limits every 30 s."""
        self._client("scontrol", "update", f"jobid={job}", f"endtime=now+{seconds}")

    # ------------------------------------------------------------------------------------------------------ failures

    def lose(self, node: str) -> None:
        """A power failure: kill the daemons and ranks of a node; SLURM is not informed."""
        _send(signal.SIGKILL, self._daemons_of(node))  # before the ranks, or they would report the death of a rank
        _send(signal.SIGKILL, self.tasks(node))
        self._daemons.pop(node).wait()

    def lose_daemon(self, node: str) -> None:
        """Kill slurmd; the ranks that it started go on running."""
        daemon = self._daemons.pop(node)
        daemon.kill()
        daemon.wait()

    def back(self, node: str) -> None:
        """Start slurmd again after either. SLURM then ends what is left of older jobs on the node."""
        self._start_node(node)
        if "DRAIN" in self._state(node) or "DOWN" in self._state(node):
            self._client("scontrol", "update", f"nodename={node}", "state=resume")
        self._until_up(node)

    def stop_controller(self) -> None:
        """Stop slurmctld; it keeps its state."""
        daemon = self._daemons.pop("slurmctld")
        daemon.terminate()
        daemon.wait()

    def controller_back(self) -> None:
        self._start_controller()
        self._until("the controller", lambda: self.run("scontrol", "ping").returncode == 0, 30)

    def until_down(self, node: str) -> None:
        """Wait until SLURM marks the node as down, within seconds instead of the usual five minutes."""
        self._set("SlurmdTimeout=300", "SlurmdTimeout=4")
        self._until(f"{node} to be down", lambda: self._state(node).startswith("DOWN"), 60)

    def declare_down(self, node: str) -> None:
        """Mark the node as down at once, as SLURM does after its timeout.

        Drained as well: an answer that the node sent before it was lost would return it to service.
        """
        for state in ("drain", "down"):
            self._client("scontrol", "update", f"nodename={node}", f"state={state}", "reason=test")

    def repair(self) -> None:
        """Restart everything that a test stopped."""
        if "slurmctld" not in self._daemons:
            self.controller_back()
        for node in self.nodes:
            if node not in self._daemons:
                self.back(node)
        self._set("SlurmdTimeout=4", "SlurmdTimeout=300")

    # ---------------------------------------------------------------------------------------------------- plumbing

    def _set(self, old: str, new: str) -> None:
        text = self.config.read_text()
        if f"\n{old}\n" in text:
            self.config.write_text(text.replace(f"\n{old}\n", f"\n{new}\n"))
            self._client("scontrol", "reconfigure")

    def _start_controller(self) -> None:
        self._daemon("slurmctld", "slurmctld", "-D", "-i", "-f", str(self.config))

    def _start_node(self, node: str) -> None:
        slurmd = ["slurmd", "-D", "-f", str(self.config), "-N", node]
        if self.isolated:
            setup = 'hostname "$1"; mount --bind "$2/etc/hosts" /etc/hosts; mount --bind "$2/local.$1" "$2/local"; '
            slurmd = ["unshare", "--uts", "--mount", "bash", "-ec", f'{setup} shift 2; exec "$@"', "node",
                      node, str(self.root), *slurmd]  # fmt: skip
        self._daemon(node, *slurmd)

    def _write_files(self) -> None:
        for name in ("etc", "log", "run", "state", "munge", "dev", "local", *(f"local.{n}" for n in self.nodes)):
            (self.root / name).mkdir()
        for node in self.nodes:
            (self.root / f"spool.{node}").mkdir()
        self.root.chmod(0o755)  # munge requires a socket that is open to others and a key that is not
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
        hosts = Path("/etc/hosts").read_text().rstrip("\n")
        self.config.with_name("hosts").write_text("\n".join([hosts, *(f"127.0.0.1 {n}" for n in self.nodes), ""]))

    def _daemon(self, name: str, *command: str) -> None:
        with_parent = ["setpriv", "--pdeathsig", "KILL", *command]
        with (self.root / "log" / f"start.{name}").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                with_parent,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _client(self, *command: str) -> str:
        return self.run(*command).stdout

    def _state(self, node: str) -> str:
        return self._client("scontrol", "show", "node", node).partition(" State=")[2].partition(" ")[0]

    def _until_up(self, node: str) -> None:
        self._until(node, lambda: self._state(node) in ("IDLE", "ALLOCATED", "MIXED", "IDLE+COMPLETING"), 60)

    def _until(self, what: str, condition: Callable[[], bool], timeout_s: float) -> None:
        end_s = time.monotonic() + timeout_s
        while not condition():
            dead = [name for name, daemon in self._daemons.items() if daemon.poll() is not None]
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

    def _daemons_of(self, node: str) -> list[int]:
        """slurmd and its step daemons, which can be found only by the log file that they have open."""
        log = str(self.root / "log" / f"slurmd.{node}.log")
        return [process for process, folder in _processes() if log in _links(folder / "fd")]

    def tasks(self, node: str | None = None) -> list[int]:
        """All other processes that were started under our configuration, on one node or on all."""
        marks = {f"SLURM_CONF={self.config}".encode()}
        if node is not None:
            marks.add(f"SLURMD_NODENAME={node}".encode())
        return [process for process, folder in _processes() if marks <= _environment(folder)]


def _processes() -> Iterator[tuple[int, Path]]:
    return ((int(path.name), path) for path in Path("/proc").glob("[0-9]*") if int(path.name) != os.getpid())


def _links(folder: Path) -> set[str]:
    found = set()
    with contextlib.suppress(OSError):  # of another user, or just ended
        for path in folder.iterdir():
            found.add(os.readlink(path))
    return found


def _environment(folder: Path) -> set[bytes]:
    with contextlib.suppress(OSError):
        return set((folder / "environ").read_bytes().split(b"\0"))
    return set()


def _send(number: signal.Signals, processes: Iterable[int]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


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
