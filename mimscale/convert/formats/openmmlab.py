"""OpenMMLab's names (mmpretrain, mmselfsup): MFF and PixMIM, and their MAE.

Position tables are copied from the file and never recomputed: OpenMMLab's have the two halves of MAE's swapped.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mimscale.config.run import RunConfig
from mimscale.convert.names import Levels, Mapped, State, below, parts_of, renamed

METHODS: tuple[str, ...] = ("mff", "pixmim")
WHOLE_MODEL: str | None = "neck.mask_token"
PREFIXES = (  # theirs, ours; the first that fits is replaced
    ("backbone.patch_embed.projection.", "student.patch_embed.proj."),
    ("backbone.layers.", "student.blocks."),
    ("backbone.ln1.", "student.norm."),
    ("backbone.proj_layers.", "fusion.projections."),
    ("backbone.proj_weights", "fusion.logits"),
    ("backbone.", "student."),
    ("neck.mask_token", "decoder.mask_token"),
    ("neck.ln1.", "decoder.norm."),
    ("neck.decoder_", "decoder."),
)
INSIDE = (
    (".ln1.", ".norm1."),
    (".ln2.", ".norm2."),
    (".ffn.layers.0.0.", ".mlp.fc1."),
    (".ffn.layers.1.", ".mlp.fc2."),
)


def recognises(state: Mapping[str, Tensor]) -> bool:
    return any(name.startswith("backbone.") for name in state)


def encoder(state: Mapping[str, Tensor]) -> State:
    return below("student.", from_official(state).weights)


def from_official(state: Mapping[str, Tensor], levels: Levels | None = None) -> Mapped:
    left_out = {
        name
        for name, tensor in state.items()
        if name.startswith("target_generator.")  # the low-pass filter, which follows from its radius
        or (name == "backbone.proj_weights" and len(tensor) == 1)  # one level: frozen and without effect
    }
    weights = {renamed(name, PREFIXES, INSIDE): tensor for name, tensor in state.items() if name not in left_out}
    return Mapped(weights, tuple(f"left out: {name}, which is not trained" for name in sorted(left_out)))


def fits(weights: Mapping[str, Tensor]) -> bool:
    return parts_of(weights) - {"fusion"} == {"student", "decoder"} and "student.patch_embed.proj.weight" in weights


def to_official(weights: Mapping[str, Tensor], run: RunConfig | None = None) -> Mapped:
    """Our names -> official names, without what is not trained there (see `from_official`): load with strict=False."""
    prefixes, inside = ([(ours, theirs) for theirs, ours in pairs] for pairs in (PREFIXES, INSIDE))
    return Mapped({renamed(name, prefixes, inside): tensor for name, tensor in weights.items()})
