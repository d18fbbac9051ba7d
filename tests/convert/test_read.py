"""Files that are damaged, hostile or of another kind get one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mimscale.__main__ import main
from mimscale.checkpoint import format as checkpoint
from mimscale.convert.read import read
from mimscale.errors import UserError
from tests.convert.runs import refused, saved_run


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="cannot be read as a torch checkpoint"):
        read(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_truncated_file(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, tensors = tmp_path / f"weights{suffix}", {"blocks.0.weight": torch.zeros(1000)}
    if suffix == ".pth":
        torch.save({"model": tensors}, path)
    else:
        save_file(tensors, path)
    path.write_bytes(path.read_bytes()[:-1000])
    out = tmp_path / "out.safetensors"
    message = refused([str(path), str(out), "--to", "timm"], capsys)
    assert ("cannot be read as a torch checkpoint" if suffix == ".pth" else "not a whole safetensors file") in message


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("not a checkpoint")
    with pytest.raises(UserError, match="cannot be read as a torch checkpoint"):
        read(tmp_path / "text.pth")
    (tmp_path / "empty.pth").touch()
    with pytest.raises(UserError, match="cannot be read as a torch checkpoint"):
        read(tmp_path / "empty.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="holds no tensors under names"):
        read(tmp_path / "list.pth")


@pytest.mark.parametrize("to", ["timm", "state"])
def test_a_truncated_checkpoint(to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = saved_run(tmp_path / "run", "mae")
    shard = next((folder / "checkpoints" / "step-00000007").glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-8])
    message = refused([str(folder), str(tmp_path / "out.safetensors"), "--to", to], capsys)
    assert "take an older checkpoint" in message and shard.name in message
    assert not list(tmp_path.glob("*out*"))


def test_a_checkpoint_that_its_run_removes_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """keep-last-k of a run that goes on: the newer one is read; one that was named itself is one clear line."""
    run_dir, method = saved_run(tmp_path / "run", "mae")
    old, new = (checkpoint.step_folder(run_dir / "checkpoints", step) for step in (7, 8))
    shutil.copytree(old, tmp_path / "kept")
    full = checkpoint.CheckpointReader.full

    def removed_meanwhile(self: checkpoint.CheckpointReader, kind: str, name: str) -> torch.Tensor:
        if self.path == old and old.exists():
            shutil.copytree(old, new)
            checkpoint.remove(old)
        return full(self, kind, name)

    monkeypatch.setattr(checkpoint.CheckpointReader, "full", removed_meanwhile)
    loaded = read(run_dir)
    assert loaded.path == new
    assert all(torch.equal(loaded.weights[name], tensor) for name, tensor in method.state_dict().items())
    assert f"{old} was removed by its run while it was read; reading {new}" in capsys.readouterr().err
    shutil.rmtree(new)
    shutil.copytree(tmp_path / "kept", old)
    with pytest.raises(UserError, match="was removed while it was read; name its run folder, or keep it"):
        read(old)
    shutil.rmtree(new)
    shutil.copytree(tmp_path / "kept", old)
    main(["convert", str(run_dir), str(tmp_path / "state"), "--to", "state"])
    assert json.loads((tmp_path / "state" / "state.json").read_text())["source"] == str(new)


@pytest.mark.parametrize(
    ("name", "tensor", "text"),
    [
        ("blocks.0.mlp.fc1.weight", torch.zeros(()), "blocks.0.mlp.fc1.weight has the shape []"),
        ("patch_embed.proj.weight", torch.zeros(32, 3), "patch_embed.proj.weight has the shape [32, 3]"),
        ("pos_embed", torch.zeros(17, 32), "pos_embed has the shape [17, 32], where a ViT has 3 dimensions"),
        ("pos_embed", torch.zeros(1, 0, 32), "pos_embed has the shape [1, 0, 32]"),
        ("cls_token", torch.zeros(1, 1, 32, dtype=torch.complex64), "cls_token in complex numbers (1 such tensors)"),
    ],
)
def test_tensors_of_odd_shapes_and_types_are_one_line(
    name: str, tensor: torch.Tensor, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = saved_run(tmp_path / "run", "mae")
    assert main(["convert", str(folder), str(tmp_path / "a.safetensors"), "--to", "official"]) == 0
    state = load_file(tmp_path / "a.safetensors")
    assert name in state
    save_file({**state, name: tensor}, tmp_path / "odd.safetensors")
    capsys.readouterr()
    words = [str(tmp_path / "odd.safetensors"), str(tmp_path / "b.safetensors"), "--to", "student", "--heads", "2"]
    assert main(["convert", *words]) == 2
    said = capsys.readouterr().err
    assert text in said and len(said.strip().splitlines()) == 1 and not (tmp_path / "b.safetensors").exists()
