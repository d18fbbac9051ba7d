"""One cell of `mimscale bench methods`: pre-train, fine-tune, measure; writes one JSON file. The process is its own."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mimscale.training.loop  # noqa: F401  # loaded before the process is forked
from mimscale.api.training import train
from mimscale.bench._methods_rows import CLASSES, IMAGE, ROWS, Preset, finetuning, pretraining
from mimscale.bench._report import commit, processor
from mimscale.config.recipes import load_recipe
from mimscale.config.run import RunConfig, method_class
from mimscale.convert.networks import student_from
from mimscale.convert.read import read
from mimscale.data.loader import eval_batches
from mimscale.data.manifest import Manifest
from mimscale.evals.features import Extractor, frozen, random_like, raw_pixels, stream
from mimscale.evals.protocols.base import Context, Features
from mimscale.evals.runner import protocol_class
from mimscale.files.atomic import atomic_write
from mimscale.teachers.ensemble import TeacherEnsemble, build_skeletons
from mimscale.types import TeacherNeeds

METRICS = ("knn", "linear", "attentive", "lowshot", "finetune")


class Probe(NamedTuple):
    """protocol: its name. options: of its Config. pool: of the features. metric: the key in its results."""

    protocol: str
    options: dict[str, Any]
    pool: str
    metric: str


def probes(preset: Preset) -> dict[str, Probe]:
    """The frozen measures. A low-shot draw has 1 % of the training images; the mean of three draws counts."""
    found = {
        "knn": Probe("knn", {}, "mean", "knn"),
        "linear": Probe("linear", {}, "mean", "linear"),
        "lowshot": Probe("lowshot", {"percent": 1.0}, "mean", "lowshot"),
    }
    attentive = {"steps": preset.attentive_steps, "batch": 256, "queries": 8, "rates": [0.1, 0.5, 2.0]}
    found["attentive"] = Probe("attentive", attentive, "tokens", "attentive")
    return found


def run_cell(folder: Path, name: str, seed: int) -> dict[str, Any]:
    """The scores of one row and seed, in percent, and what they took. Raises what a run raises."""
    preset = Preset(**json.loads((folder / "preset.json").read_text()))
    row, device = ROWS[name], torch.device(preset.device)
    torch.set_num_threads(1 if preset.device == "cpu" else 2)
    shards = {split: Manifest.load(folder / "data" / split) for split in ("train", "val")}
    data, runs = str(folder / "data" / "train"), folder / "runs" / f"{name}-{seed}"
    seconds: dict[str, float] = {}
    start = _Clock(seconds)
    trained: Path | None = None
    if row.kind == "pretrained":
        words = pretraining(row, name, preset, data, seed)
        trained = train(row.recipe, _mapping(words), run_dir=runs / "pretrain").run_dir
        start.lap("pretrain")
    elif row.kind == "supervised":
        words = finetuning(row, preset, data, seed, None, preset.steps + preset.finetune_steps)
        trained = train("mae_tiny", _mapping(words), run_dir=runs / "supervised").run_dir
        start.lap("pretrain")

    scores: dict[str, float] = {}
    if row.kind in ("pretrained", "random"):
        init = str(trained) if trained is not None else None
        words = finetuning(row, preset, data, seed, init, preset.finetune_steps)
        tuned = train("mae_tiny", _mapping(words), run_dir=runs / "finetune").run_dir
        scores["finetune"] = top1_of(tuned, shards["val"], device)
        start.lap("finetune")
    elif row.kind == "supervised":
        assert trained is not None
        scores["finetune"] = top1_of(trained, shards["val"], device)

    wanted = probes(preset)
    if row.kind == "pixels":
        wanted = {metric: probe for metric, probe in wanted.items() if probe.pool == "mean"}
    extract = extractor(folder, name, seed, preset, trained or runs / "finetune", device)
    features = {split: _features(extract, manifest, device) for split, manifest in shards.items()}
    start.lap("features")
    for metric, probe in wanted.items():
        kind = protocol_class(probe.protocol)
        config = kind.Config.model_validate(probe.options)
        protocol = kind(config, Context(CLASSES, seed, device))
        pool = "pixels" if row.kind == "pixels" else probe.pool
        sets = (Features(features[s][0][pool].clone(), features[s][1]) for s in ("train", "val"))
        scores[metric] = float(protocol.run(*sets)[probe.metric])
        start.lap(metric)
    return {"scores": scores, "seconds": seconds, "device": preset.device}


class _Clock:
    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds, self.last = seconds, time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name], self.last = round(now - self.last, 2), now


def extractor(folder: Path, name: str, seed: int, preset: Preset, run: Path, device: torch.device) -> Extractor:
    """Of the network of a row. run: the folder whose encoder it is, or whose shape it has (a random one)."""
    row = ROWS[name]
    if row.kind == "pixels":
        return raw_pixels
    if row.kind == "teacher":
        config = load_recipe(row.recipe, pretraining(row, name, preset, str(folder / "data" / "train"), seed))
        return teacher_features(config, device)
    student, _ = student_from(run)
    if row.kind == "random":
        student = random_like(student, seed)
    return frozen(student.to(device), ("mean", "tokens"))


def teacher_features(config: RunConfig, device: torch.device) -> Extractor:
    """Its map as students see it."""
    skeletons = build_skeletons(config.teachers, config.data.image_size)
    needs = {name: TeacherNeeds((0,)) for name in skeletons}
    ensemble = TeacherEnsemble(config.teachers, skeletons, needs, config.data.image_size, device)

    def extract(images: Tensor) -> dict[str, Tensor]:
        (targets,) = ensemble(images).values()
        tokens = targets.levels[0].float()
        return {"mean": tokens.mean(dim=1), "tokens": tokens}

    return extract


def _features(extract: Extractor, manifest: Manifest, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    batches = stream({"x": extract}, manifest, IMAGE, batch=250, workers=0, crop_pct=1.0, device=device)
    pieces: dict[str, list[Tensor]] = {}
    labels = []
    for found, of_batch in batches:
        labels.append(of_batch.cpu())
        for (_, pool), values in found.items():
            pieces.setdefault(pool, []).append(values.cpu())
    return {pool: torch.cat(values) for pool, values in pieces.items()}, torch.cat(labels)


@torch.no_grad()
def top1_of(run: Path, manifest: Manifest, device: torch.device) -> float:
    """Percent of a validation set that a fine-tuned classifier names right."""
    loaded = read(run)
    assert loaded.run is not None
    method: Any = method_class(loaded.run.method.name)(loaded.run, {})
    method.load_state_dict(loaded.weights)
    method.to(device).eval()
    right = 0
    for batch in eval_batches(manifest, IMAGE, batch=250, workers=0, crop_pct=1.0, rank=0, world=1):
        assert batch.weights is not None and batch.labels is not None
        real = int(batch.weights.sum())
        ready = batch.to(device).normalised()
        assert ready.labels is not None
        guess = method.head(method.features(ready.images)).argmax(dim=1)
        right += int((guess == ready.labels)[:real].sum())
    return 100 * right / manifest.samples


def _mapping(words: list[str]) -> Mapping[str, Any]:
    """`section.key=value` words -> what `mimscale.train` takes; later words win, as on the command line."""
    import yaml

    return {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in words)}


def result_path(folder: Path, name: str, seed: int) -> Path:
    return folder / "cells" / name / f"seed-{seed}.json"


def write_cell(folder: Path, name: str, seed: int) -> None:
    """Run a cell and write its file."""
    start_s, start_cpu_s = time.monotonic(), time.process_time()
    found = run_cell(folder, name, seed)
    device = torch.cuda.get_device_name() if found["device"] == "cuda" else processor()
    found |= {"row": name, "seed": seed, "commit": commit(), "device": device, "torch": torch.__version__}
    found["seconds"]["all"] = round(time.monotonic() - start_s, 2)
    found["cpu_seconds"] = round(time.process_time() - start_cpu_s, 2)
    path = result_path(folder, name, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, (json.dumps(found, indent=1) + "\n").encode())
