"""Name formats: the sets of tensor names that checkpoints come with. Each other file of this folder is one.

"Official" names are those of the code that a paper published; "our" names those of a Method's state dict (`student.`,
`decoder.`, `alignment.`, `fusion.`, `head.`). A student alone has the names of timm's VisionTransformer or Beit, or of
ConvMAE's encoder. To add a format, add a file with the functions of `NameFormat`; nothing else has to be edited.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Protocol, cast

from torch import Tensor

from mimscale.config.registry import names_in
from mimscale.config.run import RunConfig
from mimscale.convert.names import Levels, Mapped, State, below
from mimscale.errors import UserError

PACKAGE = "mimscale.convert.formats"


class NameFormat(Protocol):
    """What a file of this folder defines.

    METHODS: our methods whose official code uses these names. WHOLE_MODEL: prefix of a name that a whole model has and
    an encoder alone has not; None where the format is of encoders only.
    """

    METHODS: tuple[str, ...]
    WHOLE_MODEL: str | None

    def recognises(self, state: Mapping[str, Tensor]) -> bool:
        """Whether a file has these names; at most one format says yes."""

    def encoder(self, state: Mapping[str, Tensor]) -> State:
        """The student's tensors in a file that `recognises`, without prefix."""

    def from_official(self, state: Mapping[str, Tensor], levels: Levels | None = None) -> Mapped:
        """Official names -> our names. levels: of each teacher, those that the recipe's loss reads."""

    def fits(self, weights: Mapping[str, Tensor]) -> bool:
        """Whether these names exist for all of our weights."""

    def to_official(self, weights: Mapping[str, Tensor], run: RunConfig) -> Mapped:
        """Our names -> official names. Raises UserError where the recipe has something that has no official name."""


@lru_cache
def formats() -> dict[str, NameFormat]:
    """Name of the format -> its module, in alphabetical order."""
    return {name: cast(NameFormat, importlib.import_module(f"{PACKAGE}.{name}")) for name in names_in(PACKAGE)}


def format_of(state: Mapping[str, Tensor]) -> str | None:
    """The format whose official names a state dict has, None where no format recognises them."""
    return next((name for name, names in formats().items() if names.recognises(state)), None)


def official_format(run: RunConfig, weights: Mapping[str, Tensor]) -> str:
    """The format of a method's official code, else the first one that has names for its weights. Raises UserError."""
    fitting = [name for name, names in formats().items() if names.fits(weights)]
    own = [name for name in fitting if run.method.name in formats()[name].METHODS]
    if not fitting:
        raise UserError(f"method.name = {run.method.name} has no official names; choose --to timm or --to mimscale")
    return (own or fitting)[0]


def encoder_of(state: Mapping[str, Tensor]) -> State:
    """The student's tensors in a state dict with official or our names; empty where no format recognises them."""
    student = below("student.", state)
    if student:
        return {name: tensor for name, tensor in student.items() if name != "mask_token"}
    name = format_of(state)
    return {} if name is None else formats()[name].encoder(state)
