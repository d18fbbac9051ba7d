"""The families of official checkpoints: every file of `families/` is one, found by its name.

"Official" are the names of the methods' own code; "ours" those of a Method's state dict (`student.`, `decoder.`,
`alignment.`, `fusion.`, `head.`). A student alone has the names of timm's VisionTransformer or Beit, or ConvMAE's.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from typing import Protocol, cast

from torch import Tensor

from mimscale.config.run import RunConfig
from mimscale.convert.names import Levels, Mapped, State, below
from mimscale.errors import UserError


class Family(Protocol):
    """METHODS: those of ours whose official code has these names. WHOLE: starts a name that an encoder has not."""

    METHODS: tuple[str, ...]
    WHOLE: str

    def recognises(self, state: Mapping[str, Tensor]) -> bool:
        """Whether a file has these names; at most one family says yes."""

    def encoder(self, state: Mapping[str, Tensor]) -> State:
        """The student alone, out of a file that `recognises`."""

    def from_official(self, state: Mapping[str, Tensor], levels: Levels | None = None) -> Mapped:
        """Official -> ours. levels: what the recipe reads of its teachers."""

    def fits(self, weights: Mapping[str, Tensor]) -> bool:
        """Whether weights of ours can have these names."""

    def to_official(self, weights: Mapping[str, Tensor], run: RunConfig) -> Mapped:
        """Ours -> official."""


@lru_cache
def families() -> dict[str, Family]:
    """Name -> family."""
    files = (entry.name for entry in resources.files("mimscale.convert.formats").iterdir())
    names = sorted(name[:-3] for name in files if name.endswith(".py") and not name.startswith("_"))
    return {name: cast(Family, importlib.import_module(f"mimscale.convert.formats.{name}")) for name in names}


def of_state(state: Mapping[str, Tensor]) -> str | None:
    """The family whose names a file has."""
    return next((name for name, family in families().items() if family.recognises(state)), None)


def of_run(run: RunConfig, weights: Mapping[str, Tensor]) -> str:
    """The family of a run's method, else the first that can name its weights. Raises UserError."""
    fitting = [name for name, family in families().items() if family.fits(weights)]
    own = [name for name in fitting if run.method.name in families()[name].METHODS]
    if not fitting:
        raise UserError(f"method.name = {run.method.name} has no official names; choose --to timm or --to mimscale")
    return (own or fitting)[0]


def encoder_of(state: Mapping[str, Tensor]) -> State:
    """The student's tensors, out of official or our names; empty where no family knows the names."""
    student = below("student.", state)
    if student:
        return {name: tensor for name, tensor in student.items() if name != "mask_token"}
    name = of_state(state)
    return {} if name is None else families()[name].encoder(state)
