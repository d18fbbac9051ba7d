"""A run on damaged shards: it goes on with substitutes until there are too many."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mimscale.checkpoint import format as checkpoint
from mimscale.data.manifest import Manifest
from tests import ranks

pytestmark = [pytest.mark.multi, pytest.mark.slow]


def test_a_damaged_run_goes_on_and_stops_at_its_limit(shards: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(shards, tmp_path / "shards"))
    manifest = Manifest.load(folder)
    for sample in (3, 40, 41, 77):
        with open(manifest.shard_paths[int(manifest.locate(sample)[0])], "r+b") as file:
            file.seek(int(manifest.offsets[sample]))
            file.write(bytes(100))
    recipe = ranks.recipe(tmp_path, folder)

    ranks.train(2, recipe, tmp_path / "two")
    listed = (tmp_path / "two" / "damaged.jsonl").read_text().splitlines()
    assert len(listed) == 4 == max(ranks.curve(tmp_path / "two", "damaged").values())
    assert all(manifest.key(sample) in "".join(listed) for sample in (3, 40, 41, 77))

    changes = ("data.max_damaged=0", "log.every=100")  # what a checkpoint leaves behind is listed before it is written
    limited = ("mimscale", "train", recipe, *changes, "--run-dir", tmp_path / "limited")
    done = ranks.run(1, *limited, check=False)
    assert done.returncode == 4 and "data.max_damaged allows 0" in done.stderr
    stopped = checkpoint.newest(tmp_path / "limited")
    assert stopped is not None and checkpoint.step_of(stopped) < 12 and not (tmp_path / "limited" / "done").exists()
    again = ranks.run(1, *limited, check=False)
    assert again.returncode == 2 and "raise data.max_damaged" in again.stderr


def test_damage_behind_a_valid_header(shards: Path, tmp_path: Path) -> None:
    """With jittered colours, and JPEGs that lost their tables: stopped and resumed, the same run and list."""
    folder = Path(shutil.copytree(shards, tmp_path / "shards"))
    manifest = Manifest.load(folder)
    for sample in (5, 41):
        without_tables = manifest.read(sample).replace(b"\xff\xdb", b"\xff\xfe")
        with open(manifest.shard_paths[int(manifest.locate(sample)[0])], "r+b") as file:
            file.seek(int(manifest.offsets[sample]))
            file.write(without_tables)
    data = {"colour_jitter": [0.4, 0.4, 0.4]}
    recipe = ranks.recipe(tmp_path, folder, data=data)
    ranks.train(2, recipe, tmp_path / "whole")
    ranks.cut_back(tmp_path / "whole", tmp_path / "resumed", 4)
    (tmp_path / "resumed" / "damaged.jsonl").unlink()
    ranks.train(2, recipe, tmp_path / "resumed")
    assert ranks.identical(tmp_path / "resumed", tmp_path / "whole")
    assert ranks.curve(tmp_path / "resumed") == ranks.curve(tmp_path / "whole")
    for run in ("whole", "resumed"):  # of which eight steps are more than an epoch
        listed = (tmp_path / run / "damaged.jsonl").read_text()
        assert len(listed.splitlines()) == 2 and all(manifest.key(sample) in listed for sample in (5, 41))
