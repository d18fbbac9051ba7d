"""Files of weights as other programs write them: the tensors come out as they were, and what was taken off is said."""

from __future__ import annotations

import argparse
import collections
import datetime
import fractions
import pathlib
import tarfile
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mimscale.errors import UserError
from mimscale.files.weights_file import read_weights, unwrapped

State = dict[str, Tensor]
STATE: State = {
    name: torch.full((2,), float(index))
    for index, name in enumerate(
        ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.13.norm1.weight")
    )
}


def below(prefix: str, state: State = STATE) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def in_chunks(state: State) -> State:
    """DINOv2 with block_chunks = 4: the chunk, and then the number of the block."""
    return {
        n if not n.startswith("blocks.") else f"blocks.{int(n.split('.')[1]) // 4}.{n.removeprefix('blocks.')}": t
        for n, t in state.items()
    }


def wrapped_inside(state: State) -> State:
    """torch.compile of each block, and FSDP with activation checkpointing around the whole."""
    inside = {
        n.replace(".attn.", "._orig_mod.attn.").replace(".norm1.", "._orig_mod.norm1."): t for n, t in state.items()
    }
    return below("_fsdp_wrapped_module._checkpoint_wrapped_module.", inside)


HEADS = {"dino_head.mlp.0.weight": torch.ones(3), "ibot_head.last.weight": torch.ones(1)}
CASES: dict[str, tuple[Any, str]] = {
    "bare": (STATE, ""),
    "mae": ({"model": STATE, "epoch": 3}, "the weights under 'model'"),
    "ddp": ({"model": below("module.")}, "names without module."),
    "compile": ({"state_dict": below("_orig_mod.")}, "names without _orig_mod."),
    "ddp_of_compile": (below("module._orig_mod."), "names without module."),
    "compiled_blocks": (wrapped_inside(STATE), "_checkpoint_wrapped_module. and _fsdp_wrapped_module. and _orig_mod."),
    "deepspeed": ({"module": STATE, "ds_version": "0.14", "lr_scheduler": None}, "the weights under 'module'"),
    "timm_average": ({"state_dict_ema": STATE}, "under 'state_dict_ema'"),
    "model_and_average": ({"model": STATE, "model_ema": below("x.")}, "under 'model', not those under model_ema"),
    "lightning": ({"state_dict": below("model."), "pytorch-lightning_version": "2"}, "names without model."),
    "lightning_and_its_loss": (
        {"state_dict": {**below("model."), "criterion.scale": torch.ones(1)}},
        "what is below model., 1 other tensors left out",
    ),
    "lightning_backbone": (
        {"state_dict": {**below("backbone."), **below("momentum_backbone."), "classifier.weight": torch.ones(2)}},
        "what is below backbone., 6 other tensors left out",
    ),
    "dino": (
        {"student": below("module.backbone."), "teacher": {**below("backbone."), **HEADS}, "epoch": 1},
        "under 'teacher', not those under student",
    ),
    "dinov2_chunks": ({"teacher": below("backbone.", in_chunks(STATE))}, "blocks out of their chunks"),
    "both_towers": ({"model": {**below("student.backbone."), **below("teacher.backbone.")}}, "below teacher.backbone."),
    "ijepa": (
        {"encoder": below("x."), "target_encoder": below("module."), "predictor": {"w": torch.ones(1)}},
        "under 'target_encoder', not those under encoder",
    ),
    "moco": (
        {"state_dict": {**below("module.base_encoder."), **below("module.momentum_encoder.")}},
        "what is below base_encoder., 5 other tensors left out",
    ),
    "average": ({"n_averaged": torch.tensor(3), **below("module.")}, "without n_averaged"),
    "average_and_online": (
        {**below("ema_model."), **below("online_model."), "initted": torch.tensor(True), "step": torch.tensor([4])},
        "without initted and step; what is below ema_model., 5 other tensors left out",
    ),
    "image_tower": (below("visual.trunk.") | {"text.token": torch.ones(1)}, "what is below visual.trunk."),
    "ema_only": ({"ema_state_dict": STATE, "steps": 3}, "the weights under 'ema_state_dict'"),
    "a_name_of_its_own": ({"shadow": STATE, "decay": 0.99, "optimizer": {"state": {0: {}}}}, "under 'shadow'"),
    "nested": ({"state_dict": {"model": below("module.")}}, "the weights under 'model'"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_programs_wrap_weights_in_is_taken_off_and_said(case: str, tmp_path: Path) -> None:
    content, phrase = CASES[case]
    torch.save(content, tmp_path / "w.pth")
    found = read_weights(tmp_path / "w.pth")
    assert found.weights.keys() == STATE.keys()
    assert all(torch.equal(found.weights[name], tensor) for name, tensor in STATE.items())
    assert phrase in "; ".join(found.unwrapped) and (phrase or not found.unwrapped)


def test_the_same_in_safetensors(tmp_path: Path) -> None:
    save_file(below("module.backbone."), tmp_path / "w.safetensors", {"format": "pt"})
    found = read_weights(tmp_path / "w.safetensors")
    assert found.weights.keys() == STATE.keys() and found.metadata == {"format": "pt"}
    assert found.unwrapped == ("names without module.", "what is below backbone.")


@pytest.mark.parametrize(
    "names",
    [
        ["student.cls_token", "decoder.mask_token"],  # ours
        ["backbone.patch_embed.projection.weight", "neck.mask_token"],  # OpenMMLab's
        ["encoder.patch_embed.proj.weight", "decoder.0.weight"],  # SimMIM's
        ["module.weight", "other.weight"],  # not uniform
        ["vit.embeddings.cls_token", "decoder.mask_token"],  # Hugging Face's
        ["blocks.0.mlp.fc1.weight", "blocks1.0.1.weight"],
    ],
)
def test_names_that_mean_something_stay(names: list[str]) -> None:
    state = {name: torch.ones(1) for name in names}
    assert unwrapped(state) == (state, ())


BESIDE: dict[str, Callable[[], Any]] = {
    "namespace": lambda: argparse.Namespace(lr=0.1, out=pathlib.Path("a/b"), names=["x"], seen={1, 2}),
    "simple_namespace": lambda: types.SimpleNamespace(a=1),
    "numpy_scalars": lambda: [np.float64(0.5), np.float32(1), np.int64(3), np.bool_(True)],
    "numpy_array": lambda: {"loss": np.arange(6.0).reshape(2, 3)},
    "defaultdict": lambda: collections.defaultdict(list, {"loss": [1.0]}),
    "ordered": lambda: collections.OrderedDict(a=1),
    "generators": lambda: {"numpy": np.random.RandomState(0).get_state(), "range": range(3), "word": np.str_("x")},
    "date": lambda: [datetime.datetime(2020, 1, 1), datetime.timedelta(1), np.datetime64("2020-01-01")],
    "windows_path": lambda: pathlib.PureWindowsPath("C:/runs/1"),
}


@pytest.mark.parametrize("beside", BESIDE)
def test_harmless_things_beside_the_weights(beside: str, tmp_path: Path) -> None:
    torch.save({"model": STATE, "beside": BESIDE[beside]()}, tmp_path / "w.pth")
    assert read_weights(tmp_path / "w.pth").weights.keys() == STATE.keys()


def test_a_type_that_is_refused_is_named(tmp_path: Path) -> None:
    torch.save({"model": STATE, "lr": fractions.Fraction(1, 3)}, tmp_path / "w.pth")
    line = r"holds a fractions\.Fraction, which could run code\); save its tensors alone"
    with warnings.catch_warnings(record=True) as said, pytest.raises(UserError, match=line):
        warnings.simplefilter("always")
        read_weights(tmp_path / "w.pth")
    assert not said  # torch's own warning would say it twice


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ({"optimizer": {}, "epoch": 3}, "but the keys 'optimizer', 'epoch'; a state dict is expected"),
        ([1, 2], "but a list"),
        ({}, "but nothing"),
        ({"model": {}}, "but the keys 'model'"),
        (torch.ones(2), "but a Tensor"),
        ({"cls_token": np.ones(2)}, "holds numpy arrays, not tensors"),
        ({"a": torch.ones(2), "b": torch.ones(2).to(torch.int8)}, "holds b in int8 (1 such tensors): it is quantised"),
    ],
)
def test_files_without_named_tensors(content: Any, line: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError) as error:
        read_weights(tmp_path / "w.pth")
    assert line in str(error.value)


FILES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "it is empty; get it again"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", "it is a pointer of Git LFS, not the file"),
    "page": (b"\n<!DOCTYPE html><html>Not found</html>", "it is a web page, which a server sent in place of the file"),
    "gzip": (b"\x1f\x8b\x08" + bytes(60), "it is packed with gzip; unpack it"),
    "text": (b"epoch 1 loss 0.5\n" * 9, "it is a text file; get the file of weights"),
    "keras": (b"\x89HDF\r\n\x1a\n" + bytes(60), "it is an HDF5 file, as Keras writes it"),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", FILES)
def test_what_is_no_file_of_weights_is_named_for_what_it_is(kind: str, suffix: str, tmp_path: Path) -> None:
    content, line = FILES[kind]
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"w{suffix} (cannot be read as|is not) a .*: {line}"):
        read_weights(path)


def test_numpy_and_old_archives_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", cls_token=np.ones(3))
    with pytest.raises(UserError, match=": it is an archive of numpy arrays; save named tensors"):
        read_weights(tmp_path / "w.npz")
    with tarfile.open(tmp_path / "w.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    with pytest.raises(UserError, match=": it is in torch's legacy .tar format"):
        read_weights(tmp_path / "w.tar")


@pytest.mark.parametrize(
    ("tensor", "words"),
    [(torch.ones(2, device="meta"), "without its numbers"), (torch.eye(2).to_sparse(), "as a sparse tensor")],
)
def test_tensors_that_hold_no_plain_numbers(tmp_path: Path, tensor: Tensor, words: str) -> None:
    torch.save({"model": {**STATE, "norm.weight": tensor}}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=f"holds norm.weight {words} .*1 such tensors.; save dense tensors"):
        read_weights(tmp_path / "w.pth")
