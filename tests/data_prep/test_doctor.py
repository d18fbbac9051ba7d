"""The checks for a job, with fixes that work when they are applied; and the output of info."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import tarfile
from pathlib import Path

import pytest

from data_prep.__main__ import main
from data_prep.doctor import Job, examine
from data_prep.info import describe_set
from mimscale.data.manifest import Manifest
from mimscale.data.synthetic import make_image_folder


def fixes(shards: Path, **job) -> list[str]:
    return [finding.fix for finding in examine(shards, Job(**job)) if finding.fix and "shard-mb" not in finding.fix]


def doctor(shards: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    code = main(["doctor", str(shards), *options])
    return code, capsys.readouterr().out


def test_one_node(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, output = doctor(shards, capsys, "--ranks", "4", "--global-batch", "16")
    assert code == 1 and output.endswith("1 to fix\n")  # these shards are a few kilobytes
    assert re.search(r"FIX  shards of 0\.\d to 0\.\d MiB: below 32 MiB", output) and "--shard-mb 256" in output
    assert "ok   80 samples in 5 shards; all exist" in output and "4 samples per rank, 5 steps per epoch" in output
    assert fixes(shards, ranks=4, global_batch=16, labels=True) == []


def test_a_batch_that_does_not_divide(shards: Path) -> None:
    (fix,) = fixes(shards, ranks=6, global_batch=16)
    assert fix == "schedule.global_batch=12 or 18, or 4 ranks"
    for batch, ranks in ((12, 6), (18, 6), (16, 4)):
        assert fixes(shards, ranks=ranks, global_batch=batch) == []
    assert fixes(shards, ranks=6, global_batch=3) == ["schedule.global_batch=6, or 3 ranks"]


def test_a_batch_larger_than_the_data(shards: Path) -> None:
    (fix,) = fixes(shards, ranks=8, global_batch=160)
    assert "at most 80" in fix


def test_locality(tmp_path: Path) -> None:
    """If the ranks divide the streams, a node reads its own shards only; otherwise many more, which is reported."""
    make_image_folder(tmp_path / "in", classes=1, per_class=480, side=16)
    assert main(["folder", str(tmp_path / "in"), str(tmp_path / "out"), "--shard-samples", "4", "--no-check"]) == 0
    text = {}
    for ranks, streams in ((8, 24), (8, 13), (8, 16)):
        found = examine(tmp_path / "out", Job(ranks, 24, ranks_per_node=1, streams=streams, block=4))
        (text[streams],) = (finding for finding in found if "first of" in finding.text)
    read = {key: int(re.findall(r"reads ([\d,]+)", finding.text)[0]) for key, finding in text.items()}
    assert max(read[24], read[16]) < 30 and not text[24].fix and not text[16].fix
    assert read[13] > 50
    assert text[13].fix == "1 ranks, or data.streams=16, so that every rank has streams of its own"


def test_a_smaller_block_keeps_all_streams(tmp_path: Path) -> None:
    make_image_folder(tmp_path / "in", classes=1, per_class=480, side=16)
    assert main(["folder", str(tmp_path / "in"), str(tmp_path / "out"), "--shard-samples", "4", "--no-check"]) == 0
    job = {"global_batch": 16, "ranks_per_node": 1, "ranks": 16, "streams": 16}
    (fix,) = fixes(tmp_path / "out", block=400, **job)
    assert fix == "data.block=30 keeps all 16 streams"
    assert fixes(tmp_path / "out", block=30, **job) == []


def test_labels_and_checksums(shards: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    file = json.loads((copy / "manifest.json").read_text())
    file["shards"][0]["sha256"] = None
    del file["index"]["labels.npy"]
    (copy / "manifest.json").write_text(json.dumps({**file, "labelled": False, "classes": None}))
    found = fixes(copy, ranks=4, global_batch=16, labels=True)
    assert len(found) == 2 and "with labels" in found[0] and "index" in found[1] and "--checksums" in found[1]
    assert len(fixes(copy, ranks=4, global_batch=16)) == 1
    assert "no labels" in describe_set(copy) and "the shards have no checksums" in describe_set(copy)


@pytest.mark.parametrize("to", [[], ["--to", "links"]])
def test_the_fix_for_checksums_can_be_run(shards: Path, tmp_path: Path, monkeypatch, to: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    for path in shards.glob("*.tar"):
        shutil.copy(path, "in")
    assert main(["index", "in", "--label", "none", *to]) == 0
    (fix,) = fixes(Path(to[-1] if to else "in"), ranks=4, global_batch=16)
    assert main(shlex.split(fix)[3:]) == 0
    fixed = Manifest.load("NEW_FOLDER" if to else "in")
    assert fixed.labels is None and all(shard.sha256 for shard in fixed.file.shards)


def test_empty_classes(shards: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    file = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**file, "classes": [*file["classes"], "nobody"]}))
    assert fixes(copy, ranks=4, global_batch=16, labels=True)[0].startswith("a class without samples")
    assert fixes(copy, ranks=4, global_batch=16) == []
    assert any("1 are empty" in line for line in describe_set(copy))


def test_info(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(shards), "--classes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("80 images in 5 shards")
    assert "4 classes of 20 (class_000) to 20 (class_000) samples (median 20)" in lines
    assert "made with shard_mb 256, shard_samples 16, check True, quality 95" in lines
    assert lines[-4:] == [f"{n} class_{n:03d} 20" for n in range(4)]


def test_a_part_of_imagenet_is_reported(shards: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    file = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**file, "source": {"kind": "imagenet val", "path": "x"}}))
    assert "imagenet val has 50,000 images in 1,000 classes: this is not all of it" in describe_set(copy)


def test_images_behind_the_last_one_of_the_index(shards: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    first, second = (copy / f"shard-00000{n}.tar" for n in range(2))
    first.write_bytes(first.read_bytes() + second.read_bytes())
    file = json.loads((copy / "manifest.json").read_text())
    file["shards"][0]["bytes"] = first.stat().st_size
    (copy / "manifest.json").write_text(json.dumps(file))
    assert "write the index again" in fixes(copy, ranks=4, global_batch=16)


@pytest.mark.parametrize("option", ["--ranks", "--global-batch", "--workers", "--streams", "--block"])
def test_numbers_that_would_be_counted_through_for_ever_are_refused(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"--ranks": "8", "--global-batch": "64", option: str(10**12)}
    with pytest.raises(SystemExit):
        main(["doctor", str(tmp_path), *(word for pair in given.items() for word in pair)])
    assert f"argument {option}: '1000000000000' must be at most 16,777,216" in capsys.readouterr().err


def test_images_that_were_left_out_on_purpose_are_no_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At the end of a shard: without a label, with another extension, or with a dot in the name."""
    jpeg = b"\xff\xd8\xff\xe0 the header only"
    sample = {"0.jpg": jpeg, "0.json": b'{"label": 3.0}'}
    rests: list[tuple[dict[str, bytes], list[str]]] = [
        ({"1.jpg": jpeg, "1.json": b'{"label": null}'}, ["--label", "json:label", "--skip-unlabelled"]),
        ({"1.jpg": jpeg, "1.json": b"{}"}, ["--label", "json:label", "--skip-unlabelled"]),
        ({"1.png": b"\x89PNG\r\n\x1a\n"}, ["--image", ".JPG"]),
        ({"1.v2.jpg": jpeg}, []),
    ]
    for number, (rest, options) in enumerate(rests):
        folder = tmp_path / str(number)
        folder.mkdir()
        with tarfile.open(folder / "a.tar", "w") as tar:
            for name, data in {**sample, **rest}.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        assert main(["index", "--checksums", str(folder), *options]) == 0 and Manifest.load(folder).samples == 1
        capsys.readouterr()
        assert doctor(folder, capsys, "--ranks", "1", "--global-batch", "1")[0] == 0
