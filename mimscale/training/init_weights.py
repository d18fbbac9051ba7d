"""`init.weights`: start a run from weights instead of a random initialisation, for fine-tuning or further pre-training.

The file's sha256 is stored in the run's configuration, and so in each checkpoint. The file is read at the first start
only; a resume does not need it.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mimscale.checkpoint import format as checkpoint
from mimscale.config.run import RunConfig
from mimscale.convert.formats.base import encoder_of, format_of, formats
from mimscale.convert.formats.timm import SHARED_TABLE, TABLE
from mimscale.convert.names import State
from mimscale.convert.networks import levels_of, parts_that_no_student_has
from mimscale.convert.positions import with_positions_of
from mimscale.convert.read import Loaded, identity_file, read, resolve
from mimscale.errors import UserError
from mimscale.methods.base import Method

OPTIONAL = ("norm.", "mask_token", "stage1_output_decode.", "stage2_output_decode.")
"""Tensors that the student of one method has and that of another lacks: last norm, SimMIM's token, ConvMAE's fusion."""


def with_sha256(run: RunConfig, stored: RunConfig | None, *, resumes: bool) -> RunConfig:
    """The run's configuration with the sha256 of its starting weights.

    stored: the configuration in the run folder. resumes: there is a checkpoint to continue from, so the file is not
    read. A checkpoint folder has the sha256 of its manifest, which holds those of its shards. Raises UserError where
    the file is missing or is not the one whose hash is known.
    """
    if run.init is None:
        return run
    known = run.init.sha256 or (stored.init.sha256 if stored is not None and stored.init is not None else None)
    if not resumes:
        path = resolve(run.init.weights)
        found = checkpoint.sha256(identity_file(path))
        if known not in (None, found):
            raise UserError(f"init.sha256 = {known}, but {path} has {found}; get the right file or correct the hash")
        known = found
    return run.model_copy(update={"init": run.init.model_copy(update={"sha256": known})})


def load_into(method: Method, run: RunConfig) -> tuple[str, ...]:
    """Load `init.weights` into a new method. Returns a line for each thing that was resized, is missing or is unused.

    Position tables are resized bicubically where the grids differ (He et al. 2022, fine-tuning). Raises UserError with
    one line where the weights are of another shape or kind.
    """
    assert run.init is not None
    loaded = read(run.init.weights)
    whole = run.init.part == "method"
    spoilt = sorted(name for name, tensor in loaded.weights.items() if not tensor.isfinite().all())
    if spoilt:
        raise UserError(
            f"init.weights = {loaded.path} holds inf or NaN in {len(spoilt)} tensors, first {spoilt[0]}; "
            f"take an older checkpoint or get the file again"
        )
    strangers = parts_that_no_student_has(loaded)
    if strangers:
        raise UserError(
            f"init.weights = {loaded.path} holds a ViT with {' and '.join(strangers)}, which students do not have; "
            f"take other weights"
        )
    weights, target = (_all_of(loaded, method), method) if whole else (encoder_of(loaded.weights), method.student)
    own: State = target.state_dict()
    if whole and loaded.run is not None and loaded.run.method.name != run.method.name:
        raise UserError(
            f"init.weights = {loaded.path} holds the method {loaded.run.method.name}, this run's is {run.method.name}; "
            "set init.part = student, or take other weights"
        )
    _same_shape(loaded, run, weights, own, "" if not whole else "student.")
    weights, copied = _one_table_per_block(weights, own)
    weights, resized = with_positions_of(weights, own)
    notes = (*copied, *resized)

    missing, unused = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    optional = () if whole else OPTIONAL
    wrong = [f"{name} is missing in it" for name in missing if not name.startswith(optional)]
    wrong += [f"it also holds {name}" for name in unused if not name.startswith(optional)]
    wrong += [
        f"{name} has shape {list(weights[name].shape)}, not {list(own[name].shape)}"
        for name in sorted(own.keys() & weights.keys())
        if weights[name].shape != own[name].shape
    ]
    if wrong:
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise UserError(f"init.weights = {loaded.path} does not fit this run's {run.init.part}: {wrong[0]}{more}")
    target.load_state_dict({name: weights.get(name, tensor) for name, tensor in own.items()})

    others = 0 if whole else _outside_of_student(loaded)
    return (
        f"started from {loaded.path}: {len(own) - len(missing)} tensors of the {run.init.part}, sha256 "
        f"{run.init.sha256 or 'not computed'}",
        *loaded.notes,
        *notes,
        *([f"not in it, so at their initial values: {', '.join(missing)}"] if missing else []),
        *([f"in it and not used: {', '.join(unused)}"] if unused else []),
        *([f"in it and not used: {others} tensors outside of the student"] if others else []),
    )


def _outside_of_student(loaded: Loaded) -> int:
    """How many tensors of a file belong to a decoder, heads or a teacher."""
    name = format_of(loaded.weights)
    state = loaded.weights
    if name == "transformers":  # its queries, keys and values are three tensors of one of ours
        state = formats()[name].from_official(state).weights
    return len(state) - len(encoder_of(state))


def _all_of(loaded: Loaded, method: Method) -> State:
    """All tensors of a checkpoint, under our names."""
    if loaded.run is not None:
        return loaded.weights
    name = format_of(loaded.weights)
    if name is None:
        raise UserError(f"init.weights = {loaded.path} has none of the known name formats ({', '.join(formats())})")
    return formats()[name].from_official(loaded.weights, levels_of(method)).weights


def _same_shape(loaded: Loaded, run: RunConfig, weights: State, own: State, prefix: str) -> None:
    """Raises UserError for another kind or size of student, in the terms of the recipe."""
    theirs, ours = (_describe(state, prefix) for state in (weights, own))
    known = loaded.run.student if loaded.run is not None else loaded.student
    if known is not None and theirs == ours and known.heads != run.student.heads:
        theirs, ours = f"{theirs} and {known.heads} heads", f"{ours} and {run.student.heads} heads"
    if theirs != ours:
        raise UserError(
            f"init.weights = {loaded.path} holds {theirs}, this run's student is {ours}; "
            "change the section student (and method), or take other weights"
        )


def _describe(state: Mapping[str, Tensor], prefix: str) -> str:
    """Kind and sizes of a student, as far as its tensors show."""
    convolutional = f"{prefix}patch_embed1.proj.weight" in state
    blocks = f"{prefix}blocks3." if convolutional else f"{prefix}blocks."
    if f"{blocks}0.mlp.fc1.weight" not in state:
        return "no student"
    hidden, width = state[f"{blocks}0.mlp.fc1.weight"].shape
    depth = len({name.removeprefix(blocks).partition(".")[0] for name in state if name.startswith(blocks)})
    kind, patch = "a ViT", ""
    if convolutional:
        kind = "ConvMAE's encoder"
    else:
        kind = "a BEiT-style ViT (SimMIM's)" if f"{blocks}0.attn.q_bias" in state else kind
        patch = f", patch {state[f'{prefix}patch_embed.proj.weight'].shape[-1]}"
    return f"{kind} of width {width}, depth {depth}, MLP ratio {hidden / width:g}{patch}"


def _one_table_per_block(weights: State, own: State) -> tuple[State, tuple[str, ...]]:
    """Copy SimMIM's shared table of relative positions into each block's own, as the official fine-tuning does."""
    shared = next((name for name in weights if name.endswith(SHARED_TABLE) and name not in own), None)
    tables = [name for name in own if name.endswith(f"attn.{TABLE}") and name not in weights]
    if shared is None or not tables:
        return weights, ()
    rest = {name: tensor for name, tensor in weights.items() if name != shared}
    note = f"{shared} copied into each of the {len(tables)} blocks"
    return rest | dict.fromkeys(tables, weights[shared]), (note,)
