"""The full state of a run as plain files, and back: weights, optimiser moments, step, recipe.

    OUT/weights.safetensors        every parameter (float32) and buffer, under our names; `evaluate`, `convert` and
                                   `init.weights` read this file alone, too
    OUT/exp_avg.safetensors ...    one file for each other kind of tensor in the checkpoint, under the parameters' names
    OUT/state.json                 step, recipe, groups, counters, loss scale, data, teachers; sha256 of each file

Every tensor is whole, and nothing depends on ranks, ZeRO stages or parameter groups. Converted back into a run folder,
the run resumes where it was (`train` with its config.yaml), or a new run starts from it (`train --fork`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mimscale.checkpoint import format as checkpoint
from mimscale.checkpoint import run_folder
from mimscale.checkpoint.host_buffer import HostBuffer
from mimscale.config.recipes import validate
from mimscale.convert import check, difference
from mimscale.convert.difference import Differences, refuse_difference
from mimscale.convert.formats.base import encoder_of
from mimscale.convert.names import State, same
from mimscale.convert.networks import student_of
from mimscale.convert.read import Loaded, read, run_of, with_newest
from mimscale.convert.write import identity, save
from mimscale.errors import UserError
from mimscale.files.atomic import atomic_folder, atomic_path

FORMAT = 1
WEIGHTS = ("fp32", "buffer")


def export(source: Path, out: Path) -> list[str]:
    """Write the full state of a run's newest checkpoint, or of one checkpoint, to a folder. Raises UserError."""
    return with_newest(source, lambda folder: _export(folder, out))


def _export(folder: Path, out: Path) -> list[str]:
    if not folder.is_dir():
        raise UserError(f"{folder} holds weights only; --to state reads a run folder or a checkpoint folder")
    run = run_of(folder)
    try:
        reader = checkpoint.CheckpointReader(folder)
        reader.verify()
    except checkpoint.CheckpointError as error:
        raise UserError(f"{error}; take an older checkpoint of the run") from None
    with atomic_folder(out) as part:
        weights = {name: reader.full(kind, name) for kind in WEIGHTS for name in reader.names(kind)}
        loaded = Loaded(folder, weights, run)
        files = {"weights": _written(part / "weights.safetensors", weights, {"run": run.dump()})}
        for kind in reader.kinds():
            if kind not in WEIGHTS:
                tensors = {name: reader.full(kind, name) for name in reader.names(kind)}
                files[kind] = _written(part / f"{kind}.safetensors", tensors, {"kind": kind})
        found = _encoder_difference(loaded, read(part / "weights.safetensors").weights)
        refuse_difference(found, out)
        about = {"format": FORMAT, **identity(loaded), **difference.report(found), "files": files}
        meta = {key: value for key, value in reader.meta.items() if key != "format"}
        values = {**about, "config": run.dump(), "buffers": reader.names("buffer"), "checkpoint": meta}
        (part / "state.json").write_text(json.dumps(values, indent=1) + "\n")
    kinds = ", ".join(files)
    return [
        f"step {reader.meta['step']}: {kinds}",
        "checked: every tensor reads back as it was",
        *difference.lines(found),
    ]


def restore(source: Path, out: Path) -> list[str]:
    """Write a run folder with one checkpoint from what `export` wrote. Raises UserError."""
    about = _read_json(source)
    run = validate(about["config"], source=f"{source}/state.json")
    meta, buffers = about["checkpoint"], set(about["buffers"])
    with atomic_folder(out) as part:
        run_folder.create(part, run)
        final = checkpoint.step_folder(part / "checkpoints", meta["step"])
        writing, shards = final.with_name(f".new-{final.name}"), []
        for index, (file, expected) in enumerate(about["files"].items()):
            tensors = _read_file(source / f"{file}.safetensors", expected)
            kinds = {n: file if file != "weights" else "buffer" if n in buffers else "fp32" for n in tensors}
            fragments = {f"{kinds[name]}|{name}|0": tensor.flatten() for name, tensor in tensors.items()}
            shards.append(_write_shard(writing, fragments, index, len(about["files"])))
        checkpoint.commit(writing, final, shards, meta)
        reader = checkpoint.CheckpointReader(final)
        for file in about["files"]:
            for name, tensor in _read_file(source / f"{file}.safetensors").items():
                kind = file if file != "weights" else "buffer" if name in buffers else "fp32"
                if not torch.equal(reader.full(kind, name), tensor):
                    raise RuntimeError(f"{kind} of {name} does not read back as it was written")
        loaded = read(source / "weights.safetensors")
        found = _encoder_difference(loaded, read(part).weights)
        refuse_difference(found, out)
        report = {"to": "run", **identity(loaded), **difference.report(found)}
        (final / "imported.json").write_text(json.dumps(report, indent=2) + "\n")
    return [f"step {meta['step']}", "checked: every tensor reads back as it was", *difference.lines(found)]


TARGETS = {"state": export, "run": restore}


def _written(path: Path, tensors: State, carried: dict[str, Any]) -> dict[str, Any]:
    with atomic_path(path) as part:
        save(part, tensors, carried)
    back = _read_file(path)
    if not same(back, tensors):
        raise RuntimeError(f"{path} does not read back as it was written")
    return {"bytes": path.stat().st_size, "sha256": checkpoint.sha256(path)}


def _write_shard(folder: Path, tensors: State, index: int, count: int) -> dict[str, Any]:
    """Write "kind|name|0" -> 1-D tensor to one of the checkpoint's files, and return its entry in the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    name = checkpoint.shard_name(index, count)
    size, digest = HostBuffer(tensors).fill(tensors).write(folder / name)
    return {"file": name, "bytes": size, "sha256": digest, "fragments": checkpoint.fragments(tensors)}


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


def _encoder_difference(loaded: Loaded, back: State) -> Differences:
    vit, _ = student_of(loaded)
    return {"encoder": check.encoder_difference(vit, encoder_of(back))}
