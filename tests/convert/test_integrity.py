"""Whoever reads a checkpoint of ours checks its files: a damaged one is named, and no weights come out of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mimscale.api.encoder import load_encoder
from mimscale.convert.read import read
from mimscale.errors import UserError
from mimscale.evals.networks import load_networks
from mimscale.training import init_weights
from tests.convert.runs import build, refused, saved_run

CPU = torch.device("cpu")


def start_from(run_dir: Path) -> None:
    method, run = build("mae")
    init = {"weights": run_dir, "sha256": None, "part": "method"}
    run = type(run).model_validate({**run.dump(), "init": init})
    init_weights.load_into(method, init_weights.with_sha256(run, None, resumes=False))


READERS: dict[str, Callable[[Path], object]] = {
    "read": read,
    "init.weights": start_from,
    "evaluate": lambda run_dir: load_networks(
        [run_dir], pools=("mean",), image_size=None, seed=0, device=CPU, precision="fp32"
    ),
    "load_encoder": load_encoder,
}


def lose_a_block(content: bytearray, at: int) -> None:
    content[at : at + 4096] = bytes(4096)


def flip_the_lowest_bit(content: bytearray, at: int) -> None:
    content[at] ^= 1


@pytest.mark.parametrize("harm", [lose_a_block, flip_the_lowest_bit])
@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_shard_is_named(reader: str, harm: Callable[[bytearray, int], None], tmp_path: Path) -> None:
    """In the middle of the file, whose size stays, and at its end, where the optimiser's state or a table lies."""
    folder, _ = saved_run(tmp_path / "run", "mae")
    READERS[reader](folder)
    (shard,) = (folder / "checkpoints" / "step-00000007").glob("shard-*")
    whole = shard.read_bytes()
    for at in (len(whole) // 2, len(whole) - 40):
        content = bytearray(whole)
        harm(content, at)
        shard.write_bytes(content[: len(whole)])
        with pytest.raises(
            UserError, match=f"{shard.name}: sha256 differs from the manifest; take an older checkpoint"
        ):
            READERS[reader](folder)
    shard.write_bytes(whole)
    READERS[reader](folder)


@pytest.mark.parametrize("to", ["mimscale", "student", "timm", "huggingface", "state"])
def test_nothing_is_converted(to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = saved_run(tmp_path / "run", "mae")
    (shard,) = (folder / "checkpoints" / "step-00000007").glob("shard-*")
    content = bytearray(shard.read_bytes())
    content[-5000] ^= 0x40
    shard.write_bytes(content)
    error = refused([str(folder), str(tmp_path / "out.safetensors"), "--to", to], capsys)
    assert f"{shard.name}: sha256 differs" in error
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
