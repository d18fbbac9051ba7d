"""Protocols that are files of their own: found without an edit, and run through the command line."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mimscale.__main__ import main
from mimscale.data.synthetic import make_image_folder
from mimscale.evals import protocols
from mimscale.evals.runner import protocol_class, protocol_names
from tests.evals.conftest import shards

MAJORITY = '''
from typing import Literal

from pydantic import Field

from mimscale.config.base import Strict
from mimscale.evals.protocols.base import Protocol


class MajorityConfig(Strict):
    wanted: Literal["most", "least"] = Field("most", description="100 %% or none of the training samples")
    min_samples: int | None = Field(None, description="refuse fewer")


class Majority(Protocol):
    """the most frequent training label, whatever the features"""

    Config = MajorityConfig
    metrics = {"majority": "{wanted} frequent"}
    constants = {"features_used": 0}

    def run(self, train, val):
        counts = train.labels.bincount(minlength=self.context.classes)
        label = counts.argmax() if self.config.wanted == "most" else counts.argmin()
        right = 100 * (val.labels == label).float().mean()
        shape = [list(train.values.shape), list(val.values.shape)]
        return {"majority": float(right), "majority_sd": 1.5, "shape": shape, "warnings": ["features do not matter"]}
'''.replace("%%", "%")

SPREAD = '''
from mimscale.config.base import Strict
from mimscale.evals.protocols.base import Protocol


class SpreadConfig(Strict):
    pass


class Spread(Protocol):
    """deviation of the patch tokens; needs no labels"""

    Config = SpreadConfig
    needs = frozenset({NEEDS})
    blocks = 3
    metrics = {"train": "train", "val": "val"}
    unit = "standard deviation"

    def run(self, train, val):
        return {
            "train": float(train.values.std()),
            "val": float(val.values.std()),
            "shape": list(train.values.shape),
            "labels": sorted(set(train.labels.tolist())),
        }
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose files count as protocols."""
    place = tmp_path / "protocols"
    place.mkdir()
    monkeypatch.setattr(protocols, "__path__", [*protocols.__path__, str(place)])
    before = set(sys.modules)
    yield place
    for name in set(sys.modules) - before:
        if name.startswith(protocols.__name__):
            del sys.modules[name]


def test_every_protocol_names_its_source_and_what_it_reports() -> None:
    assert {"knn", "linear", "lowshot"} <= set(protocol_names())
    for name in protocol_names():
        kind = protocol_class(name)
        assert "Source: " in str(kind.__doc__) and re.search(r"\b(arXiv|doi)\b", str(kind.__doc__))
        assert kind.metrics and len(kind.needs & {"pooled", "tokens", "blocks"}) == 1
        assert all(field.description for field in kind.Config.model_fields.values())


def test_a_new_file_is_a_protocol(
    data: tuple[Path, Path], run_dir: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    built_in = protocol_names()
    (folder / "majority.py").write_text(MAJORITY)
    assert protocol_names() == sorted([*built_in, "majority"])
    for words, expected in ((["majority", "--help"], "--wanted {most,least}"), (["--help"], "the most frequent train")):
        with pytest.raises(SystemExit):
            main(["evaluate", *words])
        assert expected in capsys.readouterr().out
    out = tmp_path / "majority.json"
    words = [str(run_dir), "--train", str(data[0]), "--val", str(data[1]), "--workers", "0", "--device", "cpu"]
    words += [
        "--baselines",
        "--no-cache",
        "--pool",
        "mean",
        "cls",
        "--wanted",
        "least",
        "--min-samples",
        "7",
        "--out",
        str(out),
    ]
    assert main(["evaluate", "majority", *words]) == 0
    report = json.loads(out.read_text())
    options = {key: report["protocol"][key] for key in ("name", "wanted", "min_samples", "features_used")}
    assert options == {"name": "majority", "wanted": "least", "min_samples": 7, "features_used": 0}
    assert [row["shape"] for row in report["rows"]] == [
        [[120, 3072], [45, 3072]], *[[[120, 32], [45, 32]]] * 4
    ]  # fmt: skip
    assert all(row["majority"] == pytest.approx(100 / 3) for row in report["rows"])
    captured = capsys.readouterr()
    assert "33.3 ± 1.5" in captured.out and "least frequent" in captured.out
    assert "warning: mae, cls: features do not matter" in captured.err
    assert main(["evaluate", "majority", *words, "--min-samples", "few"]) == 2
    assert "--min-samples few: input should be a valid integer" in capsys.readouterr().err


def test_the_example_of_the_documentation_runs(
    data: tuple[Path, Path], run_dir: Path, folder: Path, tmp_path: Path
) -> None:
    text = (Path(__file__).parents[3] / "docs" / "evaluation.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (folder / "mean.py").write_text(code)
    words = [str(run_dir), "--train", str(data[0]), "--val", str(data[1]), "--workers", "0", "--device", "cpu"]
    for metric in ("cosine", "l2"):
        out = tmp_path / f"{metric}.json"
        assert main(["evaluate", "mean", *words, "--metric", metric, "--baselines", "--out", str(out)]) == 0
        raw = json.loads(out.read_text())["rows"][0]
        assert raw["network"] == "raw pixels" and raw["mean"] > 100 / 3  # the class decides the hue


@pytest.mark.parametrize(
    ("needs", "shapes"),
    [("tokens", ([10, 1024, 3], [10, 16, 32])), ("blocks", ([10, 1, 1, 3072], [10, 2, 2, 32]))],
)
def test_a_protocol_may_take_tokens_or_blocks_and_no_labels(
    run_dir: Path, folder: Path, tmp_path: Path, needs: str, shapes: tuple[list[int], list[int]]
) -> None:
    (folder / "spread.py").write_text(SPREAD.replace("NEEDS", f'"{needs}"'))
    sets = []
    for name, seed in (("train", 0), ("val", 1)):
        images = make_image_folder(tmp_path / f"{name}-images", classes=2, per_class=5, side=32, seed=seed)
        sets.append(str(shards(images, tmp_path / name, labelled=False)))
    out = tmp_path / "spread.json"
    words = [str(run_dir), "--train", sets[0], "--val", sets[1], "--workers", "0", "--device", "cpu", "--batch", "4"]
    assert main(["evaluate", "spread", *words, "--baselines", "--no-cache", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert [(row["network"], row["pool"]) for row in report["rows"]] == [
        ("raw pixels", "pixels"), ("random init", needs), ("mae", needs)
    ]  # fmt: skip
    assert (report["rows"][0]["shape"], report["rows"][2]["shape"]) == shapes
    assert all(row["labels"] == [-1] and row["train"] > 0 for row in report["rows"])
    assert report["unit"] == "standard deviation"
