"""The largest micro-batch that fits: doubling, then bisection; each try is a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mimscale.bench._cases import ended, out_of_memory, reason
from mimscale.errors import UserError

TRY_LIMIT_S = 240.0


def largest(fits: Callable[[int], bool], start: int, limit: int = 1 << 16) -> int:
    """The largest number of images for which `fits` holds, to an eighth of itself; 0 if not even one image does.

    fits: true up to some number, false above. start: the first try, at least 1. limit: the largest try.
    """
    low, high = 0, 0  # fits, does not fit (0: not known)
    size = start
    while not high and size <= limit:
        if fits(size):
            low, size = size, 2 * size
        else:
            high = size
    if not high:
        return low
    while high - low > max(1, low // 8):
        middle = _round((low + high) // 2, low, high)
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _round(size: int, low: int, high: int) -> int:
    """A multiple of 8 between the limits where there is one: kernels like those."""
    rounded = round(size / 8) * 8
    return rounded if low < rounded < high else size


def fits_in_a_process(command: Sequence[str]) -> Callable[[int], bool]:
    """Whether `command` with `--micro-batch N` ends well. Raises UserError for a failure that is not about memory."""

    def fits(size: int) -> bool:
        done = ended([*command, "--micro-batch", str(size)], TRY_LIMIT_S)
        if isinstance(done, str):
            raise UserError(f"--find-batch: {size} images: {done}")
        if done.returncode and not out_of_memory(done.stderr, done.returncode):
            raise UserError(f"--find-batch: {size} images: {reason(done.stderr, done.returncode)}")
        return done.returncode == 0

    return fits
