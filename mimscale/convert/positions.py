"""Position tables of another grid, resized: learned and sine-cosine tables, and relative position biases."""

from __future__ import annotations

import math

from mimscale.convert.formats.timm import TABLE, grid_side
from mimscale.convert.names import State
from mimscale.models import pos_embed, rel_pos_bias
from mimscale.models.rel_pos_bias import CLS_ROWS


def with_positions_of(weights: State, own: State) -> tuple[State, tuple[str, ...]]:
    """The weights with every position table in the shape that it has in `own`, and a line for each that was resized.

    Tables are resized bicubically (`models.pos_embed.resize`), biases as `models.rel_pos_bias.resize` does. What cannot
    be a table of a square grid is left as it is. own: the state dict of the network that is to hold them.
    """
    weights, notes = dict(weights), []
    for name in [name for name in weights if name.endswith(("pos_embed", TABLE)) and name in own]:
        old, new = weights[name], own[name]
        if old.shape == new.shape or old.shape[-1] != new.shape[-1]:
            continue
        if name.endswith(TABLE):
            before, after = grid_side(old), grid_side(new)
            if any((2 * side - 1) ** 2 + CLS_ROWS != len(t) for side, t in ((before, old), (after, new))):
                continue
            weights[name] = rel_pos_bias.resize(old, (after, after))
        else:
            prefix = new.shape[1] - math.isqrt(new.shape[1]) ** 2
            before, after = (math.isqrt(table.shape[1] - prefix) for table in (old, new))
            if before**2 + prefix != old.shape[1]:
                continue
            weights[name] = pos_embed.resize(old, (before, before), (after, after), prefix)
        notes.append(f"{name} resized from {before}x{before} to {after}x{after} patches")
    return weights, tuple(notes)
