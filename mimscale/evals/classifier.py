"""A classifier (fine-tuned, or a linear probe) out of a run or an official file, at its own image size or at others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from mimscale.checkpoint import format as checkpoint
from mimscale.config.recipes import validate
from mimscale.config.run import RunConfig, method_class
from mimscale.convert.formats.base import format_of
from mimscale.convert.networks import load, method_from, student_of
from mimscale.convert.positions import with_positions_of
from mimscale.convert.read import Loaded, read
from mimscale.data.manifest import Manifest
from mimscale.data.names import one_line
from mimscale.errors import UserError
from mimscale.evals.robustness.classifiers import class_names
from mimscale.methods.finetune import Finetune
from mimscale.methods.linear_probe import LinearProbe
from mimscale.models.beit import LAYER_SCALE, Beit

CLASSIFIERS = {"finetune": "head.weight", "linear_probe": "head.1.weight"}
"""Methods, and a tensor that a classifier of each has."""


@dataclass(frozen=True)
class Classifier:
    """method: in evaluation, on its device. run: how it was trained, with the image size at which it is evaluated; of
    an official file only what its tensors show. dtype: of the images; a linear probe always takes float32 and computes
    as it was trained. path, sha256, step: of the checkpoint; step None where it has none.
    """

    method: Finetune | LinearProbe
    run: RunConfig
    dtype: torch.dtype
    path: Path
    sha256: str
    step: int | None

    @property
    def classes(self) -> int:
        return self.method.config.classes

    def logits(self, images_B3HW: Tensor) -> Tensor:
        """Normalised images -> float32 [B, classes]."""
        return self.method.logits(images_B3HW.to(self.dtype))

    def check_labels(self, val: Manifest, path: Path) -> None:
        """Raises UserError where a data set's labels are not the classes of this network.

        The names are compared where the run's training set can be opened here, else their number.
        """
        if val.labels is None or val.labels.min() < 0:
            raise UserError(f"--val {path} has samples without labels; prepare it without --unlabelled")
        classes = len(val.classes) if val.classes is not None else int(val.labels.max()) + 1
        if classes != self.classes:
            raise UserError(
                f"--val {path} has {classes} classes, and {self.path} was trained for {self.classes}; give the "
                f"validation set of its own data"
            )
        try:
            names = class_names(self.run, None)
        except UserError:  # the training set has moved, or the file names none
            return
        if val.classes is not None and names != val.classes:
            at = next(number for number in range(classes) if names[number] != val.classes[number])
            raise UserError(
                f"--val {path}: label {at} is class '{one_line(val.classes[at])}', output {at} of {self.path} is "
                f"'{one_line(names[at])}'; prepare --val with the class names of the training set, in their order"
            )


def load_classifier(
    path: Path, *, image_size: int | None, device: torch.device, precision: str, ema: bool = False
) -> Classifier:
    """path: a run folder, a checkpoint folder or a file. image_size: in pixels; None: as it was trained.

    Position tables are resized for another size. Raises UserError.
    """
    loaded = read(path, ema)
    run, weights = _whole(loaded)
    if image_size is not None:
        if image_size % run.student.patch:
            raise UserError(f"--image-size {image_size} is not a multiple of the student's patch = {run.student.patch}")
        run = run.model_copy(update={"data": run.data.model_copy(update={"image_size": image_size})})
    method = cast(Finetune | LinearProbe, method_class(run.method.name)(run, {}))
    weights, _ = with_positions_of(weights, method.state_dict())
    load(method, weights, loaded.path)
    dtype = torch.bfloat16 if precision == "bf16" and isinstance(method, Finetune) else torch.float32
    method = method.eval().requires_grad_(False).to(device, dtype)
    step = checkpoint.step_of(loaded.path) if loaded.path.is_dir() else None
    return Classifier(method, run, dtype, loaded.path, loaded.sha256(), step)


def _whole(loaded: Loaded) -> tuple[RunConfig, dict[str, Tensor]]:
    """How a classifier was trained, and its weights by our names."""
    wrong = UserError(
        f"{loaded.path} holds no fine-tuned classifier; `mimscale train finetune_... init.weights={loaded.path}` makes "
        f"one of a pre-trained encoder"
    )
    if loaded.run is not None:
        if loaded.run.method.name not in CLASSIFIERS or CLASSIFIERS[loaded.run.method.name] not in loaded.weights:
            raise wrong
        return loaded.run, dict(loaded.weights)
    if format_of(loaded.weights) != "finetune":
        raise wrong
    run = _run_of(loaded)
    return run, dict(method_from(loaded, run)[0].state_dict())


def _run_of(loaded: Loaded) -> RunConfig:
    """What the tensors of an official file show of its run."""
    student, info = student_of(loaded)
    section: dict[str, Any] = {
        "name": "finetune",
        "classes": len(loaded.weights["head.weight"]),
        "pool": "mean" if "fc_norm.weight" in loaded.weights else "cls",
        "stages": None if info.stages is None else info.stages.model_dump(mode="json"),
    }
    if isinstance(student, Beit):
        scaled = "blocks.0.gamma_1" in loaded.weights
        section["beit"] = {"positions": student.positions, "layer_scale": LAYER_SCALE if scaled else None}
    values = {
        "data": {"shards": "unknown", "image_size": info.image_size},
        "student": info.config.model_dump(mode="json"),
        "method": section,
        "schedule": {"global_batch": 1, "steps": 1, "base_lr": 1e-3},
    }
    return validate(values, source=str(loaded.path))
