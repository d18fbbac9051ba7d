"""The full state of a run as plain files, and back: weights, moments, step, decoder and heads, recipe.

    OUT/weights.safetensors        every parameter (float32) and buffer, under our names; `evaluate`, `convert` and
                                   `init.weights` read this file alone, too
    OUT/exp_avg.safetensors ...    Adam's moments, float32, under the parameters' names
    OUT/state.json                 step, recipe, groups, counters, loss scale, data, teachers; sha256 of each file

No rank, stage or group is in it, and every tensor is whole. Back in a run folder it goes on where it was (`train` with
its config.yaml) or starts a new run (`train --fork`).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mimscale.checkpoint import format as checkpoint
from mimscale.checkpoint import run_folder
from mimscale.config.recipes import validate
from mimscale.convert import check
from mimscale.convert.names import State, same
from mimscale.convert.registry import encoder_of
from mimscale.convert.source import Loaded, of_newest, read, run_of
from mimscale.convert.student import student_of
from mimscale.convert.write import identity, measured, refuse_difference, save
from mimscale.errors import UserError

FORMAT = 1
WEIGHTS = ("fp32", "buffer")


def export(source: Path, out: Path) -> list[str]:
    """A checkpoint of ours -> a folder. Raises UserError."""
    return of_newest(source, lambda folder: _export(folder, out))


def _export(folder: Path, out: Path) -> list[str]:
    if not folder.is_dir():
        raise UserError(f"{folder} holds weights only; --to state reads a run folder or a checkpoint folder")
    run = run_of(folder)
    try:
        reader = checkpoint.Reader(folder)
        reader.verify()
    except checkpoint.CheckpointError as error:
        raise UserError(f"{error}; take an older checkpoint of the run") from None
    with _whole_folder(out) as part:
        weights = {name: reader.full(kind, name) for kind in WEIGHTS for name in reader.names(kind)}
        loaded = Loaded(folder, weights, run)
        files = {"weights": _written(part / "weights.safetensors", weights, {"run": run.dump()})}
        for kind in reader.kinds():
            if kind not in WEIGHTS:
                tensors = {name: reader.full(kind, name) for name in reader.names(kind)}
                files[kind] = _written(part / f"{kind}.safetensors", tensors, {"kind": kind})
        found = _encoder_difference(loaded, read(part / "weights.safetensors").weights)
        refuse_difference(found, out)
        about = {"format": FORMAT, **identity(loaded), **measured(found), "files": files}
        meta = {key: value for key, value in reader.meta.items() if key != "format"}
        values = {**about, "config": run.dump(), "buffers": reader.names("buffer"), "checkpoint": meta}
        (part / "state.json").write_text(json.dumps(values, indent=1) + "\n")
        for file in files:
            shutil.copymode(part / "state.json", part / f"{file}.safetensors")
    kinds = ", ".join(files)
    return [f"step {reader.meta['step']}: {kinds}", "checked: every tensor reads back as it was", *_line(found)]


def restore(source: Path, out: Path) -> list[str]:
    """Such a folder -> a run folder with one checkpoint. Raises UserError."""
    about = _read_json(source)
    run = validate(about["config"], source=f"{source}/state.json")
    meta, buffers = about["checkpoint"], set(about["buffers"])
    with _whole_folder(out) as part:
        run_folder.create(part, run)
        final = checkpoint.step_folder(part / "checkpoints", meta["step"])
        writing, shards = final.with_name(f".new-{final.name}"), []
        for index, (file, expected) in enumerate(about["files"].items()):
            tensors = _read_file(source / f"{file}.safetensors", expected)
            kinds = {n: file if file != "weights" else "buffer" if n in buffers else "fp32" for n in tensors}
            fragments = {f"{kinds[name]}|{name}|0": tensor.flatten() for name, tensor in tensors.items()}
            shards.append(checkpoint.write_shard(writing, fragments, index, len(about["files"])))
        checkpoint.commit(writing, final, shards, meta)
        reader = checkpoint.Reader(final)
        for file in about["files"]:
            for name, tensor in _read_file(source / f"{file}.safetensors").items():
                kind = file if file != "weights" else "buffer" if name in buffers else "fp32"
                if not torch.equal(reader.full(kind, name), tensor):
                    raise RuntimeError(f"{kind} of {name} does not read back as it was written")
        loaded = read(source / "weights.safetensors")
        found = _encoder_difference(loaded, read(part).weights)
        refuse_difference(found, out)
        report = {"to": "run", **identity(loaded), **measured(found)}
        (final / "imported.json").write_text(json.dumps(report, indent=2) + "\n")
    return [f"step {meta['step']}", "checked: every tensor reads back as it was", *_line(found)]


TARGETS = {"state": export, "run": restore}


def _written(path: Path, tensors: State, carried: dict[str, Any]) -> dict[str, Any]:
    save(path, tensors, carried)
    back = _read_file(path)
    if not same(back, tensors):
        raise RuntimeError(f"{path} does not read back as it was written")
    return {"bytes": path.stat().st_size, "sha256": checkpoint.sha256(path)}


def _read_file(path: Path, expected: dict[str, Any] | None = None) -> State:
    if not path.is_file():
        raise UserError(f"{path} is missing; copy the whole folder again")
    if expected is not None and checkpoint.sha256(path) != expected["sha256"]:
        raise UserError(f"{path} is not the file that state.json names (sha256 differs); copy the whole folder again")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); copy the whole folder again") from None


def _read_json(source: Path) -> dict[str, Any]:
    path = source / "state.json"
    if not path.is_file():
        raise UserError(f"{path} is missing; --to run reads a folder that --to state wrote")
    try:
        about: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); copy the whole folder again") from None
    if about.get("format") != FORMAT:
        raise UserError(f"{path} has format {about.get('format')}; this version of mimscale reads {FORMAT}")
    return about


def _encoder_difference(loaded: Loaded, back: State) -> check.Differences:
    vit, _ = student_of(loaded)
    return {"encoder": check.encoder_difference(vit, encoder_of(back))}


def _line(found: check.Differences) -> list[str]:
    return [f"checked on random input: {name} differs by {value:.1e} of the largest" for name, value in found.items()]


@contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """A folder that gets its name when the block ends well, and is removed otherwise."""
    part = out.with_name(f".part-{out.name}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        os.rename(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
