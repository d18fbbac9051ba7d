"""Named tensors out of a file of weights that any program wrote: the one reader, of students and of teachers.

No code from a file is run: pickles are read with `weights_only` and a list of harmless types.
"""

from __future__ import annotations

import argparse
import datetime
import decimal
import pathlib
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mimscale.errors import UserError
from mimscale.files import torchvision_names
from mimscale.files.regular import read_head

KEYS = (
    *("model", "state_dict", "model_state_dict", "module", "teacher", "target_encoder", "student", "encoder"),
    *("backbone", "net", "network", "params", "weights", "checkpoint", "model_ema", "state_dict_ema", "ema"),
    *("model_ema_state_dict", "ema_state_dict", "params_ema"),
)
"""Under which training programs keep their weights; the first that is there is taken. `module`: DeepSpeed; `teacher`,
`target_encoder`: DINO, DINOv2 and I-JEPA, who evaluate the average; `model_ema`, `state_dict_ema`: timm's averages."""

COUNTERS = ("n_averaged", "initted", "step")
"""What torch's AveragedModel and others keep among the weights; one number each."""

WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What torch.compile, FSDP and activation checkpointing put in front of the module they wrap, at any depth."""

PREFIXES = ("module.", "model.", "net.", "network.")
"""What DistributedDataParallel and Lightning put in front of every name."""

TOWERS = (
    *("teacher.backbone.", "backbone.", "teacher.", "base_encoder.", "encoder_q.", "ema_model.", "visual.trunk."),
    *("image_encoder.", *PREFIXES),
)
"""In front of the network among the heads of self-distillation, MoCo, averages, Lightning modules (where a loss has
parameters too) and text towers; the first that fits is taken."""

QUANTISED = (torch.int8, torch.uint8, torch.bool, torch.qint8, torch.quint8, torch.float8_e4m3fn, torch.float8_e5m2)
"""Types that no weight is trained in. int64 is left: it is the index of relative positions, or a counter."""

_TOWER_ANCHORS = (
    *("patch_embed.proj.weight", "embeddings.cls_token", "embeddings.class_embedding", torchvision_names.ANCHOR),
)
_CHUNKED = re.compile(r"^blocks\.\d+\.(\d+)\.")  # DINOv2's chunks of blocks; the second number counts through


@dataclass(frozen=True)
class WeightsFile:
    """weights: as stored. unwrapped: a phrase for each wrapper that was taken off. metadata: of a safetensors file."""

    weights: dict[str, Tensor]
    unwrapped: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)


def read_weights(path: Path) -> WeightsFile:
    """The tensors of a .safetensors file, or of a torch file, without what programs wrap them in. Raises UserError."""
    if path.suffix == ".safetensors":
        weights, metadata = _safetensors(path)
        notes: list[str] = []
    else:
        weights, notes = _mapping_of_tensors(path, _unpickled(path))
        metadata = {}
    if counters := [name for name in COUNTERS if name in weights and weights[name].numel() == 1 < len(weights)]:
        weights = {name: tensor for name, tensor in weights.items() if name not in counters}
        notes.append(f"without {' and '.join(counters)}")
    absent = sorted(name for name, tensor in weights.items() if tensor.is_meta or tensor.layout != torch.strided)
    if absent:
        kind = "without its numbers (meta)" if weights[absent[0]].is_meta else "as a sparse tensor"
        raise UserError(f"{path} holds {absent[0]} {kind} ({len(absent)} such tensors); save dense tensors")
    cut = sorted(name for name, tensor in weights.items() if tensor.dtype in QUANTISED)
    if cut:
        raise UserError(
            f"{path} holds {cut[0]} in {str(weights[cut[0]].dtype).removeprefix('torch.')} ({len(cut)} such tensors): "
            f"it is quantised, and its numbers mean nothing without their scales; take the file in fp32, bf16 or fp16"
        )
    unreal = sorted(name for name, tensor in weights.items() if tensor.is_complex())
    if unreal:
        raise UserError(f"{path} holds {unreal[0]} in complex numbers ({len(unreal)} such tensors), as no ViT has")
    weights, more = unwrapped(weights)
    return WeightsFile(weights, (*notes, *more), metadata)


def unwrapped(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """A state dict without prefixes of wrappers, and a phrase for each kind of prefix that was there."""
    notes: list[str] = []
    found = {WRAPPERS.sub("", name): tensor for name, tensor in weights.items()}
    if found.keys() != weights.keys():
        seen = {match for name in weights for match in WRAPPERS.findall(name)}
        notes.append(f"names without {' and '.join(sorted(seen))}")
    while (prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in found)), None)) and found:
        found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
        notes.append(f"names without {prefix}")
    for tower in TOWERS:
        if any(f"{tower}{anchor}" in found for anchor in _TOWER_ANCHORS):
            kept = {name.removeprefix(tower): tensor for name, tensor in found.items() if name.startswith(tower)}
            others = len(found) - len(kept)
            notes.append(f"what is below {tower}" + (f", {others} other tensors left out" if others else ""))
            found = kept
            break
    if _TOWER_ANCHORS[0] in found and any(_CHUNKED.match(name) for name in found):  # EfficientNet's are not chunks
        found = {_CHUNKED.sub(r"blocks.\1.", name): tensor for name, tensor in found.items()}
        notes.append("blocks out of their chunks")
    if torchvision_names.ANCHOR in found:
        found = torchvision_names.to_timm(found)
        notes.append("torchvision's names as timm's")
    return found, tuple(notes)


def _safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError, AttributeError, KeyError, TypeError) as error:
        if what := _other_kind(path):
            raise UserError(f"{path} is not a whole safetensors file: it is {what}") from None
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is not a whole safetensors file ({reason[:200]}); get it again") from None


OTHERS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself; fetch it with `git lfs pull`"),
    (b"<!doctype", "a web page, which a server sent in place of the file; get it again"),
    (b"<html", "a web page, which a server sent in place of the file; get it again"),
    (b"\x1f\x8b", "packed with gzip; unpack it"),
    (b"\x89hdf", "an HDF5 file, as Keras writes it; save its weights with torch or safetensors"),
    (b"\x93numpy", "a numpy array; save named tensors with torch or safetensors"),
)
"""First bytes, in lower case, of files that people take for weights, and what they are."""

LEGACY = "in torch's legacy .tar format; load it with torch, and save its tensors anew"


def _other_kind(path: Path) -> str:
    """What a file is that is no file of weights at all, and what to do; "" where that cannot be told."""
    try:
        head = read_head(path, 4096)
    except OSError:
        return ""
    if not head:
        return "empty; get it again"
    if head.startswith(b"PK") and b".npy" in head:
        return "an archive of numpy arrays; save named tensors with torch or safetensors"
    what = next((what for start, what in OTHERS if head.lstrip().lower().startswith(start)), "")
    if not what and len(head) < 4096 and head.isascii() and b"\0" not in head:
        return "a text file; get the file of weights"
    return what


def _unpickled(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_harmless()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong is said in one line
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that is no pickle fails in as many ways as there are bytes
        text = str(error)
        if what := LEGACY if "legacy .tar format" in text else _other_kind(path):
            raise UserError(f"{path} cannot be read as a torch checkpoint: it is {what}") from None
        if "TorchScript" in text:
            raise UserError(f"{path} is a TorchScript archive, which holds code; save its state_dict() alone") from None
        refused = re.search(r"GLOBAL ([\w.]+)", text) or re.search(r"but got <class '([\w.]+)'>", text)
        refused = refused or re.search(r"(?:Unsupported (?:global|class)|type)[: ]+([\w.]+\.[\w.]+)", text)
        if isinstance(error, pickle.UnpicklingError) and refused:
            raise UserError(
                f"{path} cannot be read as a torch checkpoint (it holds a {refused[1]}, which could run code); "
                f"save its tensors alone, or as .safetensors"
            ) from None
        reason = next(iter(text.splitlines()), type(error).__name__)
        if isinstance(error, pickle.UnpicklingError):  # torch's text asks to trust the file
            reason = "it is cut short, or no pickle of tensors"
        raise UserError(f"{path} cannot be read as a torch checkpoint ({reason}); get it again") from None


NUMPY_TYPES = (  # all that hold no objects
    *("?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"),
    *("f2", "f4", "f8", "c8", "c16", "S1", "U1", "M8[s]", "m8[s]"),
)


def _harmless() -> list[Any]:
    """Types that training programs store beside their weights, and that do nothing when they are made."""
    numbers = [np.dtype, np.ndarray, *{type(np.dtype(name)) for name in NUMPY_TYPES}]
    scalar, array = np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]
    makers = [
        (function, f"numpy.{package}.multiarray.{name}")  # numpy 1 and 2 keep them in packages of other names
        for package in ("core", "_core")
        for name, function in (("scalar", scalar), ("_reconstruct", array))
    ]
    paths = [
        (pathlib.PurePosixPath if "Posix" in name else pathlib.PureWindowsPath, f"{module}.{name}")
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    ]
    plain = [argparse.Namespace, SimpleNamespace, OrderedDict, set, frozenset, dict, list, slice, complex, range]
    plain += [datetime.datetime, datetime.date, datetime.timedelta, datetime.timezone, decimal.Decimal]
    dicts = [(OrderedDict, "yacs.config.CfgNode"), (_plain_dict, "collections.defaultdict")]
    return [*plain, *dicts, *numbers, *makers, *paths]


def _plain_dict(*factory: Any) -> dict[Any, Any]:
    """In place of a defaultdict, which torch's reader admits no items into."""
    return {}


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(n, str) and isinstance(t, Tensor) for n, t in value.items())


def _mapping_of_tensors(path: Path, content: Any) -> tuple[dict[str, Tensor], list[str]]:
    notes: list[str] = []
    while isinstance(content, Mapping):
        key = next((key for key in KEYS if isinstance(content.get(key), Mapping) and content[key]), None)
        states = [name for name, value in content.items() if isinstance(name, str) and _holds_tensors(value)]
        if key is None and len(states) == 1 and not _holds_tensors(content):
            key = states[0]  # a name of one program's own
        if key is None:
            break
        others = [other for other in KEYS if other != key and isinstance(content.get(other), Mapping)]
        notes.append(f"the weights under '{key}'" + (f", not those under {', '.join(others)}" if others else ""))
        content = content[key]
    named = content.items() if isinstance(content, Mapping) else ()
    tensors = {name: value for name, value in named if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        if isinstance(content, Mapping) and any(isinstance(value, np.ndarray) for value in content.values()):
            raise UserError(f"{path} holds numpy arrays, not tensors; save it with torch.from_numpy of each")
        holds = f"a {type(content).__name__}"
        if isinstance(content, Mapping):
            holds = f"the keys {', '.join(map(repr, list(content)[:5]))}" if content else "nothing"
        raise UserError(
            f"{path} holds no tensors under names but {holds}; a state dict is expected, bare or under one of "
            f"{', '.join(KEYS[:6])} and the like"
        )
    return tensors, notes
