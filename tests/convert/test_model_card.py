"""The model card says what the run left behind, and nothing of the machine that it was made on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mimscale.__main__ import main
from mimscale.checkpoint import format as checkpoint
from tests.convert.runs import DATA, build, save_run


def report(protocol: str, source: dict[str, Any], **values: float) -> str:
    """As `mimscale evaluate` writes it."""
    row = {"network": "run", "pool": "mean", **source, **values}
    return json.dumps(
        {
            "protocol": {"name": protocol, "k": 20, "differs_from_paper": ["k = 20"]},
            "metrics": dict.fromkeys(values, "percent"),
            "val": {"fingerprint": "e" * 64},
            "rows": [row],
        }
    )


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run that goes on: its newest checkpoint was evaluated, and an older one; its recipe names places."""
    method, run = build("maskalign")
    values = run.dump()
    values["data"]["shards"] = "/home/somebody/secret-data"
    values["teachers"]["t"] |= {"weights": "/home/somebody/teacher.pth", "sha256": "a" * 64}
    values["expected"] = {"knn": {"value": 71.5, "source": "a | paper"}}
    folder = save_run(tmp_path / "run", method, type(run).model_validate(values))
    newest = checkpoint.sha256(folder / "checkpoints" / "step-00000007" / "manifest.json")
    (folder / "eval").mkdir()
    source = {"source": "run", "step": 7, "sha256": newest}
    (folder / "eval" / "knn.json").write_text(report("knn", source, knn=70.25))
    (folder / "eval" / "old.json").write_text(report("linear", {**source, "step": 3, "sha256": "0" * 64}, linear=60.0))
    (folder / "eval" / "broken.json").write_text("{")
    return folder


def card_of(source: Path, out: Path, *words: str) -> tuple[dict[str, Any], str]:
    """Header and text."""
    assert main(["convert", str(source), str(out), *(words or ("--to", "huggingface"))]) == 0
    _, header, text = (out / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(header), text


def test_the_card_of_a_run(run_dir: Path, tmp_path: Path) -> None:
    header, text = card_of(run_dir, tmp_path / "model")
    assert header == {
        "library_name": "transformers",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["mimscale", "masked-image-modeling", "maskalign"],
    }
    for words in (
        "# model\n",
        "Method: MaskAlign",
        "transformers.ViTModel.from_pretrained('PATH', add_pooling_layer=False)",
        "| knn | knn | 70.2 | mean | these | not as published: k = 20; k = 20 | eeeeeeeeeeee |",
        "| linear | linear | 60.0 | mean | other (step 3) |",
        "Left out, because it is no report: eval/broken.json",
        "- knn: 71.5 % (a \\| paper)",
        f"fingerprint of content and order: `{DATA}`",
        "checkpoint of step 7 of a run of 4 steps, which was not known to be its last one",
        "method.adaptor: mlp",
        "- weights: to be filled in",
        "Filled in: a last norm of weight 1 and bias 0",
        "from run/checkpoints/step-00000007",
    ):
        assert words in text, words
    (run_dir / "done").write_text("7\n")
    assert "a run of 4 steps, its last one" in card_of(run_dir, tmp_path / "ended")[1]


def test_it_does_not_say_where_it_was_made(run_dir: Path, tmp_path: Path) -> None:
    for to in ("huggingface", "timm"):
        card_of(run_dir, tmp_path / to, "--to", to)
        for path in (tmp_path / to).iterdir():
            content = path.read_bytes()
            assert b"somebody" not in content and str(tmp_path).encode() not in content, path
            assert path.stat().st_mode == (tmp_path / to / "config.json").stat().st_mode


def test_the_card_of_a_file_without_a_recipe(tmp_path: Path) -> None:
    method, _ = build("mae")
    state = {name.removeprefix("student."): t for name, t in method.state_dict().items() if name.startswith("student.")}
    torch.save({"model": state}, tmp_path / "official.pth")
    header, text = card_of(tmp_path / "official.pth", tmp_path / "out", "--to", "timm", "--heads", "2")
    assert header["library_name"] == "timm" and "timm.create_model('local-dir:PATH', pretrained=True)" in text
    assert "No report of `mimscale evaluate` was found" in text and "- recipe: unknown" in text
    assert "from official.pth" in text


def test_a_classifiers_card(tmp_path: Path) -> None:
    method, run = build("finetune")
    folder = save_run(tmp_path / "run", method, run)
    header, text = card_of(folder, tmp_path / "out", "--to", "huggingface", "--with-head")
    assert header["pipeline_tag"] == "image-classification" and "BeitForImageClassification" in text
    assert "Left out: the bias of the keys, which changes no output (BEiT has none)." in text


def test_the_name_of_a_folder_is_no_markup(tmp_path: Path) -> None:
    method, run = build("mae")
    folder = save_run(tmp_path / "run", method, run)
    _, text = card_of(folder, tmp_path / "a\n# b <script>")
    assert "# a # b &lt;script>" in text and "\n# b" not in text
    header, text = card_of(folder, tmp_path / "x\n---\nlicense: mit [a](b) `c` ![d](e) &lt;", "--to", "timm")
    assert header.keys() == {"library_name", "pipeline_tag", "tags"}
    assert text.startswith("\n# x --- license: mit \\[a\\](b) \\`c\\` !\\[d\\](e) &amp;lt;\n")
