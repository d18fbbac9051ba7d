"""What a caller of the Python API may hand over by mistake: checked before anything is read, one line for each."""

from __future__ import annotations

import operator
import os
from pathlib import Path
from typing import Any, SupportsIndex, cast

import torch

from mimscale.errors import UserError

LARGEST_IMAGE = 8192  # pixels per side, as `data.image_size` has it
SEEDS = (-(2**63), 2**64 - 1)  # that torch's generators take


def path(name: str, value: Any) -> Path:
    """Raises UserError for what names no file."""
    if not isinstance(value, str | os.PathLike) or not str(value) or "\0" in str(value):
        raise UserError(f"{name} = {_shown(value)} is not a path; give a str or a pathlib.Path")
    return Path(value)


def whole_number(name: str, value: Any, least: int, most: int) -> int:
    """Also NumPy's integers. Raises UserError for other types, and for numbers outside least .. most."""
    try:
        number = operator.index(cast(SupportsIndex, value))
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise UserError(f"{name} = {_shown(value)} is not a whole number; give an int")
    if not least <= number <= most:
        raise UserError(f"{name} = {number} must be {least} or more and at most {most}")
    return number


def fraction(name: str, value: Any, example: str) -> float:
    """A number between 0 and 1, both excluded. Raises UserError. example: a usual value, for the message."""
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise UserError(f"{name} = {_shown(value)} is not a number; {example}")
    if not 0 < float(value) < 1:
        raise UserError(f"{name} = {float(value):g} must lie between 0 and 1; {example}")
    return float(value)


def flag(name: str, value: Any) -> bool:
    """Raises UserError for anything but True and False."""
    if not isinstance(value, bool):
        raise UserError(f"{name} = {_shown(value)} is neither True nor False")
    return value


def device(value: Any) -> torch.device:
    """None is the CPU. Raises UserError for a device that torch does not see here."""
    try:
        found = torch.device("cpu" if value is None else value)
        torch.empty(0, device=found)
    except (RuntimeError, TypeError, ValueError, AssertionError, NotImplementedError) as error:
        why = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"device = {_shown(value)} cannot be used here ({why[:200]}); give 'cpu' or 'cuda'") from None
    if found.type == "meta":
        raise UserError("device = 'meta' holds no numbers; give 'cpu' or 'cuda'")
    return found


def float_type(value: Any) -> torch.dtype:
    """None is float32. Raises UserError for what no network computes in."""
    if value is None:
        return torch.float32
    if value not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise UserError(
            f"dtype = {_shown(value)} is no type to compute in; give torch.float32, bfloat16, float16 or float64"
        )
    return cast(torch.dtype, value)


def _shown(value: Any) -> str:
    """A value as Python writes it, in one line and of a length to read."""
    return " ".join(repr(value).split())[:80]
