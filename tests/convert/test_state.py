"""The full state of a run as plain files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mimscale.__main__ import main
from mimscale.checkpoint import format as checkpoint
from mimscale.convert.names import same
from mimscale.convert.networks import student_from
from tests.convert.runs import IMAGES, refused, saved_run


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    saved_run(tmp_path / "run", "maskalign")
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "state"), "--to", "state"]) == 0
    return tmp_path / "state"


def test_plain_tensors_under_plain_names(exported: Path, tmp_path: Path) -> None:
    reader = checkpoint.CheckpointReader(tmp_path / "run" / "checkpoints" / "step-00000007")
    weights = load_file(exported / "weights.safetensors")
    assert same(weights, checkpoint.load_weights(reader.path)) and "student.pos_embed" in weights
    for kind in ("exp_avg", "exp_avg_sq"):
        assert same(load_file(exported / f"{kind}.safetensors"), {n: reader.full(kind, n) for n in reader.names(kind)})
    table = load_file(exported / "table.safetensors")["masking"]
    assert torch.equal(table, torch.arange(50, dtype=torch.uint8))
    about = json.loads((exported / "state.json").read_text())
    assert about["checkpoint"]["step"] == 7 and about["config"]["method"]["name"] == "maskalign"
    assert about["files"]["exp_avg"]["sha256"] == checkpoint.sha256(exported / "exp_avg.safetensors")
    assert 0 <= about["differences"]["encoder"] < about["limit"]
    student, info = student_from(exported / "weights.safetensors")  # the one file alone is a checkpoint, too
    expected, _ = student_from(tmp_path / "run")
    assert info.method == "maskalign" and torch.equal(student(IMAGES).tokens, expected(IMAGES).tokens)


def test_back_into_a_run_folder(exported: Path, tmp_path: Path) -> None:
    assert main(["convert", str(exported), str(tmp_path / "again"), "--to", "run"]) == 0
    first, again = (
        checkpoint.CheckpointReader(tmp_path / n / "checkpoints" / "step-00000007") for n in ("run", "again")
    )
    again.verify()
    assert first.kinds() == again.kinds()
    for kind in first.kinds():
        assert sorted(first.names(kind)) == sorted(again.names(kind))
        assert all(torch.equal(first.full(kind, name), again.full(kind, name)) for name in first.names(kind))
    assert (tmp_path / "run" / "config.yaml").read_text() == (tmp_path / "again" / "config.yaml").read_text()


def test_a_damaged_folder_is_one_line_and_leaves_nothing(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def copied(name: str) -> Path:
        return Path(shutil.copytree(exported, tmp_path / name))

    flipped = copied("flipped")
    data = bytearray((flipped / "exp_avg.safetensors").read_bytes())
    data[-1] ^= 1
    (flipped / "exp_avg.safetensors").write_bytes(data)
    absent = copied("absent")
    (absent / "exp_avg_sq.safetensors").unlink()
    future = copied("future")
    about = json.loads((future / "state.json").read_text())
    (future / "state.json").write_text(json.dumps({**about, "format": 99}))
    torn = copied("torn")
    (torn / "state.json").write_text((torn / "state.json").read_text()[:-20])
    for folder, line in (
        (flipped, "is not the file that state.json names (sha256 differs)"),
        (absent, "exp_avg_sq.safetensors is missing"),
        (future, "has format 99"),
        (torn, "is not JSON"),
    ):
        assert line in refused([str(folder), str(tmp_path / "out"), "--to", "run"], capsys)
    assert not list(tmp_path.glob("*out*"))
    assert "exists; choose another name" in refused([str(exported), str(tmp_path / "torn"), "--to", "run"], capsys)
