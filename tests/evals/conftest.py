from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import yaml
from sklearn.datasets import load_digits
from torch import Tensor

from data_prep.folder import read_folder
from data_prep.plan import ShardPlan
from data_prep.write_shards import unfinished, write
from mimscale.checkpoint import format as checkpoint
from mimscale.config.recipes import validate
from mimscale.config.run import RunConfig, method_class
from mimscale.data.synthetic import make_image_folder
from tests.checkpoint.shards import write_shard


def shards(images: Path, out: Path, labelled: bool = True) -> Path:
    plan = ShardPlan(read_folder(images, labelled=labelled), seed=0, shard_mb=256, shard_samples=50)
    assert not write(plan, out, unfinished(plan, out))
    return out


def small_run(method: str, image_size: int = 32) -> RunConfig:
    values = {
        "data": {"shards": "unused", "image_size": image_size},
        "student": {"width": 32, "depth": 2, "heads": 2, "patch": 8},
        "method": {"name": method, "classes": 3}
        if method == "finetune"
        else {"name": method, "decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2},
        "schedule": {"global_batch": 8, "steps": 1, "base_lr": 1e-3},
    }
    return validate(values, "test")


def initial(run: RunConfig, seed: int) -> dict[str, Tensor]:
    """The method's state at its seeded initialisation."""
    torch.manual_seed(seed)
    return method_class(run.method.name)(run, {}).state_dict()


def save_run(
    folder: Path,
    run: RunConfig,
    step: int = 7,
    ema: Mapping[str, Tensor] | None = None,
    state: dict[str, Tensor] | None = None,
) -> Path:
    """A run folder with one checkpoint of the method at its seeded initialisation. ema: parameter -> its average.

    state: in place of the initialisation.
    """
    state = state or initial(run, step)
    fixed = {name for name in state if name.endswith("pos_embed") and run.method.name == "mae"}
    part = folder / "checkpoints" / ".tmp"
    pieces = {f"{'buffer' if n in fixed else 'fp32'}|{n}|0": t.detach().flatten() for n, t in state.items()}
    pieces |= {f"ema|{name}|0": tensor.detach().flatten() for name, tensor in (ema or {}).items()}
    shard = write_shard(part, pieces, 0, 1)
    shapes = {name: list(tensor.shape) for name, tensor in state.items()}
    final = checkpoint.step_folder(folder / "checkpoints", step)
    checkpoint.commit(part, final, [shard], {"step": step, "shapes": shapes})
    (folder / "config.yaml").write_text(yaml.safe_dump(run.dump()))
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Labelled shards: 120 images to learn from, 45 others of the same 3 classes."""
    root = tmp_path_factory.mktemp("data")
    for name, per_class, seed in (("train", 40, 0), ("val", 15, 1)):
        shards(
            make_image_folder(root / f"{name}-images", classes=3, per_class=per_class, side=32, seed=seed),
            root / name,
        )
    return root / "train", root / "val"


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("runs") / "mae", small_run("mae"))


@pytest.fixture(scope="session")
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's digits: features float32 [1297, 64], labels [1297], and those of 500 others."""
    x, y = load_digits(return_X_y=True)
    features, labels = torch.from_numpy(x).float(), torch.from_numpy(y).long()
    return features[:1297], labels[:1297], features[1297:], labels[1297:]
