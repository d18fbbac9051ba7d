"""Tiny archives with the layout of the official ones, and a devkit order that differs from the sorted order."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from data_prep.__main__ import main
from mimscale.data.decode import decode
from mimscale.data.manifest import Manifest
from mimscale.data.synthetic import make_image_folder

WNIDS = ["n02119789", "n01440764", "n03100240", "n01443537"]  # line i = ILSVRC2012_ID i
ANCESTOR = "n00001740"
TRUTH = [3, 1, 2, 4, 4, 1]  # of images 1 .. 6


def pack(path: Path, members: dict[str, bytes], mode: str = "w") -> bytes:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path.read_bytes()


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("official")
    images = [p.read_bytes() for p in sorted(make_image_folder(root / "p", classes=2, per_class=10).glob("*/*"))]
    inner = {}
    for number, wnid in enumerate(sorted(WNIDS)):
        content = {f"{wnid}_{k}.JPEG": images[3 * number + k] for k in range(3)}
        inner[f"{wnid}.tar"] = pack(root / f"{wnid}.tar", content)
    pack(root / "ILSVRC2012_img_train.tar", inner)
    pack(
        root / "ILSVRC2012_img_val.tar",
        {f"ILSVRC2012_val_{n + 1:08d}.JPEG": images[n] for n in (4, 0, 2, 1, 5, 3)},
    )
    truth = "".join(f"{number}\n" for number in TRUTH)
    (root / "ILSVRC2012_validation_ground_truth.txt").write_text(truth)
    (root / "synsets.txt").write_text("".join(f"{wnid} some words\n" for wnid in WNIDS))
    boxes = {"val_00000003": " 1 2 3 4 n02119789 5 6 7 8"}
    rows = [
        f"ILSVRC2012_{name},{WNIDS[devkit_id - 1]}{boxes.get(name, ' 85 1 499 272')} \n"
        for name, devkit_id in ((f"val_{number:08d}", devkit_id) for number, devkit_id in enumerate(TRUTH, 1))
    ]
    (root / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "".join(reversed(rows)))
    pack(
        root / "ILSVRC2012_devkit_t12.tar.gz",
        {
            "ILSVRC2012_devkit_t12/readme.txt": b"",
            "ILSVRC2012_devkit_t12/data/meta.mat": meta(),
            "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": truth.encode(),
        },
        "w:gz",
    )
    return root


def meta() -> bytes:
    """meta.mat as the devkit has it: a struct array of the classes, followed by their ancestors."""
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    rows = [(number, wnid, "words", "gloss", 0) for number, wnid in enumerate(WNIDS, 1)]
    synsets = np.array([*rows, (5, ANCESTOR, "entity", "all", 4)], dtype=kinds)
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": synsets.reshape(-1, 1)})
    return buffer.getvalue()


def labels_by_key(manifest: Manifest) -> dict[str, str]:
    assert manifest.labels is not None and manifest.classes is not None
    return {manifest.key(n): manifest.classes[manifest.labels[n]] for n in range(manifest.samples)}


def test_train_archive(official: Path, tmp_path: Path) -> None:
    archive, out = official / "ILSVRC2012_img_train.tar", tmp_path / "out"
    assert main(["imagenet", "--train", str(archive), str(out), "--shard-samples", "5"]) == 0
    manifest = Manifest.load(out)
    assert manifest.classes == sorted(WNIDS)
    assert labels_by_key(manifest) == {f"{wnid}_{k}": wnid for wnid in WNIDS for k in range(3)}
    for sample in range(manifest.samples):
        key = manifest.key(sample)
        with tarfile.open(official / f"{key.split('_')[0]}.tar") as tar:
            assert manifest.read(sample) == tar.extractfile(f"{key}.JPEG").read()  # type: ignore[union-attr]
        decode(manifest.read(sample))
    assert main(["verify", str(out), "--decode"]) == 0


@pytest.mark.parametrize(
    "truth",
    [
        ["ILSVRC2012_devkit_t12.tar.gz"],
        ["LOC_val_solution.csv"],
        ["ILSVRC2012_validation_ground_truth.txt", "--synsets", "synsets.txt"],
    ],
)
def test_validation_labels(official: Path, tmp_path: Path, truth: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(official)
    assert main(["imagenet", "--val", "ILSVRC2012_img_val.tar", "--truth", *truth, str(tmp_path / "out")]) == 0
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.classes == sorted(WNIDS)
    expected = {f"ILSVRC2012_val_{number:08d}": WNIDS[devkit_id - 1] for number, devkit_id in enumerate(TRUTH, 1)}
    assert labels_by_key(manifest) == expected
    with tarfile.open("ILSVRC2012_img_val.tar") as tar:
        for sample in range(6):
            member = tar.extractfile(f"{manifest.key(sample)}.JPEG")
            assert member is not None and manifest.read(sample) == member.read()


def test_the_flat_folder_of_the_validation_images(official: Path, tmp_path: Path, capsys) -> None:
    with tarfile.open(official / "ILSVRC2012_img_val.tar") as tar:
        tar.extractall(tmp_path / "val")
    (tmp_path / "val" / "._ILSVRC2012_val_00000001.JPEG").write_bytes(b"x")
    truth = ("--truth", str(official / "LOC_val_solution.csv"))
    for name, source in (("a", official / "ILSVRC2012_img_val.tar"), ("b", tmp_path / "val")):
        assert main(["imagenet", "--val", str(source), *truth, str(tmp_path / name)]) == 0
    shards = [next((tmp_path / name).glob("*.tar")).read_bytes() for name in "ab"]
    assert shards[0] == shards[1]
    capsys.readouterr()
    assert main(["imagenet", "--train", str(tmp_path / "val"), str(tmp_path / "c")]) == 2
    assert "is a folder; give the .tar file, or for a folder of images the verb folder" in capsys.readouterr().err


def test_mistakes_are_named(official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(official)

    def refused(*arguments: str) -> str:
        assert main(["imagenet", *arguments, str(tmp_path / "out")]) == 2
        assert not (tmp_path / "out").exists()
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return str(error)

    (tmp_path / "short.txt").write_text("1\n2\n")
    (tmp_path / "high.txt").write_text("1\n2\n3\n4\n5\n1\n")
    (tmp_path / "words.txt").write_text("cat\n")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    (tmp_path / "twice.csv").write_text("ImageId,PredictionString\na,n1 1\nb,n2 1\na,n3 1\n")
    pack(tmp_path / "other.tar.gz", {"x": b""}, "w:gz")
    val, synsets = "ILSVRC2012_img_val.tar", ["--synsets", "synsets.txt"]
    assert "needs --truth" in refused("--val", val)
    assert "add --synsets FILE" in refused("--val", val, "--truth", "ILSVRC2012_validation_ground_truth.txt")
    assert "in only one" in refused("--val", val, "--truth", str(tmp_path / "short.txt"), *synsets)
    assert "5 is not in it" in refused("--val", val, "--truth", str(tmp_path / "high.txt"), *synsets)
    assert "cannot be read" in refused("--val", val, "--truth", str(tmp_path / "words.txt"), *synsets)
    assert "'ImageId' is not in it" in refused("--val", val, "--truth", str(tmp_path / "other.csv"))
    assert "'a' has several rows; keep one" in refused("--val", val, "--truth", str(tmp_path / "twice.csv"))
    assert "holds no data/meta.mat" in refused("--val", val, "--truth", str(tmp_path / "other.tar.gz"))
    assert "cannot be read" in refused("--val", val, "--truth", "nowhere.csv")
    assert "not one tar per class" in refused("--train", val)
    assert "No such file" in refused("--train", "nowhere.tar")
    assert "not a complete tar archive" in refused("--train", "synsets.txt")


def test_incomplete_archives_are_refused(official: Path, tmp_path: Path, capsys) -> None:
    """Truncated anywhere, also between two members, or with a damaged header, which tarfile takes for the end."""
    data = (official / "ILSVRC2012_img_train.tar").read_bytes()
    with tarfile.open(official / "ILSVRC2012_img_train.tar") as tar:
        headers = [member.offset for member in tar]
    broken = tmp_path / "broken.tar"
    for length in (0, 100, *headers[1:], headers[2] + 512, headers[2] + 2000, headers[3] - 700):
        broken.write_bytes(data[:length])
        assert main(["imagenet", "--train", str(broken), str(tmp_path / "out")]) == 2
        assert "not a complete tar archive" in capsys.readouterr().err
    inner_header = headers[1] + 512
    for offset in (headers[0], headers[2], inner_header):
        broken.write_bytes(data[:offset] + b"damage" + data[offset + 6 :])
        assert main(["imagenet", "--train", str(broken), str(tmp_path / "out")]) == 2
        capsys.readouterr()
    assert not (tmp_path / "out").exists()


def test_damaged_and_odd_lists_of_labels(official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    devkit = (official / "ILSVRC2012_devkit_t12.tar.gz").read_bytes()
    truth = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
    pack(tmp_path / "meta.tar.gz", {"x/data/meta.mat": meta()[:200] + b"?" * 99, truth: b"1\n"}, "w:gz")
    (tmp_path / "cut.tar.gz").write_bytes(devkit[: len(devkit) // 2])
    (tmp_path / "flip.tar.gz").write_bytes(devkit[:300] + bytes([devkit[300] ^ 255]) + devkit[301:])
    (tmp_path / "short.csv").write_text("ImageId,PredictionString\na,n1 1\nb\n")
    names = "cut.tar.gz", "flip.tar.gz", "meta.tar.gz", "short.csv"
    for name in names:
        val = ["--val", str(official / "ILSVRC2012_img_val.tar"), "--truth", str(tmp_path / name)]
        assert main(["imagenet", *val, str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert (
            error.count("\n") == 1
            and f"{name}'" in error
            and ("cannot be read" in error or "'b' has no class" in error)
        )
    rows = (official / "LOC_val_solution.csv").read_text().replace(" \n", f" {'1 2 3 4 ' * 20_000}\r\n")
    (tmp_path / "long.csv").write_bytes(b"\xef\xbb\xbf" + rows.encode())
    val = ["--val", str(official / "ILSVRC2012_img_val.tar"), "--truth", str(tmp_path / "long.csv")]
    assert main(["imagenet", *val, str(tmp_path / "out")]) == 0 and Manifest.load(tmp_path / "out").samples == 6


@pytest.mark.parametrize("packed", [False, True])
def test_no_file_takes_the_place_of_an_image(
    official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], packed: bool
) -> None:
    """Annotations and notes beside the validation images; and two images with one name."""
    with tarfile.open(official / "ILSVRC2012_img_val.tar") as tar:
        tar.extractall(tmp_path / "val")
    more = {"ILSVRC2012_val_00000001.txt": b"x", "A.txt": b"y", ".DS_Store": b"z", "ILSVRC2012_val_00000002.AAA": b"w"}
    for name, data in more.items():
        (tmp_path / "val" / name).write_bytes(data)

    def run(out: str) -> int:
        source = tmp_path / "val"
        if packed:
            source = tmp_path / f"{out}.tar"
            pack(source, {path.name: path.read_bytes() for path in sorted((tmp_path / "val").iterdir())})
        truth = ["--truth", str(official / "LOC_val_solution.csv")]
        return main(["imagenet", "--val", str(source), *truth, str(tmp_path / out)])

    assert run("a") == 0
    file = Manifest.load(tmp_path / "a").file
    assert file.samples == 6 and file.skipped == {"hidden or of the system": 1, "without an image's content": 3}
    (tmp_path / "val" / "ILSVRC2012_val_00000003.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    capsys.readouterr()
    assert run("b") == 2 and "has several images 'ILSVRC2012_val_00000003'; keep one" in capsys.readouterr().err


def test_archives_of_classes_in_any_spelling_and_compressed(
    official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in"
    (source / "more").mkdir(parents=True)
    first, second = (official / f"{wnid}.tar" for wnid in sorted(WNIDS)[:2])
    (source / f"{first.stem}.TAR").write_bytes(first.read_bytes())
    (source / "readme.txt").write_text("x")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / second.name).write_bytes(second.read_bytes())
    (source / "linked").symlink_to(tmp_path / "elsewhere")
    assert main(["imagenet21k", str(source), str(tmp_path / "out")]) == 0
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.classes == sorted(WNIDS)[:2] and manifest.samples == 6
    assert manifest.file.skipped == {"that are no .tar": 1}
    (source / "n09.tar.gz").write_bytes(gzip.compress(first.read_bytes()))
    capsys.readouterr()
    assert main(["imagenet21k", str(source), str(tmp_path / "again")]) == 2
    assert "n09.tar.gz' is compressed, and its class would be left out" in capsys.readouterr().err
