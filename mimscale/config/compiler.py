"""torch.compile on this machine: whether it works, how it is asked to, and what must not go through it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

TRITON_CAPABILITY = (7, 0)


def compiler_fault(device: Any) -> str:
    """Why torch.compile cannot make code for this device here; empty if it can."""
    import torch

    compilers = [name for name in (os.environ.get("CXX"), "g++", "clang++") if name]
    if not any(shutil.which(name) for name in compilers):
        return f"no C++ compiler was found ({', '.join(compilers)})"
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if torch.cuda.get_device_capability(device) < TRITON_CAPABILITY:
            return f"{torch.cuda.get_device_name(device)} is older than Triton supports"
    return ""


def options() -> dict[str, Any]:
    """Of Inductor: kernels are chosen by rule and not by timing, so that a resume computes the same bits."""
    import torch._inductor.config as inductor

    return {"deterministic": True} if hasattr(inductor, "deterministic") else {}


def use_cache_dir() -> None:
    """Compiled kernels are kept in CACHE_DIR, which jobs/ set to a folder on the node's disk.

    Call it before DeepSpeed is imported: Inductor fixes its folder at its first import.
    """
    if os.environ.get("CACHE_DIR"):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(os.environ["CACHE_DIR"]) / "inductor"))


def compile_seconds() -> float:
    """Wall time that this process has spent in torch.compile so far."""
    if "torch._dynamo.utils" not in sys.modules:
        return 0.0
    return float(sys.modules["torch._dynamo.utils"].calculate_time_spent()["total_wall_time"])


def uncompiled() -> AbstractContextManager[Any]:
    """Inside, everything that is compiled is computed eagerly: for passes of another shape, or with hooks, which would
    otherwise be compiled too.
    """
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    import torch

    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance
