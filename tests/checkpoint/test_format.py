"""Checkpoint files: any cut can be read by any other cut, and what is damaged or half-written is not read at all."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from mimscale.checkpoint import format as checkpoint
from mimscale.checkpoint.format import CheckpointError, CheckpointReader
from mimscale.errors import UserError
from tests.checkpoint.shards import write_shard


def write(root: Path, step: int, numbers: torch.Tensor, cuts: list[int], **meta: object) -> Path:
    """A checkpoint of one parameter "w" cut at `cuts` over as many files as there are pieces."""
    edges = [0, *cuts, len(numbers)]
    world = len(edges) - 1
    temporary = root / f".tmp-step-{step}"
    shards = [
        write_shard(temporary, {f"fp32|w|{a}": numbers[a:b]}, rank, world)
        for rank, (a, b) in enumerate(zip(edges, edges[1:], strict=False))
    ]
    final = checkpoint.step_folder(root, step)
    checkpoint.commit(temporary, final, shards, {"shapes": {"w": [len(numbers)]}, **meta})
    return final


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 400), st.data())
def test_any_cut_reads_any_other(tmp_path_factory: pytest.TempPathFactory, n: int, data: st.DataObject) -> None:
    numbers = torch.arange(n, dtype=torch.float32)
    cuts = st.lists(st.integers(1, n - 1), unique=True, max_size=6).map(sorted)
    path = write(tmp_path_factory.mktemp("cut"), 1, numbers, data.draw(cuts))
    reader = CheckpointReader(path)
    edges = [0, *data.draw(cuts), n]
    for start, end in zip(edges, edges[1:], strict=False):
        target = torch.full((end - start,), -1.0)
        reader.into("fp32", "w", start, target)
        assert torch.equal(target, numbers[start:end])
    assert torch.equal(reader.full("fp32", "w"), numbers)


def test_a_reader_can_be_sent_to_a_process_that_never_sees_the_manifest(tmp_path: Path) -> None:
    path = write(tmp_path, 1, torch.arange(10.0), [4])
    reader = CheckpointReader(path)
    assert torch.equal(reader.full("fp32", "w"), torch.arange(10.0))
    (path / "manifest.json").unlink()
    sent = pickle.loads(pickle.dumps(reader))
    sent.verify()
    target = torch.zeros(3)
    sent.into("fp32", "w", 3, target)
    assert target.tolist() == [3, 4, 5] and sent.names("fp32") == ["w"]


def test_a_piece_without_elements_hides_no_other(tmp_path: Path) -> None:
    shards = [
        write_shard(tmp_path / ".tmp", {f"table|t|{start}": torch.arange(start, end)}, rank, 4)
        for rank, (start, end) in enumerate(((0, 3), (3, 3), (3, 5), (5, 5)))
    ]
    checkpoint.commit(tmp_path / ".tmp", tmp_path / "step-00000001", shards, {"shapes": {}})
    reader = CheckpointReader(tmp_path / "step-00000001")
    target = torch.zeros(2, dtype=torch.int64)
    reader.into("table", "t", 3, target)
    assert target.tolist() == [3, 4] and reader.full("table", "t").tolist() == [0, 1, 2, 3, 4]


def test_files_are_plain_safetensors(tmp_path: Path) -> None:
    path = write(tmp_path, 7, torch.arange(10.0), [4])
    files = sorted(path.glob("*.safetensors"))
    assert torch.equal(torch.cat([next(iter(load_file(f).values())) for f in files]), torch.arange(10.0))
    assert json.loads((path / "manifest.json").read_text())["format"] == checkpoint.FORMAT


def sign(path: Path, text: str) -> None:
    """Make a text the manifest that COMPLETE was written for."""
    (path / "manifest.json").write_text(text)
    (path / "COMPLETE").write_text(hashlib.sha256(text.encode()).hexdigest())


def test_a_shard_that_is_not_seen_is_not_committed(tmp_path: Path) -> None:
    """As on two nodes whose folder is not one: what the other rank reports is there, but not here."""
    for change in ("missing", "cut", "a folder"):
        part = tmp_path / f".tmp {change}"
        shards = [write_shard(part, {"fp32|w|0": torch.arange(4.0)}, rank, 2) for rank in (0, 1)]
        path = part / shards[1]["file"]
        content = path.read_bytes()
        path.unlink()
        if change == "cut":
            path.write_bytes(content[:-1])
        elif change == "a folder":
            path.mkdir()
        with pytest.raises(OSError, match="shard-00001-of-00002.* (is not seen|has .* bytes) on .* its rank wrote"):
            checkpoint.commit(part, tmp_path / "step-00000001", shards, {"shapes": {}})
        assert not checkpoint.steps(tmp_path) and not (part / "COMPLETE").exists()


def test_damage_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, 1, torch.arange(1000.0), [500])
    first, second = sorted(path.glob("*.safetensors"))
    whole = second.read_bytes()
    second.write_bytes(whole[:-8])
    with pytest.raises(CheckpointError, match="shard-00001.* bytes, not"):
        CheckpointReader(path)
    flipped = bytearray(whole)
    flipped[-3] ^= 16
    second.write_bytes(flipped)
    CheckpointReader(path).verify(0, 2)  # the other rank's share
    with pytest.raises(CheckpointError, match="shard-00001.*sha256"):
        CheckpointReader(path).verify(1, 2)
    second.unlink()
    with pytest.raises(CheckpointError, match="shard-00001.*missing"):
        CheckpointReader(path)
    second.write_bytes(whole)
    with pytest.raises(CheckpointError, match="found 0 of 3 elements"):
        CheckpointReader(path).into("exp_avg", "w", 0, torch.empty(3))
    manifest = path / "manifest.json"
    text = manifest.read_text()
    sign(path, '{"format": 99}')
    with pytest.raises(UserError, match="format 99; this version of mimscale reads 3"):
        CheckpointReader(path)
    for other in ("{", "5", "[]", "[" * 100_000, '{"format": 3}', '{"format": 3, "shapes": {}, "shards": 7}',
                  '{"format": 3, "shapes": {}, "shards": [{"file": 1}]}'):  # fmt: skip
        sign(path, other)
        with pytest.raises(CheckpointError, match="manifest.json (is no|has no)"):
            CheckpointReader(path)
    sign(path, text)
    for damaged in (text.replace("1000", "1001"), text.replace('"format": 3', '"format": 2'), "{", ""):
        manifest.write_text(damaged)
        with pytest.raises(CheckpointError, match="sha256 differs from COMPLETE"):
            CheckpointReader(path)
    manifest.write_text(text)
    complete = (path / "COMPLETE").read_bytes()
    for bit in (1, 0x80):  # another digit, and no UTF-8
        (path / "COMPLETE").write_bytes(bytes([complete[0] ^ bit]) + complete[1:])
        with pytest.raises(CheckpointError, match="sha256 differs from COMPLETE"):
            CheckpointReader(path)
    (path / "COMPLETE").unlink()
    with pytest.raises(CheckpointError, match="COMPLETE is missing"):
        CheckpointReader(path)


def test_a_manifest_reaches_no_file_outside_its_folder(tmp_path: Path) -> None:
    path = write(tmp_path, 1, torch.arange(4.0), [])
    meta = json.loads((path / "manifest.json").read_text())
    for name in (f"../{path.name}/shard", "/etc/hostname", ".."):
        sign(path, json.dumps({**meta, "shards": [{**meta["shards"][0], "file": name}]}))
        with pytest.raises(UserError, match="outside of its folder"):
            CheckpointReader(path)


def test_half_a_copy_does_not_block_the_step(tmp_path: Path) -> None:
    (tmp_path / "step-00000003").mkdir()
    (tmp_path / "step-00000003" / "shard").touch()
    path = write(tmp_path, 3, torch.arange(4.0), [])
    assert torch.equal(CheckpointReader(path).full("fp32", "w"), torch.arange(4.0))
    assert [p.name[:21] for p in checkpoint.damaged(tmp_path)] == ["damaged-step-00000003"]


def test_newest_keeps_and_prunes(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    assert checkpoint.newest(tmp_path) is None
    for step in (1, 2, 10, 100000000):
        write(root, step, torch.zeros(2), [])
    (root / "step-00000011").mkdir()  # no manifest: not a checkpoint
    (root / ".tmp-step-00000012-abc").mkdir()
    assert checkpoint.newest(tmp_path) == root / "step-100000000"
    checkpoint.prune(root, keep=2, keep_every=2)
    assert [p.name for p in checkpoint.complete(root)] == ["step-00000002", "step-00000010", "step-100000000"]
    checkpoint.prune(root, keep=2)
    assert [p.name for p in checkpoint.complete(root)] == ["step-00000010", "step-100000000"]
    assert json.loads((root / "latest.json").read_text())["folder"] == "step-100000000"
    assert not list(root.glob(".*"))
    checkpoint.set_aside(root / "step-100000000")
    assert checkpoint.newest(tmp_path) == root / "step-00000010"


@pytest.mark.slow
def test_a_kill_while_writing_leaves_the_older_one(tmp_path: Path) -> None:
    """SIGKILL at several moments of a save of 40 MB: what is visible afterwards is whole."""
    script = (
        "import sys, torch; from pathlib import Path; from tests.checkpoint.test_format import write\n"
        "root = Path(sys.argv[1]); write(root, 1, torch.ones(4), []); print('one', flush=True)\n"
        "write(root, 2, torch.full((10_000_000,), 2.0), [3_000_000, 7_000_000]); print('two', flush=True)\n"
    )
    seen = set()
    for moment, delay_s in enumerate((0.0, 0.01, 0.03, 0.06, 0.1, 0.2, 5.0)):
        run_dir = tmp_path / str(moment)
        words = [sys.executable, "-c", script, str(run_dir / "checkpoints")]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stdout.readline() == "one\n"
            time.sleep(delay_s)
            os.kill(process.pid, signal.SIGKILL)
        path = checkpoint.newest(run_dir)
        assert path is not None
        reader = CheckpointReader(path)
        reader.verify()
        assert bool((reader.full("fp32", "w") == reader.meta["shapes"]["w"][0] // 10_000_000 + 1).all())
        seen.add(path.name)
    assert "step-00000001" in seen
