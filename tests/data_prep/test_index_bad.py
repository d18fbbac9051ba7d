"""`index` goes through everything: all bad shards are named, counted or left out on request; it continues; shards that
are on a server or compressed."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest

from data_prep.__main__ import main
from data_prep.index_journal import JOURNAL
from mimscale.data.config import DataConfig
from mimscale.data.manifest import Manifest
from mimscale.data.shard_cache import Cache
from mimscale.errors import UserError
from tests.data.servers import WebServer, bucket

JPEG = b"\xff\xd8\xff\xe0 the header only "


def archive(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def samples(first: int, count: int = 4) -> dict[str, bytes]:
    members: dict[str, bytes] = {}
    for number in range(first, first + count):
        members |= {f"{number:03d}.jpg": JPEG * (number + 1), f"{number:03d}.cls": b"%d" % (number % 2)}
    return members


def folder(path: Path, shards: int = 3, bad: Mapping[str, bytes] = MappingProxyType({})) -> Path:
    path.mkdir()
    for number in range(shards):
        (path / f"good-{number:03d}.tar").write_bytes(archive(samples(4 * number)))
    for name, data in bad.items():
        (path / f"{name}.tar").write_bytes(data)
    return path


WHOLE = archive(samples(50))
FAULTS = {
    "bad_cut": WHOLE[:3000],
    "bad_empty": b"",
    "bad_text": b"<html>not found</html>" * 100,
    "bad_open": WHOLE.rstrip(b"\0") + bytes(-len(WHOLE.rstrip(b"\0")) % 512),
    "bad_gzip": gzip.compress(WHOLE),
    "bad_label": archive({"1.jpg": JPEG, "1.cls": b"cat"}),
}
REASONS = {
    "bad_cut": "ends inside the member",
    "bad_empty": "no member and no end at byte 0",
    "bad_text": "no member and no end at byte 0",
    "bad_open": "no end mark behind the last member",
    "bad_gzip": "is compressed (gzip), so its members have no offsets; unpack it: gzip -dc",
    "bad_label": "cls is not a class number",
}


def test_all_bad_shards_are_named_and_left_out_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = folder(tmp_path / "in", bad=FAULTS)
    assert main(["index", str(source)]) == 2
    *bad, error = capsys.readouterr().err.splitlines()
    assert len(bad) == 6 and "6 of 9 shards cannot be indexed; make them again" in error
    for name, reason in REASONS.items():
        assert any(f"{name}.tar" in line and reason in line for line in bad)
    assert not (source / "manifest.json").exists() and (source / JOURNAL).exists()

    assert main(["index", "--skip-bad", str(source)]) == 0
    output = capsys.readouterr()
    assert "3 of 9 shards were read before; skipped" in output.err and "6 of 9 shards are left out" in output.err
    assert "6 bad shards were left out:" in output.out and "bad_cut.tar" in output.out
    file = Manifest.load(source).file
    assert file.bad_shards.keys() == {f"{name}.tar" for name in FAULTS} and file.samples == 12
    assert not (source / JOURNAL).exists()
    assert main(["verify", str(source)]) == 0
    capsys.readouterr()
    main(["doctor", str(source), "--ranks", "1", "--global-batch", "4"])
    assert "6 bad shards were left out" in capsys.readouterr().out


def test_more_than_ten_are_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = folder(tmp_path / "in", bad={f"bad_{n:02d}": WHOLE[: 100 * n] for n in range(13)})
    assert main(["index", str(source)]) == 2
    *bad, error = capsys.readouterr().err.splitlines()
    assert len(bad) == 10 and "13 of 16" in error and "all 13 are in" in error
    assert len((source / "bad_shards.txt").read_text().splitlines()) == 13
    assert main(["index", "--skip-bad", str(source)]) == 0
    for number in range(3):
        (source / f"good-{number:03d}.tar").unlink()
    capsys.readouterr()
    main(["doctor", str(source), "--ranks", "1", "--global-batch", "4"])
    assert "3 are bad: good-000.tar is missing; good-001.tar is missing" in capsys.readouterr().out
    with pytest.raises(UserError, match="is missing .one of 3 of 3 shards."):
        Manifest.load(source)
    assert main(["verify", str(source)]) == 1
    assert capsys.readouterr().out.count("missing") == 3


def test_it_continues_after_a_repair_and_reads_what_changed_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = folder(tmp_path / "in", 3, {"b": WHOLE[:3000]})
    assert main(["index", str(source)]) == 2
    with open(source / JOURNAL, "a") as file:
        file.write('["cut off by a kil')
    (source / "b.tar").write_bytes(WHOLE)
    (source / "good-001.tar").write_bytes(archive(samples(20, 7)))
    capsys.readouterr()
    assert main(["index", str(source)]) == 0
    assert "2 of 4 shards were read before" in capsys.readouterr().err
    fresh = folder(tmp_path / "fresh", 3, {"b": WHOLE})
    (fresh / "good-001.tar").write_bytes(archive(samples(20, 7)))
    assert main(["index", str(fresh)]) == 0
    assert Manifest.load(source).fingerprint == Manifest.load(fresh).fingerprint
    assert main(["index", str(source), "--label", "none"]) == 0  # other options: nothing of a journal is used
    assert Manifest.load(source).labels is None


def test_counts_are_exact_over_shards_that_repeat_their_keys(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    html = b"<html>"
    members = {"0.jpg": html, "1.jpg": JPEG, "2.txt": b"x", "._3.jpg": html, "22.05.png": JPEG, "d.v1.jpg": JPEG}
    for number in range(700):
        (source / f"{number:03d}.tar").write_bytes(archive(members))
    assert main(["index", str(source)]) == 0
    file = Manifest.load(source).file
    assert file.samples == 700 and sum(file.skipped.values()) == 5 * 700 and set(file.skipped.values()) == {700, 1400}
    assert len(file.left_out) == 1000 and "000.tar/0" in file.left_out


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar.zst"])
def test_compressed_shards_beside_others_are_not_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    source = folder(tmp_path / "in")
    (source / name).write_bytes(b"\x28\xb5\x2f\xfd" + bytes(99) if name.endswith("zst") else gzip.compress(WHOLE))
    assert main(["index", str(source)]) == 2
    assert f"-d '{source / name}'" in capsys.readouterr().err


def test_labels_of_later_shards_decide_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = folder(tmp_path / "in", 1)
    (source / "a.tar").write_bytes(archive({"x.jpg": JPEG}))
    assert main(["index", str(source)]) == 2
    assert "1 of 5 samples of" in (error := capsys.readouterr().err) and "the first is 'a.tar/x'" in error
    assert main(["index", str(source), "--skip-unlabelled"]) == 0
    assert Manifest.load(source).samples == 4 and main(["verify", str(source)]) == 0


def test_labels_by_wnid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wnids = ["n01443537", "n01440764", "n01443537"]
    texts = {f"{n}.{kind}": d for n, w in enumerate(wnids) for kind, d in (("jpg", JPEG), ("cls", w.encode()))}
    meta = {
        f"{n}.{kind}": d
        for n, w in enumerate(wnids)
        for kind, d in (("jpg", JPEG), ("json", json.dumps({"wnid": w}).encode()))
    }
    names = {f"train/{w}_{n}.jpg": JPEG for n, w in enumerate(wnids)}
    for place, (members, label) in enumerate([(texts, "cls"), (meta, "json:wnid"), (names, "wnid")]):
        source = tmp_path / f"in{place}"
        source.mkdir()
        (source / "a.tar").write_bytes(archive(members))
        assert main(["index", str(source), "--label", label]) == 0
        manifest = Manifest.load(source)
        assert manifest.classes == ["n01440764", "n01443537"] and manifest.labels is not None
        assert manifest.labels.tolist() == [1, 0, 1] and main(["verify", str(source)]) == 0
        (tmp_path / "all.txt").write_text("n01443537\nn00000001\nn01440764\n")
        assert main(["index", str(source), "--label", label, "--classes", str(tmp_path / "all.txt")]) == 0
        labels = Manifest.load(source).labels
        assert labels is not None and labels.tolist() == [0, 2, 0] and main(["verify", str(source)]) == 0
        (tmp_path / "few.txt").write_text("n01443537\n")
        assert main(["index", str(source), "--label", label, "--classes", str(tmp_path / "few.txt")]) == 2
        assert "class name" in capsys.readouterr().err or label != "wnid"


def test_shards_on_a_web_server_in_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = folder(tmp_path / "in")
    assert main(["index", "--checksums", str(source)]) == 0
    local = Manifest.load(source)
    web = WebServer(source)
    try:
        web.faults = ["500", "truncate"]
        address = f"{web.url}/good-{{000..002}}.tar"
        assert main(["index", "--checksums", address, "--to", str(tmp_path / "to")]) == 0
        remote = Manifest.load(tmp_path / "to")
        assert remote.fingerprint == local.fingerprint and remote.location == web.url
        assert [remote.read(n) for n in range(12)] == [local.read(n) for n in range(12)]
        assert sorted(p.name for p in (tmp_path / "to").iterdir()) == ["index.npy", "labels.npy", "manifest.json"]
        assert main(["verify", str(tmp_path / "to")]) == 0
        data = DataConfig(shards=str(tmp_path / "to"), cache=tmp_path / "cache")
        cached = Manifest.load(str(data.shards), cache=Cache.from_config(data))
        assert cached.fetch(0) and cached.read(1) == local.read(1)
        capsys.readouterr()
        assert main(["index", f"{web.url}/good-{{000..004}}.tar", "--to", str(tmp_path / "more")]) == 2
        assert "2 of 5 shards cannot be indexed" in capsys.readouterr().err
        assert main(["index", web.url, "--to", str(tmp_path / "list")]) == 2
        assert "has no list of its files" in capsys.readouterr().err
        assert main(["index", address]) == 2
        assert "give --to DST" in capsys.readouterr().err
        asked = len(web.gets)
        web.plain = True
        assert main(["index", address, "--to", str(tmp_path / "plain")]) == 2
        assert capsys.readouterr().err.count("does not answer range requests") == 3
        assert len(web.gets) == asked + 3  # once each: another answer is not to be expected
        web.lengths = False
        assert main(["index", address, "--to", str(tmp_path / "plain")]) == 2
        assert capsys.readouterr().err.count("does not give the length") == 3
    finally:
        web.stop()


def test_shards_in_a_bucket_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folder(tmp_path / "in")
    with bucket(source, monkeypatch) as url:
        assert main(["index", url, "--to", str(tmp_path / "to"), "--files", "good-00[01]*"]) == 0
        manifest = Manifest.load(tmp_path / "to")
        assert manifest.samples == 8 and manifest.file.location == url
        assert manifest.read(5) == JPEG * 6


def test_output_that_nobody_reads_is_no_fault(tmp_path: Path) -> None:
    """As with `| head -1`."""
    source = folder(tmp_path / "in", shards=1)
    words = [sys.executable, "-m", "data_prep", "index", str(source)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 141 and said == ""


def test_names_of_any_bytes_and_lengths(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    long = "d" * 90 + "/" + "é" * 120
    with tarfile.open(source / "a.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name, data in (
            (f"{long}.jpg", JPEG),
            ("caf\xe9.jpg", JPEG + b"1"),
            ("caf\xe9\n.txt", b"x"),
            ("\xff.jpg", b"y"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert main(["index", str(source)]) == 0
    manifest = Manifest.load(source)
    assert manifest.samples == 2 and manifest.read(1) == JPEG + b"1"
    assert set(manifest.file.left_out) == {"a.tar/caf\\xe9\n", "a.tar/\\xff"}
    assert main(["info", str(source)]) == 0


def test_a_shard_with_hard_links_is_indexed_verified_and_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two samples share an image, as after a program that replaced copies by links."""
    source = folder(tmp_path / "in", shards=1)
    shard = next(source.glob("*.tar"))
    with tarfile.open(shard, "a") as tar:
        image = next(member.name for member in tar.getmembers() if member.name.endswith(".jpg"))
        for name, link in (("zz.jpg", image), ("zz.cls", image.replace(".jpg", ".cls"))):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.LNKTYPE, link
            tar.addfile(info)
    assert main(["index", "--checksums", str(source)]) == 0 and "5 images in 1 shards" in capsys.readouterr().out
    assert main(["verify", str(source)]) == 0 and "1 images are copies" in capsys.readouterr().out
    assert main(["doctor", str(source), "--ranks", "1", "--global-batch", "5"]) == 0
    manifest = Manifest.load(source)
    assert manifest.read(4) == manifest.read(0)
    assert manifest.labels is not None and manifest.labels[4] == manifest.labels[0]


def test_what_no_glob_finds_and_what_holds_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A shard named .TAR is not passed over, one without members is said, and what is no tar is named."""
    bad = {"zip": b"PK\3\4" + bytes(600), "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"}
    source = folder(tmp_path / "in", bad={**bad, "hollow": archive({})})
    (source / "LAST.TAR").write_bytes(WHOLE)
    assert main(["index", str(source)]) == 2
    said = capsys.readouterr().err
    for words in ("but a ZIP archive", "but a Git LFS pointer", "LAST.TAR': only letters", "3 of 7 shards cannot be"):
        assert words in said
    assert main(["index", str(source), "--skip-bad"]) == 0
    assert Manifest.load(source).file.left_out == {"hollow.tar": "a shard without members"}


@pytest.mark.parametrize("name", ["b.tgz", "b.tar.gz", "data (1).tar"])
def test_a_shard_whose_name_a_manifest_cannot_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Also one that is not compressed, whatever its name says."""
    source = folder(tmp_path / "in", shards=1)
    (source / name).write_bytes(WHOLE)
    assert main(["index", str(source)]) == 2
    assert f"{name}': only letters, digits" in (error := capsys.readouterr().err) and error.count("\n") == 1
    assert main(["index", str(source), "--skip-bad"]) == 0 and Manifest.load(source).samples == 4


def test_headers_with_the_checksum_of_signed_bytes_are_read_as_they_are_indexed(tmp_path: Path) -> None:
    """As some old programs wrote names outside of ASCII."""
    data = b""
    for name, contents in (("café.jpg", JPEG), ("café.cls", b"1")):
        info = tarfile.TarInfo(name)
        info.size = len(contents)
        header = info.tobuf(tarfile.GNU_FORMAT)
        total = sum(byte - 256 if byte > 127 else byte for byte in header[:148] + b" " * 8 + header[156:])
        data += header[:148] + b"%06o\0 " % total + header[156:] + contents + bytes(-len(contents) % 512)
    (tmp_path / "a.tar").write_bytes(data + bytes(1024))
    assert main(["index", str(tmp_path)]) == 0
    manifest = Manifest.load(tmp_path)
    assert manifest.read(0) == JPEG and manifest.key(0) == "café" and main(["verify", str(tmp_path)]) == 0


def test_shards_in_folders_below_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = folder(tmp_path / "in", shards=1)
    folder(source / "more", shards=2)
    assert main(["index", str(source)]) == 0
    assert "2 shards in folders below are not read" in capsys.readouterr().err
    assert not Manifest.load(source).file.skipped
