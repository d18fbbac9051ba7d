"""From a folder of images to shards that any WebDataset reader can read."""

from __future__ import annotations

import hashlib
import io
import json
import os
import resource
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from torchvision.datasets import ImageFolder

from data_prep.__main__ import main
from data_prep.folder import read_folder
from data_prep.plan import ShardPlan
from data_prep.write_manifest import read_sidecar
from data_prep.write_shards import unfinished, write
from mimscale.data.manifest import Manifest
from mimscale.data.names import utf8
from mimscale.data.synthetic import make_image_folder
from mimscale.errors import UserError

KILLED, NEVER = 9, 10**6


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images in 4 classes, and other files that are often found in such folders."""
    root = make_image_folder(tmp_path_factory.mktemp("images"), classes=4, per_class=10, side=40)
    one = root / "class_001"
    Image.open(one / "000000.jpg").save(one / "named wrongly.JPEG", format="PNG")
    (one / "deeper.folder").mkdir()
    (one / "000001.jpg").rename(one / "deeper.folder" / "a.b.jpg")
    (one / ".hidden.jpg").write_bytes(b"x")
    (one / "readme.txt").write_text("no image")
    (one / "broken.jpg").write_bytes(b"no image either")
    (root / "stray.jpg").write_bytes((one / "000002.jpg").read_bytes())
    (root / ".git").mkdir()
    return root


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def files(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def made(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "out"
    assert run("folder", images, folder, "--shard-samples", 7) == 0
    return folder


def test_which_files_are_taken(images: Path, made: Path) -> None:
    source = read_folder(images, labelled=True)
    assert dict(source.skipped) == {
        "folders that are hidden or of the system": 1,
        "hidden or of the system": 1,
        "not an image": 1,
        "not an image (.txt)": 1,
        "outside of the class folders": 1,
    }
    manifest = Manifest.load(made)
    assert manifest.samples == 41 and manifest.classes == [f"class_{label:03d}" for label in range(4)]
    assert manifest.labels is not None and np.bincount(manifest.labels).tolist() == [10, 11, 10, 10]
    content = {
        path.read_bytes() for path in images.glob("*/**/*.[jJ]*") if path.name not in (".hidden.jpg", "broken.jpg")
    }
    assert {manifest.read(sample) for sample in range(41)} == content
    for sample in range(41):
        assert manifest.key(sample).split("/")[0] == manifest.classes[manifest.labels[sample]]


def test_what_was_to_be_an_image_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_image_folder(tmp_path / "in", classes=1, per_class=3, side=16)
    for name in ("text.jpg", "empty.PNG", "notes.txt"):
        (tmp_path / "in/class_000" / name).write_text("" if "empty" in name else "a text")
    assert run("folder", tmp_path / "in", tmp_path / "out") == 0
    printed = capsys.readouterr().err
    named = Manifest.load(tmp_path / "out").file.left_out
    assert named == {"class_000/empty.PNG": "not an image: it is empty", "class_000/text.jpg": "not an image"}
    assert all(f"left out: {name}: {reason}\n" in printed for name, reason in named.items())
    assert Manifest.load(tmp_path / "out").file.skipped == dict.fromkeys(
        ("not an image: it is empty", "not an image", "not an image (.txt)"), 1
    )

    images = sorted(str(path) for path in (tmp_path / "in").glob("*/0*.jpg"))
    (tmp_path / "t.csv").write_text("\n".join(["path", *images, "in/class_000/text.jpg", "in/gone.jpg", ""]))
    assert run("table", tmp_path / "t.csv", tmp_path / "out2", "--skip-missing") == 0
    named = Manifest.load(tmp_path / "out2").file.left_out
    assert {name.split("/")[-1] for name in named} == {"text.jpg", "gone.jpg"}


def test_images_beside_the_class_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One folder below a folder of images makes no class of its images alone."""
    make_image_folder(tmp_path / "in", classes=1, per_class=2, side=16)
    image = next((tmp_path / "in").glob("*/*.jpg")).read_bytes()
    for number in range(3):
        (tmp_path / f"in/{number}.jpg").write_bytes(image)
    assert run("folder", tmp_path / "in", tmp_path / "out") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "3 images lie beside its class folders ('class_000') and 2 files in them; take all" in line
    assert run("folder", tmp_path / "in", tmp_path / "out", "--unlabelled") == 0
    assert Manifest.load(tmp_path / "out").samples == 5


def test_classes_are_torchvisions(tmp_path: Path) -> None:
    make_image_folder(tmp_path, classes=5, per_class=1)
    for folder, name in zip(sorted(tmp_path.iterdir()), ("9", "10", "b", "B", "n01"), strict=True):
        folder.rename(tmp_path / name)
    theirs, ours = ImageFolder(str(tmp_path)), read_folder(tmp_path, labelled=True)
    assert ours.classes == theirs.classes
    assert [(item.path, item.label) for item in ours.items] == theirs.samples


def test_webdataset_reads_exactly_our_samples(made: Path) -> None:
    manifest = Manifest.load(made)
    urls = [str(path) for path in manifest.shard_paths]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(samples) == manifest.samples and manifest.labels is not None
    for sample, theirs in enumerate(samples):
        extension = next(e for e in theirs if e in ("jpg", "png"))
        assert theirs["__key__"] == manifest.key(sample)
        assert theirs[extension] == manifest.read(sample)
        assert int(theirs["cls"]) == manifest.labels[sample]
        assert Image.open(io.BytesIO(theirs[extension])).format == {"jpg": "JPEG", "png": "PNG"}[extension]


def test_webdatasets_writer_makes_the_same_bytes(made: Path, tmp_path: Path) -> None:
    for path in sorted(made.glob("*.tar")):
        with webdataset.TarWriter(
            str(tmp_path / path.name), encoder=False, mtime=0, user="", group="", mode=0o644
        ) as writer:
            for sample in webdataset.WebDataset(str(path), shardshuffle=False):
                writer.write({name: value for name, value in sample.items() if name[:2] != "__" or name == "__key__"})
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_system_tar_reads_the_shards(made: Path) -> None:
    listing = subprocess.run(["tar", "tvf", made / "shard-000000.tar"], capture_output=True, text=True, check=True)
    assert not listing.stderr and len(listing.stdout.splitlines()) == 2 * Manifest.load(made).counts[0]
    assert all("1970-01-01" in line for line in listing.stdout.splitlines())


def test_unlabelled(images: Path, tmp_path: Path) -> None:
    assert run("folder", images, tmp_path / "out", "--unlabelled") == 0
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.samples == 42 and manifest.labels is None and manifest.classes is None
    with tarfile.open(manifest.shard_paths[0]) as tar:
        assert len(tar.getnames()) == 42
    assert not (tmp_path / "out" / "labels.npy").exists()


@pytest.mark.multi
def test_jobs_and_parts_give_the_same_bytes(images: Path, made: Path, tmp_path: Path, capsys) -> None:
    assert run("folder", images, tmp_path / "jobs", "--shard-samples", 7, "--jobs", 2) == 0
    assert files(tmp_path / "jobs") == files(made)
    for part in ("1/2", "0/2"):
        assert not (tmp_path / "parts" / "manifest.json").exists()
        assert run("folder", images, tmp_path / "parts", "--shard-samples", 7, "--part", part) == 0
    assert files(tmp_path / "parts") == files(made)
    assert "of other parts are missing" in capsys.readouterr().err


@pytest.mark.multi
def test_two_parts_at_once(images: Path, made: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "data_prep",
        "folder",
        images,
        tmp_path / "out",
        "--shard-samples",
        "7",
        "--part",
    ]
    parts = [subprocess.Popen([*map(str, command), f"{number}/3"]) for number in range(3)]
    assert [part.wait(60) for part in parts] == [0, 0, 0]
    assert files(tmp_path / "out") == files(made)


@pytest.mark.parametrize("moment", [*range(0, 90, 5), NEVER])
def test_interrupted_and_continued(images: Path, made: Path, tmp_path: Path, moment: int) -> None:
    """The process ends at a file-system call, without any clean-up."""
    folder = tmp_path / "out"
    plan = ShardPlan(read_folder(images, labelled=True), seed=0, shard_mb=256, shard_samples=7)
    child = os.fork()
    if child == 0:
        try:
            end_at_call(moment)
            write(plan, folder, unfinished(plan, folder))
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WEXITSTATUS(status) == (0 if moment == NEVER else KILLED)
    assert moment != NEVER or (folder / "manifest.json").exists()
    assert run("folder", images, folder, "--shard-samples", 7) == 0
    assert files(folder) == files(made)


def end_at_call(moment: int) -> None:
    """End this process at call number `moment` of those that rename, sync or read."""
    calls = 0

    def ending(function):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls > moment:
                os._exit(KILLED)
            return function(*arguments, **options)

        return call

    for name in ("replace", "fsync", "pread"):
        setattr(os, name, ending(getattr(os, name)))


@pytest.mark.multi
@pytest.mark.parametrize("jobs", [1, 2])
def test_killed_and_started_again(tmp_path: Path, jobs: int) -> None:
    images = make_image_folder(tmp_path / "many", classes=2, per_class=150, side=40)
    expected, killed = tmp_path / "expected", tmp_path / "killed"
    command = ["folder", str(images), "--shard-samples", "2"]
    assert run(*command[:2], expected, *command[2:]) == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "data_prep", *command[:2], str(killed), *command[2:], "--jobs", str(jobs)],
        stderr=subprocess.DEVNULL,
    )
    while not (killed / "shard-000010.json").exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert not (killed / "manifest.json").exists()
    time.sleep(0.2)  # its writers notice that it has ended
    again = subprocess.run(
        [sys.executable, "-m", "data_prep", *command[:2], str(killed), *command[2:]], capture_output=True, text=True
    )
    assert again.returncode == 0 and "shards were already written; skipped" in again.stderr
    assert files(killed) == files(expected)


def test_a_finished_data_set_is_not_written_again(images: Path, made: Path, capsys) -> None:
    times = {path.name: path.stat().st_mtime_ns for path in made.iterdir()}
    assert run("folder", images, made, "--shard-samples", 7) == 0
    assert {path.name: path.stat().st_mtime_ns for path in made.iterdir()} == times
    assert "6 of 6 shards were already written" in capsys.readouterr().err


def test_other_options_or_sources_are_refused(images: Path, made: Path, tmp_path: Path, capsys) -> None:
    before = files(made)
    for change, message in (
        (["--seed", 1], "--seed 0 -> 1"),
        (["--shard-samples", 8], "--shard-samples 7 -> 8"),
        (["--unlabelled"], "samples 41 -> 42"),
    ):
        assert run("folder", images, made, "--shard-samples", 7, *change) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "notes.txt").write_text("mine")
    assert run("folder", images, tmp_path) == 2
    assert "already holds 'notes.txt'" in capsys.readouterr().err
    assert files(made) == before and os.listdir(tmp_path) == ["notes.txt"]


def test_dry_run_writes_nothing(images: Path, tmp_path: Path, capsys) -> None:
    assert run("folder", images, tmp_path / "out", "--shard-samples", 7, "--dry-run") == 0
    assert "41 images, 4 classes" in (output := capsys.readouterr().err) and "in 6 shards" in output
    assert not (tmp_path / "out").exists()


def test_sources_that_are_refused(tmp_path: Path, capsys) -> None:
    def refused(*arguments: object) -> str:
        assert run("folder", *arguments, tmp_path / "out") == 2
        assert not (tmp_path / "out").exists()
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return str(error)

    assert "no such folder" in refused(tmp_path / "nowhere")
    (tmp_path / "source").mkdir()
    assert "no class sub-folders" in refused(tmp_path / "source")
    assert "no images in" in refused(tmp_path / "source", "--unlabelled")
    make_image_folder(tmp_path / "source", classes=1, per_class=1)
    (tmp_path / "source" / "empty").mkdir()
    assert "empty' holds no image" in refused(tmp_path / "source")


def test_a_source_that_changes_after_it_was_listed(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "source", classes=1, per_class=2)
    plan = ShardPlan(read_folder(root, labelled=True), seed=0, shard_mb=1, shard_samples=None)
    for change in (b"more", None):
        path = root / "class_000" / "000001.jpg"
        path.write_bytes(path.read_bytes() + change if change else path.read_bytes()[:-9])
        with pytest.raises(UserError, match="has changed since it was listed"):
            write(plan, tmp_path / "out", unfinished(plan, tmp_path / "out"))
        assert sorted(os.listdir(tmp_path / "out")) == ["plan.json"]


def test_sidecars_are_checked_against_shards_and_plan(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    plan = ShardPlan(read_folder(images, labelled=True), seed=0, shard_mb=256, shard_samples=7)
    assert write(plan, folder, unfinished(plan, folder)) == []
    assert unfinished(plan, folder) == []
    (folder / "shard-000001.tar").unlink()
    os.truncate(folder / "shard-000002.tar", 100)
    (folder / "shard-000003.json").write_text("{")
    sidecar = json.loads((folder / "shard-000004.json").read_text())
    (folder / "shard-000004.json").write_text(json.dumps({**sidecar, "plan": "other"}))
    assert unfinished(plan, folder) == [1, 2, 3, 4]
    assert read_sidecar(folder, 0, plan.hash) is not None


def test_a_full_disk(images: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files are limited to less than the size of a shard; with more space, the same command continues."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    command = ("folder", images, tmp_path / "out", "--shard-samples", 7)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        code = run(*command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    line = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and line.startswith("data_prep: File too large") and "the same command continues" in line
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["plan.json"]
    assert run(*command) == 0 and files(tmp_path / "out") == files(made)


def test_each_folder_is_walked_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Links to a parent, from two folders, to a sibling and to a folder outside. Real folders come before links."""
    root = make_image_folder(tmp_path / "in", classes=2, per_class=3, side=16)
    expected = [(item.path, item.label) for item in read_folder(root, labelled=True).items]
    for name, to in (("class_000/all", ".."), ("class_001/all", ".."), ("class_000/other", "../class_001")):
        (root / name).symlink_to(to)
    source = read_folder(root, labelled=True)
    assert [(item.path, item.label) for item in source.items] == expected
    assert source.skipped == {"folders reached a second time": 3}
    outside = make_image_folder(tmp_path / "outside", classes=1, per_class=2, side=16)
    (root / "class_002").symlink_to(outside / "class_000")
    assert len(read_folder(root, labelled=True).items) == 8
    assert not capsys.readouterr().err
    os.link(root / "class_000" / "000000.jpg", root / "class_001" / "same.jpg")
    (root / "class_001" / "link.jpg").symlink_to("000001.jpg")
    assert len(read_folder(root, labelled=True).items) == 10
    assert "2 files are reached by a second path too" in capsys.readouterr().err


def test_a_class_that_is_a_link_to_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_image_folder(tmp_path / "in", classes=1, per_class=1, side=16)
    (tmp_path / "in" / "again").symlink_to("class_000")
    assert main(["folder", str(tmp_path / "in"), str(tmp_path / "out")]) == 2
    assert "holds no image of its own: it is a link to 'class_000'" in capsys.readouterr().err


@pytest.mark.parametrize("parquet", [False, True])
def test_a_folder_that_cannot_be_read_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], parquet: bool
) -> None:
    """A path beyond the system's 4,096 bytes stands for any folder that cannot be listed."""
    root = make_image_folder(tmp_path / "in", classes=1, per_class=1, side=16)
    place = os.open(root / "class_000", os.O_RDONLY)
    for _ in range(17):
        os.mkdir("x" * 250, dir_fd=place)
        place, above = os.open("x" * 250, os.O_RDONLY, dir_fd=place), place
        os.close(above)
    os.close(os.open("lost.jpg", os.O_CREAT, dir_fd=place))
    os.close(place)
    assert main(["table" if parquet else "folder", str(root), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert (
        "cannot be read: File name too long" in error and len(error) < 500 + len(str(root)) and error.count("\n") == 1
    )


def test_class_folders_that_are_numbers_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_image_folder(tmp_path / "in", classes=3, per_class=1, side=16)
    for folder, name in zip(sorted((tmp_path / "in").iterdir()), ("0", "2", "10"), strict=True):
        folder.rename(tmp_path / "in" / name)
    assert read_folder(tmp_path / "in", labelled=True).classes == ["0", "10", "2"]
    assert "in the order of text as in torchvision: '10' is class 1; --classes FILE" in capsys.readouterr().err
    assert read_folder(tmp_path / "in", labelled=True, classes=["0", "2", "10"]).classes == ["0", "2", "10"]
    assert not capsys.readouterr().err


def test_names_of_classes_that_a_terminal_would_obey(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_image_folder(tmp_path / "in", classes=2, per_class=1, side=16)
    for folder, name in zip(sorted((tmp_path / "in").iterdir()), ("a\nb", "\x1b[31mred"), strict=True):
        folder.rename(tmp_path / "in" / name)
    assert run("folder", tmp_path / "in", tmp_path / "out") == 0 and run("info", "--classes", tmp_path / "out") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == ["0 \\x1b[31mred 1", "1 a\\nb 1"] and not any("\x1b" in line for line in lines)
    assert Manifest.load(tmp_path / "out").classes == ["\x1b[31mred", "a\nb"]


@pytest.mark.parametrize(
    ("names", "message"),
    [((" ", "b"), "class 0 has an empty name"), ((r"\xe9", os.fsdecode(b"\xe9")), "is given twice")],
)
def test_classes_of_one_name_or_without_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], names: tuple[str, str], message: str
) -> None:
    make_image_folder(tmp_path / "in", classes=2, per_class=1, side=16)
    for folder, name in zip(sorted((tmp_path / "in").iterdir()), names, strict=True):
        folder.rename(tmp_path / "in" / name)
    assert run("folder", tmp_path / "in", tmp_path / "out") == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", [b"caf\xe9", b"\xff\xfe", b"a%2Fb", b"x" * 255, "é".encode() * 127, b"a\\b", b"-rf", b"a\rb"], ids=repr
)
def test_names_of_any_bytes_and_lengths(tmp_path: Path, name: bytes) -> None:
    """Of a class and of an image; each image keeps the class of its folder."""
    first, second = sorted(make_image_folder(tmp_path / "one", classes=1, per_class=2, side=16).glob("*/*.jpg"))
    for folder, image in ((os.fsdecode(name), first), ("other", second)):
        (tmp_path / "in" / folder).mkdir(parents=True)
        (tmp_path / "in" / folder / os.fsdecode(name[:251] + b".jpg")).write_bytes(image.read_bytes())
    assert run("folder", tmp_path / "in", tmp_path / "out") == 0 and run("verify", "--decode", tmp_path / "out") == 0
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.labels is not None and manifest.classes is not None and run("info", tmp_path / "out") == 0
    found = {manifest.read(n): manifest.classes[manifest.labels[n]] for n in range(2)}
    assert found == {first.read_bytes(): utf8(os.fsdecode(name)), second.read_bytes(): "other"}
