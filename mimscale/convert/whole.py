"""A whole method, student and decoder or heads, out of an official file and a recipe."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mimscale.config.run import RunConfig, method_class
from mimscale.convert.names import Levels, Mapped
from mimscale.convert.registry import families, of_state
from mimscale.convert.source import Loaded
from mimscale.convert.student import load
from mimscale.errors import UserError
from mimscale.methods.base import Method
from mimscale.types import TeacherInfo

MASKALIGN = "maskalign"


def method_from(loaded: Loaded, run: RunConfig) -> tuple[Method, tuple[str, ...]]:
    """The method of a recipe with the weights of an official file, and notes of what was left out. Raises UserError."""
    name, state = of_state(loaded.weights), loaded.weights
    if name is None:
        raise UserError(f"{loaded.path} has the names of none of {', '.join(families())}")
    family = families()[name]
    if not any(key.startswith(family.WHOLE) for key in state):
        raise UserError(
            f"{loaded.path} holds no {family.WHOLE}: it is not a whole {run.method.name} model; leave out --recipe "
            "to convert its encoder alone"
        )
    another = UserError(
        f"{loaded.path} is a whole model with the names of {name}, which method.name = {run.method.name} has not; "
        f"take a recipe of {' or '.join(family.METHODS)}"
    )
    if (MASKALIGN in family.METHODS) != (run.method.name == MASKALIGN):  # without its heads no teacher is known
        raise another
    method: Method = method_class(run.method.name)(run, _teachers_in(state, run))
    if not family.fits(method.state_dict()):
        raise another
    mapped: Mapped = family.from_official(state, levels_of(method))
    load(method, mapped.weights, loaded.path)
    return method, mapped.notes


def levels_of(method: Method) -> Levels:
    """What a method's loss reads of its teachers."""
    return {name: needs.levels for name, needs in method.needs.teachers.items() if needs.levels}


def _teachers_in(state: Mapping[str, Tensor], run: RunConfig) -> dict[str, TeacherInfo]:
    """The recipe's teachers, as far as a MaskAlign file's heads tell; those that choose masks only have no heads."""
    heads = [key for key in state if key.startswith("distill_heads.")]
    if not heads:
        return {}
    last = max(int(key.split(".")[1]) for key in heads)
    depth = state["distill_weights"].shape[0] if "distill_weights" in state else last + 1
    output = max(key for key in heads if key.startswith(f"distill_heads.{last}.") and key.endswith(".weight"))
    dim, size = state[output].shape[0], run.data.image_size
    return {name: TeacherInfo(name, dim, depth, run.grid, size, has_cls=True) for name in run.teachers or ["teacher"]}
