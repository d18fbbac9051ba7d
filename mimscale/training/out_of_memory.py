"""A step that asks for more memory than there is: one line that names a micro-batch that would fit, and a snapshot."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mimscale.errors import UserError, warn

if TYPE_CHECKING:
    import torch

    from mimscale.config.run import RunConfig
    from mimscale.training.checked_run import CheckedRun

CANNOT_ALLOCATE = ("out of memory", "can't allocate memory", "cannot allocate memory", "memoryerror", "bad_alloc")
"""What PyTorch, its CPU allocator, Python and C++ say, in lower case."""


def says_out_of_memory(text: str) -> bool:
    return any(words in text.lower() for words in CANNOT_ALLOCATE)


def is_out_of_memory(error: BaseException) -> bool:
    import torch

    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and says_out_of_memory(str(error)))


@contextmanager
def explained(checked: CheckedRun) -> Iterator[None]:
    """Turns an error of memory into a UserError: exit code 2, because the same start would fail again."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(explanation(checked, error)) from error


def explanation(checked: CheckedRun, error: BaseException) -> str:
    """One line: what failed, where, and the change that would fit; it names the snapshot where there is one."""
    device = checked.world.device
    text = " ".join(str(error).split())
    tried = re.search(r"tried to allocate ([\d.]+ \w+)", text, re.IGNORECASE)
    room = memory_of(device, checked.world.size)
    try:
        change = change_that_fits(checked.config, checked.world.size, checked.micro_batch, room, device.type)
    except Exception:  # where not even the prediction fits, or knows this recipe
        change = f"lower engine.max_micro_batch below {checked.micro_batch}"
    file = write_snapshot(checked.run_dir, checked.world.rank, device)
    return (
        f"out of memory on {device} with a micro-batch of {checked.micro_batch} images"
        + (f", which asked for {tried[1]}" if tried else "")
        + f"; {change}"
        + ("" if file is None else f"; {file} shows what was allocated (pytorch.org/memory_viz)")
    )


def change_that_fits(config: RunConfig, ranks: int, micro_batch: int, room: float, kind: str) -> str:
    """The next step for a person: a smaller micro-batch, else what saves memory otherwise. room: bytes.

    kind: of the device, cuda or cpu.
    """
    from mimscale.training.auto_micro_batch import smaller_that_fits

    fits, all_fit = smaller_that_fits(config, ranks, micro_batch, room, kind)
    if fits is not None:
        why = f"{micro_batch} too were predicted to fit" if all_fit else "predicted to fit"
        return f"try engine.max_micro_batch={fits} ({why} in {room / 2**30:.1f} GiB); the global batch stays"
    saved = [] if config.engine.activation_checkpointing else ["engine.activation_checkpointing=1"]
    other = " or ".join([*saved, "a file of ds_configs/ with ZeRO-3", "more GPUs"])
    return f"no smaller micro-batch is predicted to fit in {room / 2**30:.1f} GiB; take {other} (`mimscale plan`)"


def memory_of(device: torch.device, ranks: int) -> float:
    """Bytes that this process may allocate: of a GPU, without what others hold there; else its share of the host's."""
    import torch

    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return float(free + torch.cuda.memory_reserved(device))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / max(1, local)
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return float(host if limit < 0 else min(host, limit))  # RLIM_INFINITY is -1


def write_snapshot(run_dir: Path, rank: int, device: torch.device) -> Path | None:
    """RUN/out_of_memory-rank-N.pickle: what CUDA's allocator holds. None on a CPU, and where it cannot be written."""
    if device.type != "cuda":
        return None
    import pickle

    import torch

    from mimscale.files.atomic import atomic_write

    file = run_dir / f"out_of_memory-rank-{rank}.pickle"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        atomic_write(file, pickle.dumps(torch.cuda.memory._snapshot(device)))
    except Exception as error:  # it explains a failure and must not become one
        warn(f"no memory snapshot: {type(error).__name__}: {error}")
        return None
    return file
