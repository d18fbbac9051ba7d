"""Ranks that are forked from a server which has imported torch and DeepSpeed: most of the cost of a tiny run is saved.

Each is a process of its own, with its own environment, arguments and output, and runs the module as `python -m` does.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from mimscale.distributed.world import free_port

SERVER = multiprocessing.get_context("forkserver")  # without threads, unlike the process that runs the tests
SERVER.set_forkserver_preload(["tests.preloaded"])
GRACE_S = 30.0  # torchrun's
LIMIT_S = 600.0  # below pytest's, which ends a test without a word of what its ranks were doing


def run(
    ranks: int,
    words: Sequence[str],
    environment: Mapping[str, str],
    meanwhile: Callable[[list[int]], None] = lambda pids: None,
) -> subprocess.CompletedProcess[str]:
    """Run a module on that many ranks and wait. As with torchrun one that fails ends the others, and the code is 1.

    meanwhile: called once, when all are started, with their process ids. Ranks that hang for LIMIT_S print the stacks
    of their threads and of their workers' and are killed; then raises TimeoutError with all that was printed.
    """
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    pipes = [SERVER.Pipe(duplex=False) for _ in ("stdout", "stderr")]  # a file would be cut where a test limits files
    ends = [write for _, write in pipes]
    processes: list[BaseProcess] = []
    for rank in map(str, range(ranks)):
        place = {**group, "RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": str(ranks)} if ranks > 1 else {}
        processes.append(SERVER.Process(target=_become, args=(words, {**environment, **place}, *ends)))
    hung, ended = False, list[int | None]()
    with ThreadPoolExecutor(2) as pool:
        printed = [pool.submit(_read, read) for read, _ in pipes]
        try:
            for process in processes:
                process.start()
            meanwhile([process.pid or 0 for process in processes])
            codes = _until_over(processes, time.monotonic() + LIMIT_S)
        except TimeoutError:
            hung, ended = True, [process.exitcode for process in processes]
            _end_all(processes)
        finally:
            for end in ends:
                end.close()
            for process in processes:
                if process.pid is not None and process.is_alive():
                    process.kill()
        texts = [text.result() for text in printed]
        if hung:
            raise TimeoutError(
                f"{' '.join(words)}: not over after {LIMIT_S:g} s, exit codes {ended}\n" + "\n".join(texts)
            )
        code = codes[0] if ranks == 1 else int(any(codes))
        return subprocess.CompletedProcess(list(words), code, *texts)


def _read(pipe: Connection) -> str:
    """What comes, until nobody is left who could write."""
    with os.fdopen(os.dup(pipe.fileno()), errors="replace") as file:
        return file.read()


def _until_over(processes: Sequence[BaseProcess], end_s: float) -> list[int]:
    """Wait for all or the first failure, and then for the rest, asked to end. Their exit codes. Raises TimeoutError."""
    # asked once a round: between two questions the last one may end, and a wait for nobody lasts until end_s
    while left := [process.sentinel for process in processes if process.exitcode is None]:
        if not multiprocessing.connection.wait(left, max(0.0, end_s - time.monotonic())):
            raise TimeoutError
        if any(process.exitcode for process in processes):
            for process in processes:
                process.terminate()
            for process in processes:
                process.join(GRACE_S)
                process.kill()
    for process in processes:
        process.join()
    return [process.exitcode or 0 for process in processes]


def _end_all(processes: Sequence[BaseProcess]) -> None:
    """The ranks and all processes under them print their stacks and are killed: one that hangs would keep the pipes."""
    pids = [process.pid for process in processes if process.pid is not None and process.is_alive()]
    for pid in pids:  # grows
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            with suppress(OSError):
                pids += map(int, children.read_text().split())
    for pid in pids:
        with suppress(OSError):
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
            print(f"process {pid} is in state {state}")
            os.kill(pid, signal.SIGQUIT)
            time.sleep(1.0)  # one after the other
    for pid in pids:
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def _become(words: Sequence[str], environment: Mapping[str, str], *printed: Connection) -> None:
    """`python -m WORDS`, in this process. printed: where standard output and standard error go."""
    assert "deepspeed" in sys.modules, "tests/preloaded.py could not be imported"
    multiprocessing.set_start_method(None, force=True)  # a fork server's children would take their workers from one
    for descriptor, pipe in enumerate(printed, start=1):
        os.dup2(pipe.fileno(), descriptor)
        pipe.close()
    # new ones, because those of the server take the pipe for the file that its own output went to
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    faulthandler.register(signal.SIGQUIT, file=2, all_threads=True)  # workers that are forked from here have it too
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests are a shell's background job
    os.environ.clear()
    os.environ.update(environment)
    module, *arguments = words
    sys.argv = [module, *arguments]
    code = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    from mimscale.distributed.end_process import end_process

    end_process(code)  # loaders end their workers at exit, which multiprocessing leaves out
