"""Listing archives, against Python's tarfile and GNU tar; and all that must be refused."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.__main__ import main
from data_prep.tar import BLOCK, MAX_EXTENDED_HEADER, RECORD, BadArchive, members, open_for_reading
from mimscale.data.manifest import Manifest
from mimscale.data.wds_stream import _read_samples
from mimscale.errors import UserError
from mimscale.types import Damage


def pack(path: Path, names: dict[str, bytes], **options) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for name, data in names.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def listed(path: Path) -> list[tuple[str, bytes]]:
    with open_for_reading(path) as fd:
        return [(m.name, os.pread(fd, m.size, m.offset)) for m in members(fd, path)]


def with_header(path: Path, **fields) -> Path:
    info = tarfile.TarInfo("image.jpg")
    for name, value in fields.items():
        setattr(info, name, value)
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(2 * BLOCK))
    return path


CONTENTS = {"a.jpg": b"x" * 700, "folder/b.jpg": b"", "long/" * 8 + "n" * 90 + ".jpg": b"y" * 512, "ü.jpg": b"z"}


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_format_lists_the_packed_files(tmp_path: Path, kind: int) -> None:
    assert listed(pack(tmp_path / "a.tar", CONTENTS, format=kind)) == list(CONTENTS.items())


def test_the_first_bytes_of_members(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.tar", CONTENTS)
    with open_for_reading(path) as fd:
        assert [member.start for member in members(fd, path)] == [data[:BLOCK] for data in CONTENTS.values()]


@pytest.mark.parametrize("kind", ["ustar", "gnu", "pax", "v7"])
def test_gnu_tar(tmp_path: Path, kind: str) -> None:
    for name in ("a.jpg", "d/b.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode() * 300)
    subprocess.run(["tar", f"--format={kind}", "-cf", "x.tar", "a.jpg", "d"], cwd=tmp_path, check=True)
    assert listed(tmp_path / "x.tar") == [(name, name.encode() * 300) for name in ("a.jpg", "d/b.jpg")]


def test_a_size_beyond_octal_digits(tmp_path: Path) -> None:
    path = with_header(tmp_path / "big.tar", size=1 << 34)
    os.truncate(path, BLOCK + (1 << 34))  # a sparse file
    with open(path, "ab") as file:
        file.write(bytes(2 * BLOCK))
    with open_for_reading(path) as fd:
        assert [member.size for member in members(fd, path)] == [1 << 34]


@pytest.mark.parametrize("name", ["/etc/passwd", "../up.jpg", "a/../../up.jpg", ".."])
def test_names_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadArchive, match="refused the member .* leads out of the archive"):
        listed(with_header(tmp_path / "a.tar", name=name))
    pax = tarfile.TarInfo("harmless")
    pax.pax_headers = {"path": name}
    (tmp_path / "pax.tar").write_bytes(pax.tobuf(tarfile.PAX_FORMAT) + bytes(2 * BLOCK))
    with pytest.raises(BadArchive, match="leads out"):
        listed(tmp_path / "pax.tar")


@pytest.mark.parametrize("kind", ["gnu", "pax", "ustar"])
def test_hard_links_have_the_contents_of_the_file_that_they_name(tmp_path: Path, kind: str) -> None:
    """As `tar` stores files that share an inode; names above 100 characters stand in headers of their own."""
    long = "x" * 60 if kind == "ustar" else "l" * 150
    (tmp_path / "in" / "d").mkdir(parents=True)
    (tmp_path / "in" / "d" / f"{long}.jpg").write_bytes(b"one" * 300)
    (tmp_path / "in" / "between.jpg").write_bytes(b"other")
    names = [f"d/{long}.jpg", "between.jpg", f"{long}.2.jpg", "d/third.jpg"]
    for name in names[2:]:
        os.link(tmp_path / "in" / names[0], tmp_path / "in" / name)
    command = ["tar", f"--format={kind}", "-C", str(tmp_path / "in"), "-cf", str(tmp_path / "a.tar")]
    subprocess.run([*command, *(f"./{name}" for name in names)], check=True)
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert [member.islnk() for member in tar] == [False, False, True, True]
    contents = [b"one" * 300, b"other", b"one" * 300, b"one" * 300]
    assert listed(tmp_path / "a.tar") == [(f"./{name}", data) for name, data in zip(names, contents, strict=True)]


def test_a_hard_link_to_a_link_and_one_to_nothing(tmp_path: Path) -> None:
    def header(name: str, link: str) -> bytes:
        info = tarfile.TarInfo(name)
        info.type, info.linkname, info.size = tarfile.LNKTYPE, link, 7  # some programs repeat the size of the file
        return info.tobuf(tarfile.GNU_FORMAT)

    pack(tmp_path / "a.tar", {"a.jpg": b"x" * 600})
    first = (tmp_path / "a.tar").read_bytes()[: 3 * BLOCK]
    (tmp_path / "a.tar").write_bytes(first + header("b.jpg", "a.jpg") + header("c.jpg", "b.jpg") + bytes(2 * BLOCK))
    assert listed(tmp_path / "a.tar") == [(name, b"x" * 600) for name in ("a.jpg", "b.jpg", "c.jpg")]
    (tmp_path / "b.tar").write_bytes(header("b.jpg", "later.jpg") + first + bytes(2 * BLOCK))
    with pytest.raises(BadArchive, match="'b.jpg': a hard link to 'later.jpg', which is not a file before it"):
        listed(tmp_path / "b.tar")


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path)])
def test_a_pipe_or_device_in_place_of_an_archive_is_refused_at_once(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make(tmp_path / "a.tar")
    with pytest.raises(UserError, match="is no regular file"):
        listed(tmp_path / "a.tar")


@pytest.mark.parametrize(
    "kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, b"S", b"?"]
)
def test_links_devices_and_unknown_types_are_refused(tmp_path: Path, kind: bytes) -> None:
    with pytest.raises(BadArchive, match="refused the member 'image.jpg'"):
        listed(with_header(tmp_path / "a.tar", type=kind, linkname="/etc/passwd"))


def test_sizes_are_bounded(tmp_path: Path) -> None:
    with pytest.raises(BadArchive, match="ends inside the member at byte 0"):
        listed(with_header(tmp_path / "a.tar", size=1 << 40))
    path = with_header(tmp_path / "b.tar", type=b"L", size=MAX_EXTENDED_HEADER + 1)
    os.truncate(path, 4 * MAX_EXTENDED_HEADER)
    with pytest.raises(BadArchive, match="an extended header of"):
        listed(path)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 3 * BLOCK), st.integers(1, 255))
def test_a_flipped_byte_never_shortens_the_list_without_an_error(
    tmp_path_factory: pytest.TempPathFactory, at: int, flip: int
) -> None:
    """A damaged header is an error; damaged contents are not checked here."""
    path = pack(tmp_path_factory.mktemp("flip") / "a.tar", {"a.jpg": b"x" * BLOCK, "b.jpg": b"y"})
    data = bytearray(path.read_bytes())
    data[at] ^= flip
    path.write_bytes(data)
    try:
        assert [name for name, _ in listed(path)] == ["a.jpg", "b.jpg"]
    except BadArchive as error:
        assert "\n" not in str(error)


def joined(path: Path, *parts: bytes) -> Path:
    path.write_bytes(b"".join(parts))
    return path


@pytest.mark.parametrize("unpadded", [False, True])
def test_joined_archives_are_all_read(tmp_path: Path, unpadded: bool) -> None:
    """`cat b.tar >> a.tar`, of archives padded to records and of archives that end after two zero blocks."""
    contents = [{f"{n}.jpg": bytes([n + 1]) * (300 + 700 * n)} for n in range(4)]
    parts = [pack(tmp_path / f"{n}.tar", files).read_bytes() for n, files in enumerate([*contents, {}])]
    if unpadded:
        parts = [part.rstrip(b"\0") for part in parts]
        parts = [part + bytes(-len(part) % BLOCK + 2 * BLOCK) for part in parts]
    expected = [item for files in contents for item in files.items()]
    assert listed(joined(tmp_path / "all.tar", *parts)) == expected
    assert listed(joined(tmp_path / "empty_first.tar", parts[4], *parts)) == expected
    assert listed(joined(tmp_path / "zeros.tar", *parts, bytes(5_000_000))) == expected  # a file that was preallocated


def test_a_joined_archive_inside_an_archive(tmp_path: Path) -> None:
    inner = [pack(tmp_path / f"{n}.tar", {f"{n}.jpg": b"x"}).read_bytes() for n in range(2)]
    path = pack(tmp_path / "outer.tar", {"one.tar": inner[0] + inner[1], "two.tar": inner[1]})
    with open_for_reading(path) as fd:
        names = [[m.name for m in members(fd, path, o.offset, o.offset + o.size)] for o in members(fd, path)]
    assert names == [["0.jpg", "1.jpg"], ["1.jpg"]]


@pytest.mark.parametrize(("first", "blocks"), [(0, 1), (2, 1), (2, 3), (2, 6), (3, 5), (4, 4), (0, 8)])
def test_zeros_over_members_are_damage(tmp_path: Path, first: int, blocks: int) -> None:
    """Also if the zeros end where a member begins. The message gives offset and size of what follows."""
    path = pack(tmp_path / "a.tar", {f"{n}.jpg": bytes([n + 1]) * 400 for n in range(8)})  # a member has two blocks
    data = path.read_bytes()
    start, stop = first * BLOCK, (first + blocks) * BLOCK
    path.write_bytes(data[:start] + bytes(stop - start) + data[stop:])
    start += first % 2 * BLOCK  # contents are zero, and the header behind them
    with pytest.raises(BadArchive, match=f"zeros at byte {start:,}, then {len(data) - stop:,} bytes at byte {stop:,}"):
        listed(path)


@pytest.mark.parametrize("tail", [b"x", b"<html>" * 300, bytes(700) + b"x"])
def test_bytes_behind_the_end_are_named(tmp_path: Path, tail: bytes) -> None:
    path = pack(tmp_path / "a.tar", CONTENTS)
    path.write_bytes(path.read_bytes() + tail)
    with pytest.raises(BadArchive, match="that are no joined archive"):
        listed(path)


@pytest.mark.parametrize("blocks", [1, 3, 5])
def test_a_folder_has_no_contents_whatever_size_its_header_gives(tmp_path: Path, blocks: int) -> None:
    """Some programs store the size of the folder itself. Here that many bytes would end at a member."""
    header = tarfile.TarInfo("folder")
    header.type, header.size = tarfile.DIRTYPE, blocks * BLOCK - 10
    contents = {f"folder/{n}.jpg": b"x" * 400 for n in range(4)}
    packed = pack(tmp_path / "a.tar", contents).read_bytes()
    (tmp_path / "a.tar").write_bytes(header.tobuf(tarfile.USTAR_FORMAT) + packed)
    assert listed(tmp_path / "a.tar") == list(contents.items())
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert tar.getnames() == ["folder", *contents]


@pytest.mark.parametrize(
    "options", [["gnu"], *(["pax", f"--sparse-version={n}"] for n in ("0.0", "0.1", "1.0"))], ids="-".join
)
def test_sparse_files_are_named(tmp_path: Path, options: list[str]) -> None:
    """What an archive stores of them begins with a list of holes, or lacks them."""
    with open(tmp_path / "a.jpg", "wb") as file:
        file.write(b"\xff\xd8\xff")
        file.seek(1 << 20)
        file.write(b"end")
    subprocess.run(
        ["tar", "--sparse", f"--format={options[0]}", *options[1:], "-cf", "x.tar", "a.jpg"], cwd=tmp_path, check=True
    )
    with pytest.raises(BadArchive, match="a.jpg': a sparse file"):
        listed(tmp_path / "x.tar")


ENDS = {  # how a shard of two archives goes on behind the first -> (the bytes, whether it is whole)
    "joined": (lambda one, two: one + two, True),
    "joined_unpadded": (lambda one, two: shortened(one) + two, True),
    "an_empty_one_between": (lambda one, two: one + bytes(RECORD) + two, False),  # as zeros over a member
    "a_header_damaged": (lambda one, two: one + b"?" + two[1:], False),
    "zeros_over_a_header": (lambda one, two: one[: 3 * BLOCK] + bytes(BLOCK) + one[4 * BLOCK :], False),
    "text_behind": (lambda one, two: one + b"<html>" * 200, False),
    "truncated_behind": (lambda one, two: one + two[: 3 * BLOCK], False),
}


def shortened(archive: bytes) -> bytes:
    archive = archive.rstrip(b"\0")
    return archive + bytes(-len(archive) % BLOCK + 2 * BLOCK)


@pytest.mark.parametrize("name", ENDS)
def test_every_reader_reads_to_the_end_of_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """index, verify, doctor, imagenet's tar of tars, imagenet21k's folder and the stream: all of it, or damage."""
    make, whole = ENDS[name]
    images = [b"\xff\xd8\xff\xe0" + bytes([n + 1]) * 600 for n in range(6)]
    one, two = (
        pack(tmp_path / "x", {f"{n}.jpg": images[n] for n in part}, format=tarfile.USTAR_FORMAT).read_bytes()
        for part in (range(4), range(4, 6))
    )
    data = make(one, two)
    for folder in ("set", "before", "tars"):
        (tmp_path / folder).mkdir()
    (tmp_path / "set" / "a.tar").write_bytes(data)
    assert main(["index", str(tmp_path / "set")]) == (0 if whole else 2)
    (tmp_path / "before" / "a.tar").write_bytes(one)
    assert main(["index", "--checksums", str(tmp_path / "before")]) == 0
    shard = tmp_path / ("set" if whole else "before") / "a.tar"
    shard.write_bytes(data)
    file = json.loads((shard.parent / "manifest.json").read_text())
    file["shards"][0] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (shard.parent / "manifest.json").write_text(json.dumps(file))
    capsys.readouterr()
    assert main(["verify", str(shard.parent)]) == (0 if whole else 1)
    bad = (
        0 if whole or name == "zeros_over_a_header" else 1
    )  # doctor reads what is behind the last image; verify the rest
    assert main(["doctor", str(shard.parent), "--ranks", "1", "--global-batch", "1"]) == bad
    (tmp_path / "tars" / "n01.tar").write_bytes(data)
    pack(tmp_path / "outer.tar", {"n01.tar": data})
    sources = (
        ["imagenet21k", tmp_path / "tars"],
        ["imagenet21k", tmp_path / "outer.tar"],
        ["imagenet", "--train", tmp_path / "outer.tar"],
    )
    for number, source in enumerate(sources):
        out = tmp_path / f"out{number}"
        assert main([*map(str, source), str(out), "--no-check"]) == (0 if whole else 2)
        assert not whole or Manifest.load(out).samples == 6
    damage: list[Damage] = []
    read = [sample["jpg"] for sample in _read_samples(str(shard), damage)]
    assert (read, damage) == (images, []) if whole else len(damage) == 1 and read == images[: len(read)]
    assert not whole or Manifest.load(tmp_path / "set").samples == 6
