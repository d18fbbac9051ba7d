"""`mimscale doctor`: the machine, a recipe, what is missing and how it is fetched."""

from __future__ import annotations

import hashlib
import http.server
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import timm
import yaml
from safetensors.torch import save_file

from data_prep.folder import read_folder
from data_prep.plan import ShardPlan
from data_prep.write_shards import unfinished, write
from mimscale.__main__ import main
from mimscale.config.recipes import load_recipe
from mimscale.data.synthetic import make_image_folder
from mimscale.doctor import cli

MODEL = "vit_tiny_patch16_224.augreg_in21k"
REPO = f"timm/{MODEL}"
TINY: dict[str, Any] = {"embed_dim": 32, "depth": 3, "num_heads": 4}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images in 3 shards."""
    base = tmp_path_factory.mktemp("data")
    plan = ShardPlan(read_folder(make_image_folder(base / "images", classes=2, per_class=12, side=32), labelled=True),
                seed=0, shard_mb=256, shard_samples=8)  # fmt: skip
    assert not write(plan, base / "shards", unfinished(plan, base / "shards"))
    return base / "shards"


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_file(timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, **TINY).state_dict(), path)
    return path


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def recipe(tmp_path: Path, shards: Path, **teacher: Any) -> str:
    """A MaskAlign run on 32-px images with one timm teacher."""
    values = {
        "data": {"shards": str(shards), "image_size": 32},
        "student": {"width": 32, "depth": 3, "heads": 4},
        "method": {"name": "maskalign", "masking": {"ratio": 0.5}, "levels": "top2"},
        "teachers": {"tiny": {"library": "timm", "model": MODEL, "options": TINY, **teacher}},
        "schedule": {"global_batch": 8, "epochs": 1, "base_lr": 1e-3},
        "engine": {"ds_config": "cpu_zero2_fp32", "device": "cpu", "max_micro_batch": 4},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for package in ("torch", "deepspeed", "timm", "open_clip_torch"):
        assert re.search(rf"{package} +│ {re.escape(version(package))} ", out)
    for row in ("python", "CPU", "SLURM", "image decoder", "free disk"):
        assert row in out


def test_a_ready_recipe(tmp_path: Path, shards: Path, teacher_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digest = hashlib.sha256(teacher_file.read_bytes()).hexdigest()
    assert main(["doctor", recipe(tmp_path, shards, weights=str(teacher_file), sha256=digest)]) == 0
    out, err = capsys.readouterr()
    assert not err
    for fact in ("maskalign", "32 wide, 3 blocks, 4 heads, patch 16, 2x2 at 32 px", "ZeRO stage 2, fp32",
                 "32 wide, 3 blocks, 2x2 at 32 px, with class token", f"sha256 {digest}",
                 "24 samples in 3 shards, 3 steps per epoch", "4 x 2", "does not divide 8"):  # fmt: skip
        assert fact in out, fact
    assert re.search(r"2 +│ 4 x 1", out) and re.search(r"8 +│ 1 x 1", out)


def test_every_problem_is_one_line(tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Missing weights, missing data and a batch larger than the data, in one run."""
    absent = str(tmp_path / "absent.safetensors")
    arguments = [recipe(tmp_path, shards, weights=absent), "schedule.global_batch=64", "method.levels=top9"]
    assert main(["doctor", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("problem: ") for line in lines)
    assert any("absent.safetensors does not exist; run `mimscale doctor RECIPE --fetch`" in line for line in lines)
    assert any("global_batch = 64 exceeds the 24 samples" in line for line in lines)
    assert any("top9" in line for line in lines)
    assert main(["doctor", *arguments, f"data.shards={tmp_path}"]) == 2
    assert "has no manifest.json" in capsys.readouterr().err


def test_wrong_weights(tmp_path: Path, shards: Path, teacher_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", recipe(tmp_path, shards, weights=str(teacher_file), sha256="0" * 64)]) == 2
    assert re.search("problem: .*sha256 = 0{64}, but .* has [0-9a-f]{64}", capsys.readouterr().err)


def test_starting_weights(tmp_path: Path, shards: Path, teacher_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digest = hashlib.sha256(teacher_file.read_bytes()).hexdigest()
    words = ["doctor", recipe(tmp_path, shards, weights=str(teacher_file))]
    assert main([*words, f"init.weights={teacher_file}"]) == 0
    out = capsys.readouterr().out
    assert "starts from" in out and digest in out
    assert main([*words, f"init.weights={tmp_path}/gone"]) == 2
    assert re.search("problem: .*gone is neither a run folder", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["no_such_recipe"], "recipe 'no_such_recipe' is unknown"),
        (["RECIPE", "student.widht=3"], "unknown key student.widht; did you mean 'width'?"),
        (["--fetch"], "--fetch without a recipe"),
    ],
)
def test_bad_arguments(
    arguments: list[str], line: str, tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [recipe(tmp_path, shards) if word == "RECIPE" else word for word in arguments]
    assert main(["doctor", *words]) == 2
    assert line in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ --fetch


@pytest.fixture
def hub(teacher_file: Path) -> Iterator[str]:
    """A hub on the loopback interface with one open repository and one that asks for a licence."""
    data = teacher_file.read_bytes()

    class Hub(http.server.BaseHTTPRequestHandler):
        def answer(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            if self.path == f"/{REPO}/resolve/main/model.safetensors":
                etag = f'"{hashlib.sha256(data).hexdigest()}"'
                self.answer(200, data, ETag=etag, X_Repo_Commit="a" * 40)
            elif self.path.startswith("/timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k/"):
                self.answer(403, b"", X_Error_Code="GatedRepo", X_Error_Message="accept the licence")
            else:
                self.answer(404, b"", X_Error_Code="EntryNotFound")

        do_HEAD = do_GET

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def doctor(folder: Path, endpoint: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in its own process, because the hub's address is read when its library is imported."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home")}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-m", "mimscale", "doctor", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_fetch_downloads_and_prints_lines_to_paste(tmp_path: Path, shards: Path, teacher_file: Path, hub: str) -> None:
    config = recipe(tmp_path, shards)
    first = doctor(tmp_path, hub, config, "--fetch")
    assert first.returncode == 0, first.stderr
    pasted = [line for line in first.stdout.splitlines() if line.startswith("teachers.tiny.weights=")]
    assert len(pasted) == 1
    weights, digest = pasted[0].split()
    path = Path(weights.partition("=")[2])
    assert path.is_absolute() and path.parent == tmp_path / "teachers" / REPO.replace("/", "--")
    assert path.read_bytes() == teacher_file.read_bytes()
    assert digest == f"teachers.tiny.sha256={hashlib.sha256(path.read_bytes()).hexdigest()}"
    assert main(["doctor", config, weights, digest]) == 0


def test_fetch_does_not_guess(tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file of one's own making is not on a hub."""
    own = recipe(tmp_path, shards, weights=str(tmp_path / "own.safetensors"), model="vit_tiny_patch16_224")
    assert main(["doctor", own, "--fetch", "--fetch-dir", str(tmp_path / "fetched")]) == 2
    assert "own.safetensors does not exist; copy it there" in capsys.readouterr().err
    assert not (tmp_path / "fetched").exists()


def test_fetch_that_is_refused(tmp_path: Path, shards: Path, hub: str) -> None:
    result = doctor(tmp_path, hub, recipe(tmp_path, shards), "teachers.tiny.pretrained=augreg_in21k_ft_in1k", "--fetch")
    assert result.returncode == 2
    problems = [line for line in result.stderr.splitlines() if line.startswith("problem: ")]
    assert len(problems) == 1 and "cannot download timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k" in problems[0]
    assert "Traceback" not in result.stderr


@pytest.mark.slow  # the hub's library tries again for half a minute
def test_fetch_without_network(tmp_path: Path, shards: Path) -> None:
    result = doctor(tmp_path, "http://127.0.0.1:9", recipe(tmp_path, shards), "--fetch")
    assert result.returncode == 2
    problems = [line for line in result.stderr.splitlines() if line.startswith("problem: ")]
    assert len(problems) == 1 and "from http://127.0.0.1:9" in problems[0] and "copy the file here" in problems[0]
    assert "Traceback" not in result.stderr


def test_a_frozen_encoder_has_its_own_precision() -> None:
    report = cli.Report()
    cli.check_recipe(load_recipe("mae_vit_b16_linear", ["init=null"]), report)
    assert ("", "its frozen encoder computes in bf16") in report.rows and not report.problems
