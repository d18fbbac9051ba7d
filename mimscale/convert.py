"""Checkpoints of the methods' official code <-> ours <-> timm, each with an equality check.

Names: "official" puts student and decoder side by side (`blocks.0...`, `decoder_blocks.0...`, `distill_heads.7...`), or
is OpenMMLab's for MFF and PixMIM (`backbone.layers.0...`, `neck.decoder_blocks.0...`); "ours" is the state dict of a
Method (`student.`, `decoder.`, `alignment.`, `fusion.`); "timm" is the student alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mimscale import config
from mimscale.config import STUDENT_SIZES, RunConfig, StudentConfig
from mimscale.contracts import TeacherInfo
from mimscale.errors import UserError
from mimscale.methods.base import Method
from mimscale.models import posembed
from mimscale.models.beit import LAYER_SCALE, Beit
from mimscale.models.convvit import ConvStages, ConvViT, stages_of
from mimscale.models.heads import initial_mixing
from mimscale.models.relpos import CLS_ROWS, relative_index
from mimscale.models.vit import LN_EPS, ViT
from mimscale.resilience import checkpoint

State = dict[str, Tensor]
Student = ViT | Beit | ConvViT
Pairs = Sequence[tuple[str, str]]
ENCODER = ("cls_token", "pos_embed", "rel_pos_bias.", "patch_embed", "blocks", "stage1_", "stage2_", "norm.")
REL_POS_TABLE = "rel_pos_bias.relative_position_bias_table"
REL_POS_INDEX = "rel_pos_bias.relative_position_index"
HEAD = ("fc_norm.", "head.")
TEACHERS = ("clip_model.", "dino_model.")
OPENMMLAB = ("mff", "pixmim")
OPENMMLAB_PREFIXES = (  # theirs, ours; the first that fits is replaced
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
OPENMMLAB_INSIDE = (
    (".ln1.", ".norm1."),
    (".ln2.", ".norm2."),
    (".ffn.layers.0.0.", ".mlp.fc1."),
    (".ffn.layers.1.", ".mlp.fc2."),
)
CONVMAE_BASE = (768, 11)  # width and depth of its attention stage
LIMIT = 1e-4  # of the largest output, fp32: the two programs sum in another order
METADATA = "mimscale"


# ------------------------------------------------------------------------------------------------ names, pure functions


@dataclass(frozen=True)
class Mapped:
    """Weights under their new names, and one line for each thing that was left out or filled in."""

    weights: State
    notes: tuple[str, ...] = ()


def encoder_of(state: Mapping[str, Tensor]) -> State:
    """The student's tensors under timm's names, out of official or our names."""
    if any(name.startswith("backbone.") for name in state):
        state = openmmlab_from_official(state).weights
    if any(name.startswith("encoder.") for name in state):
        state = simmim_from_official(state).weights
    if any(name.startswith("student.") for name in state):
        state = {name.removeprefix("student."): t for name, t in state.items() if name.startswith("student.")}
        return {name: tensor for name, tensor in state.items() if name != "mask_token"}
    encoder = {name: t for name, t in state.items() if name.startswith(ENCODER)}
    if any(name.startswith("distill_") for name in state):  # MaskAlign never trains its last norm
        encoder = {name: t for name, t in encoder.items() if not name.startswith("norm.")}
    return encoder


def mae_from_official(state: Mapping[str, Tensor]) -> Mapped:
    """ConvMAE's names too: all but the decoder is the encoder."""

    def ours(name: str) -> str:
        if name == "mask_token":
            return "decoder.mask_token"
        return f"decoder.{name.removeprefix('decoder_')}" if name.startswith("decoder_") else f"student.{name}"

    return Mapped({ours(name): tensor for name, tensor in state.items()})


def mae_to_official(weights: Mapping[str, Tensor]) -> Mapped:
    def official(name: str) -> str:
        part, _, rest = name.partition(".")
        return rest if part == "student" or rest == "mask_token" else f"decoder_{rest}"

    return Mapped({official(name): tensor for name, tensor in weights.items()})


def maskalign_from_official(state: Mapping[str, Tensor], supervised: Sequence[int]) -> Mapped:
    """supervised: teacher levels with a weight in the loss; adaptors and mixing rows of others were never trained."""
    weights = {f"student.{name}": tensor for name, tensor in encoder_of(state).items()}
    for name, tensor in state.items():
        if name == "distill_weights":
            weights["alignment.mixing"] = tensor[list(supervised)]
        elif name.startswith("distill_heads."):
            level, rest = name.removeprefix("distill_heads.").split(".", 1)
            if int(level) in supervised:
                weights[f"alignment.adaptors.{level}.{rest}"] = tensor
    notes = ["left out: the student's last norm and all heads of unsupervised levels, which are never trained"]
    teacher = sum(tensor.numel() for name, tensor in state.items() if name.startswith(TEACHERS))
    if teacher:
        notes.append(f"left out: the teacher inside the checkpoint ({teacher / 1e6:.1f} M numbers)")
    return Mapped(weights, tuple(notes))


def maskalign_to_official(weights: Mapping[str, Tensor], *, fusion: str, teacher_depth: int) -> Mapped:
    """Rows of the mixing matrix and the last norm that we do not build get the initial values that they keep there."""
    state = encoder_of(weights)
    width = state["cls_token"].shape[-1]
    state |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    levels = sorted({int(name.split(".")[2]) for name in weights if name.startswith("alignment.adaptors.")})
    for name, tensor in weights.items():
        if name == "alignment.mixing":
            full = initial_mixing("sum" if fusion == "sum" else "linear", tensor.shape[1], range(teacher_depth))
            full[levels] = tensor
            state["distill_weights"] = full
        elif name.startswith("alignment.adaptors."):
            state[name.replace("alignment.adaptors.", "distill_heads.")] = tensor
    return Mapped(
        state,
        (
            "filled in: the student's last norm and unsupervised mixing rows, with the initial values that they keep",
            f"left out: the teacher, and the heads of levels other than {levels}; load with strict=False",
        ),
    )


def finetune_from_official(state: Mapping[str, Tensor]) -> Mapped:
    return Mapped({n if n.startswith(HEAD) else f"student.{n}": tensor for n, tensor in state.items()})


def finetune_to_official(weights: Mapping[str, Tensor]) -> Mapped:
    return Mapped({name.removeprefix("student."): tensor for name, tensor in weights.items()})


def openmmlab_from_official(state: Mapping[str, Tensor]) -> Mapped:
    """MFF's and PixMIM's names. The position tables come along: OpenMMLab's have MAE's two halves swapped."""
    left_out = {
        name
        for name, tensor in state.items()
        if name.startswith("target_generator.")  # the low-pass filter, which follows from its radius
        or (name == "backbone.proj_weights" and len(tensor) == 1)  # one level: frozen and without effect
    }
    weights = {
        _renamed(name, OPENMMLAB_PREFIXES, OPENMMLAB_INSIDE): tensor
        for name, tensor in state.items()
        if name not in left_out
    }
    return Mapped(weights, tuple(f"left out: {name}, which is not trained" for name in sorted(left_out)))


def openmmlab_to_official(weights: Mapping[str, Tensor]) -> Mapped:
    """What is not trained there (see `openmmlab_from_official`) is not filled in: load with strict=False."""
    prefixes, inside = ([(ours, theirs) for theirs, ours in pairs] for pairs in (OPENMMLAB_PREFIXES, OPENMMLAB_INSIDE))
    return Mapped({_renamed(name, prefixes, inside): tensor for name, tensor in weights.items()})


def _renamed(name: str, prefixes: Pairs, inside: Pairs) -> str:
    old, new = next((pair for pair in prefixes if name.startswith(pair[0])), ("", ""))
    name = new + name.removeprefix(old)
    for old, new in inside:
        name = name.replace(old, new)
    return name


def simmim_from_official(state: Mapping[str, Tensor]) -> Mapped:
    """The index into the bias table is left out: it follows from the grid."""
    weights = {}
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        if part == "encoder" and rest != REL_POS_INDEX:
            weights[f"student.{rest}"] = tensor
        elif part == "decoder":  # decoder.0: a 1 x 1 convolution
            weights[f"head.{rest.removeprefix('0.')}"] = tensor.flatten(1) if tensor.dim() > 1 else tensor
    return Mapped(weights)


def simmim_to_official(weights: Mapping[str, Tensor]) -> Mapped:
    state = {name.replace("student.", "encoder.", 1): t for name, t in weights.items() if name.startswith("student.")}
    if f"encoder.{REL_POS_TABLE}" in state:
        side = _side({REL_POS_TABLE: state[f"encoder.{REL_POS_TABLE}"]})
        state[f"encoder.{REL_POS_INDEX}"] = relative_index((side, side), torch.device("cpu"))
    state["decoder.0.weight"] = weights["head.weight"][:, :, None, None]
    return Mapped({**state, "decoder.0.bias": weights["head.bias"]})


def to_timm(encoder: Mapping[str, Tensor]) -> State:
    """The student under timm's names, with a last norm of weight 1 and bias 0 where the method has none."""
    width = encoder["cls_token"].shape[-1]
    return {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width), **encoder}


def to_official(weights: Mapping[str, Tensor], run: RunConfig) -> Mapped:
    """Our state dict of a run -> the names of the method's official code. Raises UserError for a method without one."""
    method: Any = run.method
    if method.name not in OPENMMLAB and any(name.startswith("fusion.") for name in weights):
        raise UserError(f"method.fusion has no official names in {method.name}; choose --to timm")
    if getattr(method, "adaptor_position", "after") == "before":
        raise UserError("method.adaptor_position = before has no official names; choose --to timm")
    if method.name in ("mae", "convmae"):
        return mae_to_official(weights)
    if method.name == "finetune":
        return finetune_to_official(weights)
    if method.name == "simmim":
        return simmim_to_official(weights)
    if method.name in OPENMMLAB:
        return openmmlab_to_official(weights)
    if method.name == "maskalign":
        depth = run.student.depth
        if method.fusion == "sum":
            depth = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("alignment.adaptors."))
        return maskalign_to_official(weights, fusion=method.fusion, teacher_depth=depth)
    raise UserError(f"method.name = {method.name} has no official names; choose --to timm")


def from_official(state: Mapping[str, Tensor], run: RunConfig, path: Path) -> tuple[Method, tuple[str, ...]]:
    """The method of a recipe with the weights of an official pre-training file, and notes of what was left out."""
    name = run.method.name
    needed = {"mae": "mask_token", "maskalign": "distill_heads.", "finetune": "head.weight"}
    needed |= {
        "convmae": "stage1_output_decode.",
        "simmim": "encoder.mask_token",
        **dict.fromkeys(OPENMMLAB, "neck.mask_token"),
    }
    if name not in needed:
        raise UserError(f"method.name = {name} has no official names; choose a recipe of {', '.join(needed)}")
    if not any(key.startswith(needed[name]) for key in state):
        raise UserError(
            f"{path} holds no {needed[name]}: it is not a whole {name} model; use --to timm for its encoder"
        )
    method: Method = config.method_class(name)(run, _teachers_in(state, run))
    if name == "maskalign":
        (needs,) = method.needs.teachers.values()
        mapped = maskalign_from_official(state, needs.levels)
    elif name in OPENMMLAB:
        mapped = openmmlab_from_official(state)
    elif name == "simmim":
        mapped = simmim_from_official(state)
    else:
        mapped = finetune_from_official(state) if name == "finetune" else mae_from_official(state)
    _load(method, mapped.weights, path)
    return method, mapped.notes


def _teachers_in(state: Mapping[str, Tensor], run: RunConfig) -> dict[str, TeacherInfo]:
    """The teacher of a MaskAlign file, as far as its heads and the recipe tell."""
    heads = [key for key in state if key.startswith("distill_heads.")]
    if not heads:
        return {}
    name = getattr(run.method, "teacher", None) or next(iter(run.teachers), "teacher")
    last = max(int(key.split(".")[1]) for key in heads)
    depth = state["distill_weights"].shape[0] if "distill_weights" in state else last + 1
    output = max(key for key in heads if key.startswith(f"distill_heads.{last}.") and key.endswith(".weight"))
    return {name: TeacherInfo(name, state[output].shape[0], depth, run.grid, run.data.image_size, has_cls=True)}


# ------------------------------------------------------------------------------------------------------------ reading


@dataclass(frozen=True)
class Loaded:
    """A checkpoint of any kind. run: its resolved recipe, None for a file that does not carry one."""

    weights: State
    run: RunConfig | None
    student: StudentConfig | None = None
    image_size: int | None = None


def read(path: Path) -> Loaded:
    """A run folder (its newest checkpoint), a checkpoint folder, a file that `convert` wrote, or an official file."""
    if (path / "manifest.json").is_file():
        return _read_own(path, path.parent.parent)
    if (path / "config.yaml").is_file():
        newest = checkpoint.newest(path)
        if newest is None:
            raise UserError(f"{path} has no complete checkpoint yet; wait for the first save")
        return _read_own(newest, path)
    if not path.is_file():
        raise UserError(f"{path} is neither a run folder, nor a checkpoint folder, nor a file")
    return _read_safetensors(path) if path.suffix == ".safetensors" else Loaded(_read_pickle(path), None)


def _read_own(folder: Path, run_dir: Path) -> Loaded:
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run_dir}/config.yaml is missing; a checkpoint is read inside its run folder")
    try:
        return Loaded(checkpoint.load_weights(folder), config.load(str(run_dir / "config.yaml")))
    except checkpoint.CheckpointError as error:
        raise UserError(f"{error}; take an older checkpoint of the run") from None


def _read_safetensors(path: Path) -> Loaded:
    try:
        with safe_open(path, framework="pt") as file:
            carried = json.loads((file.metadata() or {}).get(METADATA, "{}"))
            weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is not a safetensors file: {error}") from None
    if "run" in carried:
        return Loaded(weights, config.validate(carried["run"], source=str(path)))
    if "student" in carried:
        student = StudentConfig.model_validate(carried["student"])
        return Loaded(weights, None, student, carried["image_size"])
    return Loaded(weights, None)


def _read_pickle(path: Path) -> State:
    """A torch file, without running code that may be in it; training files also hold their command line or config."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(f"{path} cannot be read as a torch checkpoint: {str(error).splitlines()[0]}") from None
    for wrapper in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    tensors = {n: t for n, t in content.items() if isinstance(t, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise UserError(f"{path} holds no tensors under names; a state dict is expected, bare or under 'model'")
    return {name: tensor.float() for name, tensor in tensors.items()}


@dataclass(frozen=True)
class StudentInfo:
    """What is known of a loaded student. method: None for a file that does not say; final_norm: whether it has one."""

    config: StudentConfig
    image_size: int
    method: str | None
    final_norm: bool
    stages: ConvStages | None = None


def student_from(path: Path, *, image_size: int | None = None, heads: int | None = None) -> tuple[Student, StudentInfo]:
    """The student of any checkpoint that `read` understands, on the CPU in fp32, and what is known of it.

    image_size: resize the positions to another input. heads: needed for an official file of an unusual size, because
    weights do not tell. Raises UserError.
    """
    return _student(read(path), path, image_size, heads)


def _student(loaded: Loaded, path: Path, image_size: int | None, heads: int | None) -> tuple[Student, StudentInfo]:
    encoder = encoder_of(loaded.weights)
    relative = REL_POS_TABLE in encoder
    positions = REL_POS_TABLE if relative else "pos_embed"
    convolutional = "patch_embed1.proj.weight" in encoder
    needed: tuple[str, ...] = ("cls_token", positions, "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")
    if convolutional:
        needed = (positions, "patch_embed2.proj.weight", "patch_embed3.proj.weight")
        needed = (*needed, *(f"blocks{stage}.0.mlp.fc1.weight" for stage in (1, 2, 3)))
    missing = [name for name in needed if name not in encoder]
    if missing:
        kind = "ConvMAE encoder" if convolutional else "ViT with a class token"
        raise UserError(f"{path} holds no {kind}: {missing[0]} is missing")
    stages = stages_of(encoder) if convolutional else None
    run = loaded.run
    student = run.student if run else loaded.student or _config_from(encoder, path, heads, stages)
    side = _side(encoder)
    size = image_size or side * student.patch
    if size % student.patch:
        raise UserError(f"image size {size} is not a multiple of the student's patch = {student.patch}")
    new = size // student.patch
    if relative and new != side:
        raise UserError(f"{path} has relative positions, which are not resized; take image size {side * student.patch}")
    if not relative:
        table = posembed.resize(encoder["pos_embed"], (side, side), (new, new), int("cls_token" in encoder))
        encoder = {**encoder, "pos_embed": table}
    final_norm = "norm.weight" in encoder
    vit: Student
    if "blocks.0.attn.q_bias" in encoder:
        vit = Beit(
            student,
            size,
            positions="relative" if relative else "absolute",
            layer_scale=LAYER_SCALE if "blocks.0.gamma_1" in encoder else None,
        )
    elif stages is not None:
        vit = ConvViT(student, stages, size, fusion="stage1_output_decode.weight" in encoder, final_norm=final_norm)
    else:
        vit = ViT(student, size, final_norm=final_norm)
    _load(vit, encoder, path)
    return vit, StudentInfo(student, size, run.method.name if run else None, final_norm, stages)


def _side(encoder: Mapping[str, Tensor]) -> int:
    """Rows of the square grid that the positions are for."""
    if REL_POS_TABLE in encoder:
        return (math.isqrt(len(encoder[REL_POS_TABLE]) - CLS_ROWS) + 1) // 2
    return math.isqrt(encoder["pos_embed"].shape[1] - int("cls_token" in encoder))


def _config_from(
    encoder: Mapping[str, Tensor], path: Path, heads: int | None, stages: ConvStages | None
) -> StudentConfig:
    blocks = "blocks." if stages is None else "blocks3."
    hidden, width = encoder[f"{blocks}0.mlp.fc1.weight"].shape
    patch = encoder["patch_embed.proj.weight"].shape[2] if stages is None else stages.patch
    depth = len({name.split(".")[1] for name in encoder if name.startswith(blocks)})
    usual = {(w, d): h for w, d, h in STUDENT_SIZES.values()} | {CONVMAE_BASE: 12}
    if REL_POS_TABLE in encoder:
        heads = encoder[REL_POS_TABLE].shape[1]
    if heads is None and (width, depth) not in usual:
        raise UserError(
            f"{path}: width {width}, depth {depth} is no usual size and weights do not tell; give the heads"
        )
    return StudentConfig(
        width=width,
        depth=depth,
        heads=heads or usual[width, depth],
        patch=patch,
        mlp_ratio=hidden / width,
    )


def _load(module: torch.nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit: {' '.join(str(error).split())[:300]}") from None


# ------------------------------------------------------------------------------------------------------------ checking


def timm_reference(vit: Student) -> Any:
    """timm's VisionTransformer, or Beit, of the same shape."""
    from timm.models.beit import Beit as TimmBeit
    from timm.models.vision_transformer import VisionTransformer

    student = vit.config
    shape: dict[str, Any] = {
        "img_size": vit.grid[0] * student.patch,
        "patch_size": student.patch,
        "embed_dim": student.width,
        "depth": student.depth,
        "num_heads": student.heads,
        "mlp_ratio": student.mlp_ratio,
        "num_classes": 0,
    }
    return TimmBeit(**shape, **timm_beit_options(vit)) if isinstance(vit, Beit) else VisionTransformer(**shape)


def timm_beit_options(vit: Beit) -> dict[str, Any]:
    """What timm's Beit has to be told besides its sizes; without global_pool it has no last norm of this name."""
    absolute = vit.positions == "absolute"
    return {
        "use_abs_pos_emb": absolute,
        "use_shared_rel_pos_bias": not absolute,
        "init_values": vit.layer_scale,
        "global_pool": "token",
    }


def difference_to_timm(vit: Student, timm_state: Mapping[str, Tensor]) -> float:
    """Largest difference of all tokens to timm's network with `timm_state`, over the largest value.

    A fixed picture in fp32; where the student has no last norm, an untrained one is applied, as timm will.
    """
    size, reference = vit.grid[0] * vit.config.patch, timm_reference(vit).eval()
    index = {name: t for name, t in reference.state_dict().items() if name == REL_POS_INDEX}  # there in older timm
    reference.load_state_dict({**index, **timm_state})
    image = torch.sin(torch.arange(3 * size * size) * 0.37).view(1, 3, size, size) * 2
    with torch.no_grad():
        ours = vit(image).tokens
        if not isinstance(vit.norm, torch.nn.LayerNorm):
            ours = F.layer_norm(ours, ours.shape[-1:], eps=LN_EPS)
        theirs = reference.forward_features(image)
    return float((ours - theirs).abs().max() / theirs.abs().max())


def _checked(vit: Student, encoder: Mapping[str, Tensor]) -> str:
    if isinstance(vit, ConvViT):
        return "not compared with timm, which does not have ConvMAE's encoder"
    difference = difference_to_timm(vit, to_timm(encoder))
    if not difference < LIMIT:
        raise RuntimeError(f"the converted student differs from timm's by {difference:.1e} of the largest output")
    tokens = vit.patches + 1
    return f"checked: {tokens} tokens of a fixed picture equal timm's within {difference:.1e} (limit {LIMIT:.0e})"


# --------------------------------------------------------------------------------------------------------- command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="run folder, checkpoint folder, or a file (.pth, .safetensors)")
    parser.add_argument("out", type=Path, help="file to write; it must not exist")
    parser.add_argument(
        "--to",
        required=True,
        choices=("timm", "official", "mimscale"),
        help="timm: the student alone. official: the names of the method's own code. mimscale: official -> ours",
    )
    parser.add_argument("--recipe", help="with --to mimscale: the recipe that the official file belongs to")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a value of --recipe")
    parser.add_argument("--heads", type=int, help="attention heads of an official file of an unusual size")


def run(args: argparse.Namespace) -> int:
    if args.out.exists():
        raise UserError(f"{args.out} exists; choose another name")
    loaded = read(args.source)
    lines = {"timm": _to_timm, "official": _to_official, "mimscale": _to_ours}[args.to](args, loaded)
    print(*lines, f"wrote {args.out}", sep="\n")
    return 0


def _to_timm(args: argparse.Namespace, loaded: Loaded) -> list[str]:
    vit, info = _student(loaded, args.source, None, args.heads)
    if isinstance(vit, ConvViT):
        raise UserError(f"{args.source} holds ConvMAE's encoder, which timm does not have; convmae goes --to official")
    state = to_timm(vit.state_dict())
    line = _checked(vit, state)
    _write(args.out, state, {"student": info.config.model_dump(mode="json"), "image_size": info.image_size})
    notes = [] if info.final_norm else ["filled in: a last norm of weight 1 and bias 0; the method trains none"]
    if isinstance(vit, Beit):
        options = ", ".join(f"{name}={value!r}" for name, value in timm_beit_options(vit).items())
        notes.append(f"timm: timm.models.beit.Beit with {options}")
    return [*notes, line]


def _to_official(args: argparse.Namespace, loaded: Loaded) -> list[str]:
    if loaded.run is None:
        raise UserError(f"{args.source} is not a checkpoint of ours; --to official reads run folders and our files")
    mapped = to_official(loaded.weights, loaded.run)
    vit, _ = _student(loaded, args.source, None, None)
    line = _checked(vit, encoder_of(mapped.weights))
    back = from_official(mapped.weights, loaded.run, args.source)[0].state_dict()
    if back.keys() != loaded.weights.keys() or not all(torch.equal(back[n], t) for n, t in loaded.weights.items()):
        raise RuntimeError("the official names do not map back to the same weights")
    _write(args.out, mapped.weights, {})
    return [*mapped.notes, line, "checked: mapped back, every tensor is the same"]


def _to_ours(args: argparse.Namespace, loaded: Loaded) -> list[str]:
    if loaded.run is not None:
        raise UserError(f"{args.source} is a checkpoint of ours already; choose --to timm or --to official")
    if not args.recipe:
        raise UserError("--recipe is missing: --to mimscale has to know the method and its sizes, e.g. mae_vit_l16")
    run_config = config.load(args.recipe, args.set)
    method, notes = from_official(loaded.weights, run_config, args.source)
    assert isinstance(method.student, ViT | Beit | ConvViT)
    line = _checked(method.student, encoder_of(loaded.weights))
    _write(args.out, method.state_dict(), {"run": run_config.dump()})
    return [*notes, line]


def _write(path: Path, weights: Mapping[str, Tensor], carried: Mapping[str, Any]) -> None:
    """Whole or not at all. A .pth file gets MAE's wrapper key `model`; anything else is safetensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    if path.suffix == ".pth":
        torch.save({"model": dict(weights)}, part)
    else:
        tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
        save_file(tensors, part, metadata={METADATA: json.dumps(carried), "format": "pt"})
    os.replace(part, path)
