"""Ranks that were not given the same end before the first step, with one line that names what differs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_prep.__main__ import main as data_prep
from mimscale.checkpoint.run_folder import source_digest
from mimscale.config.deepspeed import load_ds_config
from mimscale.distributed.same_ranks import difference
from tests import ranks

CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "seed and lr": (
        {"words": ["seed=3"]},
        {"words": ["seed=4", "schedule.base_lr=0.1"]},
        "seed: 3 on rank 0 (…), 4 on rank 1 (…); schedule.base_lr: 0.016 on rank 0 (…), 0.1 on rank 1 (…); give",
    ),
    "steps": ({"words": []}, {"words": ["schedule.steps=10"]}, "schedule.steps: 12 on rank 0 (…), 10 on rank 1 (…)"),
    "log": ({"words": ["log.every=2"]}, {"words": []}, "log.every: 2 on rank 0 (…), 1 on rank 1 (…)"),
    "method": (
        {"words": []},
        {"words": ["method.masking.ratio=0.5"]},
        "method.masking.ratio: 0.75 on rank 0 (…), 0.5 on rank 1 (…)",
    ),
    "content of one file": (
        {"words": ["engine.ds_config=my.json"]},
        {"words": ["engine.ds_config=my.json"]},
        "engine.ds_config: zero_optimization: stage: 1 on rank 0 (…), 2 on rank 1 (…)",
    ),
    "data": ({"words": ["data.shards=a"]}, {"words": ["data.shards=a"]}, "data: … on rank 0 (…), … on rank 1 (…)"),
    "versions": ({"words": []}, {"words": [], "package": "0.0.1"}, "timm: … on rank 0 (…), 0.0.1 on rank 1 (…)"),
    "folder": ({"words": []}, {"words": ["--run-dir", "other"]}, "--run-dir: run on rank 0 (…), other on rank 1 (…)"),
    "not shared": ({"words": []}, {"words": []}, "--run-dir run is not shared: rank 1 on … does not see in …"),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> dict[str, list[dict[str, Any]]]:
    """case -> what each of two ranks did."""
    root = tmp_path_factory.mktemp("apart")
    recipe = ranks.recipe(root, shards)
    cases = []
    for name, (*both, _) in CASES.items():
        case = []
        for rank, given in enumerate(both):
            folder = root / name / (f"node{rank}" if name in ("content of one file", "data", "not shared") else "")
            words = ["train", str(recipe), "--run-dir", "run", *given["words"]]
            case.append({**given, "words": words, "folder": str(folder)})
        cases.append(case)
    for rank in (0, 1):
        values = {**load_ds_config("cpu_zero2_fp32"), "zero_optimization": {"stage": rank + 1}}
        folder = root / "content of one file" / f"node{rank}"
        folder.mkdir(parents=True)
        (folder / "my.json").write_text(json.dumps(values))
        target = root / "data" / f"node{rank}" / "a"
        if rank == 0:
            shutil.copytree(shards, target)
        else:
            words = ["folder", str(shards.parent / "images"), str(target), "--shard-samples", "16", "--seed", "9"]
            assert data_prep(words) == 0
    found = {}
    for name, case in zip(CASES, cases, strict=True):
        path = root / f"{name}.json"
        path.write_text(json.dumps(case))
        ranks.run(2, "tests.training.ranks_apart", path)
        found[name] = [json.loads(Path(f"{path}.{rank}").read_text()) for rank in (0, 1)]
    return found


@pytest.mark.multi
@pytest.mark.parametrize("name", CASES)
def test_one_line_names_it(name: str, outcomes: dict[str, list[dict[str, Any]]]) -> None:
    first, second = outcomes[name]
    assert first["code"] == second["code"] == 2
    lines = [line for line in first["stderr"].splitlines() if line.startswith("mimscale train: ")]
    assert len(lines) == 1 and "mimscale train" not in second["stderr"], (first, second)
    place = 0
    for part in CASES[name][2].split("…"):
        assert part in lines[0][place:], lines[0]
        place = lines[0].index(part, place) + len(part)
    assert "step 1/" not in first["stderr"]


def test_the_line_is_short() -> None:
    same = {f"key{number}": "1" for number in range(9)}
    other = dict.fromkeys(same, "2")
    line = difference([("a", same), ("a", same), ("b", other)])
    assert line.startswith("the ranks of this launch differ: key0: 1 on rank 0 (a), 2 on rank 2 (b); key1: ")
    assert "; and 6 more; give all the same command" in line
    assert "key9: absent on rank 0 (a), 3 on rank 1 (b)" in difference([("a", same), ("b", {**same, "key9": "3"})])


def test_the_code_has_a_name() -> None:
    assert source_digest() == source_digest() and len(source_digest()) == 64
