"""Numbers computed by the official programs, to compare with. Read from $MIMSCALE_GOLDENS, else tests/goldens/.

A golden run is a method built by our code with the stored weights, mapped by `mimscale.convert.formats`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from mimscale.config.recipes import validate
from mimscale.config.run import RunConfig
from mimscale.convert.formats import maskalign
from mimscale.convert.networks import levels_of
from mimscale.methods.mae import MAE
from mimscale.methods.maskalign import MaskAlign
from mimscale.types import Batch, Targets, TeacherInfo

ACTIVATION = 1e-5  # absolute
LOSS = 1e-6  # relative
GRADIENT = 1e-4  # of the tensor's largest entry
RATE = 1e-9  # relative


def path(name: str) -> Path:
    folder = Path(os.environ.get("MIMSCALE_GOLDENS") or Path(__file__).parent / "goldens")
    if not (folder / name).is_file():
        pytest.skip(f"{name} is not in {folder}; set MIMSCALE_GOLDENS to the folder that holds it")
    return folder / name


@dataclass(frozen=True)
class Golden:
    """tensors: name -> what the official program computed. config: how it was configured."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors below `prefix/`, under the rest of their names."""
        return {name.removeprefix(prefix + "/"): t for name, t in self.tensors.items() if name.startswith(prefix + "/")}


def load(name: str) -> Golden:
    _used_by[_test()] = name
    with safe_open(path(f"{name}.safetensors"), framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return Golden(tensors, json.loads(file.metadata()["config"]))


def load_json(name: str) -> Any:
    _used_by[_test()] = Path(name).stem
    return json.loads(path(name).read_text())


def close(ours: Tensor, golden: Tensor, limit: float = ACTIVATION, kind: str = "activation") -> None:
    torch.testing.assert_close(ours, golden, atol=limit, rtol=0)
    report(kind, (ours - golden).abs().max(), limit)


def equal(ours: Tensor, golden: Tensor, kind: str = "mask") -> None:
    """To the bit."""
    assert torch.equal(ours, golden)
    report(kind, 0.0, 0.0)


def rates_close(ours: Sequence[float], golden: Sequence[float]) -> None:
    """Learning rates."""
    assert ours == pytest.approx(golden, rel=RATE, abs=1e-15)
    report("rate", max(abs(a - b) / max(b, 1e-15) for a, b in zip(ours, golden, strict=True)), RATE)


def gradient_close(ours: Tensor | None, golden: Tensor) -> None:
    assert ours is not None
    largest = float(golden.abs().max())
    torch.testing.assert_close(ours, golden, atol=GRADIENT * largest, rtol=0)
    report("gradient", (ours - golden).abs().max() / largest, GRADIENT)


def loss_close(ours: Tensor | float, golden: Tensor | float) -> None:
    """fp32 scalars."""
    assert float(ours) == pytest.approx(float(golden), rel=LOSS)
    report("loss", abs(float(ours) / float(golden) - 1), LOSS)


def report(kind: str, error: Tensor | float, tolerance: float) -> None:
    """With $MIMSCALE_GOLDEN_REPORT append what was found equal to that file; tests/methods_table.py reads it."""
    file, name = os.environ.get("MIMSCALE_GOLDEN_REPORT"), _used_by.get(_test())
    if file and name:
        line = {"test": _test(), "golden": name, "kind": kind, "error": float(error), "tolerance": tolerance}
        with Path(file).open("a") as lines:
            lines.write(json.dumps(line) + "\n")


_used_by: dict[str, str] = {}  # test -> the golden that it loaded last


def _test() -> str:
    return os.environ.get("PYTEST_CURRENT_TEST", "").rsplit(" ", 1)[0]


def every_parameter_has_a_gradient(module: nn.Module) -> None:
    without = [name for name, p in module.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without, f"without gradient: {without}"


def run_config(method: dict[str, Any], student: dict[str, Any], image_size: int = 64, **sections: Any) -> RunConfig:
    """A small run around the sections that matter to a method."""
    values = {
        "data": {"shards": "none", "image_size": image_size},
        "student": student,
        "method": method,
        "schedule": {"global_batch": 2, "steps": 4, "base_lr": 1e-3},
    }
    return validate({**values, **sections}, source="test")


def batch_of(images: Tensor, **noise: Tensor) -> Batch:
    """A normalised batch with this noise."""
    count = len(images)
    return Batch(
        images=images,
        ids=torch.arange(count),
        positions=torch.arange(count),
        noise=noise,
        boxes=torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(count, 4),
        flips=torch.zeros(count, dtype=torch.bool),
        labels=torch.arange(count) % 2,
    )


# --------------------------------------------------------------------------------------------------- methods of goldens


def mae_run(c: dict[str, Any], changes: Mapping[str, Any] | None = None, **sections: Any) -> RunConfig:
    """The sets of goldens name their settings differently. changes: of the method's section, for MAE's relatives."""

    def pick(*names: str) -> Any:
        return next(c[name] for name in names if name in c)

    width = pick("decoder_embed_dim", "dec_dim")
    method = {
        "name": "mae",
        "masking": {"ratio": c.get("mask_ratio", 0.75)},
        "norm_pix_loss": pick("norm_pix_loss", "norm_pix"),
        "decoder_width": width,
        "decoder_depth": pick("decoder_depth", "dec_depth"),
        "decoder_heads": pick("decoder_num_heads", "dec_heads"),
        **(changes or {}),
    }
    student = {"width": pick("embed_dim", "embed"), "depth": c["depth"], "heads": pick("num_heads", "heads")}
    student["patch"] = c.get("patch", 16)
    return run_config(method, student, pick("img_size", "img"), **sections)


def mae_method(run: RunConfig, weights: dict[str, Tensor]) -> MAE:
    method = MAE(run, {})
    method.load_state_dict(weights)
    return method


def maskalign_run(c: dict[str, Any], **sections: Any) -> RunConfig:
    names = {"mlp2": "mlp_norm"}
    head = c.get("head_type", "linear")
    method = {
        "name": "maskalign",
        "masking": {"ratio": c["mask_ratio"], "policy": c.get("mask_type", "attention")},
        "fusion": c.get("fusion", "linear"),
        "adaptor": names.get(head, head),
        "target_norm": c.get("target_norm", "whiten"),
        "loss": c.get("loss_type", "smoothl1"),
        "levels": c["loss_weights"],
    }
    student = {"width": c["embed"], "depth": c["depth"], "heads": c["heads"]}
    return run_config(method, student, c["img"], **sections)


def maskalign_method(run: RunConfig, c: dict[str, Any], official: dict[str, Tensor]) -> MaskAlign:
    """With the stored weights; `official` may hold the teacher, which is dropped."""
    depth = c.get("teacher_depth", c["depth"])
    info = TeacherInfo("teacher", c["teacher_dim"], depth, run.grid, run.data.image_size, has_cls=True)
    method = MaskAlign(run, {"teacher": info})
    method.load_state_dict(maskalign.from_official(official, levels_of(method)).weights)
    return method


def targets_of(hidden: Tensor, cls_attention: Tensor) -> Targets:
    """Stored hidden states [1 + depth, B, 1 + L, C] (embeddings first) as a teacher hands them over."""
    return Targets(
        levels={level: x[:, 1:] for level, x in enumerate(hidden[1:])},
        cls={level: x[:, 0] for level, x in enumerate(hidden[1:])},
        cls_attention=cls_attention,
    )
