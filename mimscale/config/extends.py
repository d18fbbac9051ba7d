"""`extends: BASE` in a recipe: it then holds only what differs from BASE.

BASE is the name of a recipe of this package, or a path to a YAML file relative to the file that names it. One level: a
base file extends nothing, and the recipes of this package extend only such of their kind as extend nothing; a file of
one's own may extend any of them by name. The two are merged before overrides, defaults and validation, so a key that
nobody knows stays an error in either. The rule:

1. Sections, and mappings in them, are merged key by key. Any other value, a list too, replaces the base's.
2. `null` removes where things have names: a section (`init: null`), a teacher (`teachers: {clip: null}`) or its target
   (`method: {targets: {clip: null}}`). Elsewhere it is a value like any other.
3. What the base says about something that the recipe exchanges does not carry over (`DEPENDENTS`). Another
   `method.name`, `method.masking.policy`, `method.fusion.kind` or `optim.name`, or another `library` or `model` of a
   teacher, replaces that section whole. `schedule.epochs` takes the place of `steps` and the reverse, `student.size`
   that of `width`, `depth` and `heads`, `width` that of `size`. Another `schedule.kind` drops `milestones`, `gamma`,
   `min_lr` and `warmup_start_factor`, another `data.crop` drops `crop_scale`, `crop_ratio` and `crop_padding`, other
   `data.shards` drop `data.stream`, and other `weights` drop their `sha256`. `expected` never carries over.

Teachers keep the base's order, new ones follow. A value that is the base's own may be repeated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mimscale.errors import UserError

WHOLE = ("*",)  # all keys of the section
# Section -> key -> keys of the base in that section that do not fit another value of the key.
DEPENDENTS: dict[str, dict[str, tuple[str, ...]]] = {
    "data": {"shards": ("shards", "stream"), "crop": ("crop_scale", "crop_ratio", "crop_padding")},
    "student": {"size": ("width", "depth", "heads"), "width": ("size",)},
    "init": {"weights": ("sha256",)},
    "teachers.*": {"library": WHOLE, "model": WHOLE, "weights": ("sha256",)},
    "method": {"name": WHOLE},
    "method.masking": {"policy": WHOLE},
    "method.fusion": {"kind": WHOLE},
    "optim": {"name": WHOLE},
    "schedule": {
        "epochs": ("steps",),
        "steps": ("epochs",),
        "kind": ("milestones", "gamma", "min_lr", "warmup_start_factor"),
    },
}
# What a recipe means that does not say. The defaults of masking and fusion are each method's own, so any is another.
UNSAID = {"data": {"crop": "random_resized"}, "optim": {"name": "adamw"}, "schedule": {"kind": "cosine"}}
NAMED = ((), ("teachers",), ("method", "targets"), ("evals", "protocols"))
"""Mappings from names to things: the recipe itself, and three in it."""


def merged(base: Mapping[str, Any], own: Mapping[str, Any], place: tuple[str, ...] = ()) -> dict[str, Any]:
    """The values of a recipe `own` that extends `base`, by the rule above; neither is changed.

    place: keys from the recipe's root to the section that both are. Raises UserError for a null that removes nothing.
    """
    gone = _exchanged(base, own, place)
    if not place:
        gone.add("expected")  # of another recipe: what it should reach is not known from this one
    values = {key: value for key, value in base.items() if key not in gone}
    for key, value in own.items():
        if value is None and place in NAMED and key in base:
            values.pop(key, None)
        elif value is None and place in NAMED and place:
            known = ", ".join(map(str, base)) or "none"
            raise UserError(f"{'.'.join(place)}.{key} = null: there is nothing to remove; the base has {known}")
        elif isinstance(value, Mapping) and isinstance(values.get(key), Mapping):
            values[key] = merged(values[key], value, (*place, str(key)))
        else:
            values[key] = value
    return values


def _exchanged(base: Mapping[str, Any], own: Mapping[str, Any], place: tuple[str, ...]) -> set[str]:
    """Keys of `base` that do not carry over."""
    section = "teachers.*" if place[:-1] == ("teachers",) else ".".join(place)
    gone: set[str] = set()
    for key, dependents in DEPENDENTS.get(section, {}).items():
        if own.get(key) is not None and own[key] != base.get(key, UNSAID.get(section, {}).get(key)):
            gone |= set(base) if dependents == WHOLE else set(dependents)
    return gone
