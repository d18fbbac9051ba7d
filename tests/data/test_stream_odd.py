"""Shards of a stream as other programs write them: compressed, joined, with names of any bytes."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from mimscale.data.wds_stream import _hashed_id, _read_samples
from mimscale.types import Damage

PACK: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


def archive(members: dict[str, bytes], encoding: str = "utf-8", kind: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind, encoding=encoding) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def some(first: int, count: int, size: int = 3000) -> dict[str, bytes]:
    return {f"{n:03d}.jpg": os.urandom(size) for n in range(first, first + count)}


def read(path: Path, data: bytes) -> tuple[list[bytes], list[Damage]]:
    path.write_bytes(data)
    damage: list[Damage] = []
    return [sample["jpg"] for sample in _read_samples(str(path), damage)], damage


@pytest.mark.parametrize("kind", PACK)
def test_compressed_shards_are_read_without_complaint(tmp_path: Path, kind: str) -> None:
    for name in (f"a.tar.{kind}", "a.tar"):
        members = some(0, 8)
        found, damage = read(tmp_path / name, PACK[kind](archive(members)))
        assert found == list(members.values()) and not damage


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_hard_links_are_read_and_symbolic_ones_named(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in some(0, 2).items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name, link, kind in (("008.jpg", "000.jpg", tarfile.LNKTYPE), ("009.jpg", "001.jpg", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, link
            tar.addfile(info)
        info = tarfile.TarInfo("notes")
        info.type, info.linkname = tarfile.SYMTYPE, "elsewhere"  # no image: passed over, as by webdataset
        tar.addfile(info)
    found, damage = read(tmp_path / "a.tar", pack(buffer.getvalue()))
    assert len(found) == 3 and found[2] == found[0] != found[1]
    assert [entry.reason for entry in damage] == ["OSError: '009.jpg' is a link or device, which is not followed"]


def test_large_and_joined_compressed_shards(tmp_path: Path) -> None:
    members = [some(0, 30, 1 << 20), some(30, 5), some(40, 2)]
    one, two, three = map(archive, members)
    everything = [data for part in members for data in part.values()]
    for data in (gzip.compress(one + two + three, 1), gzip.compress(one, 1) + gzip.compress(two + three, 1)):
        found, damage = read(tmp_path / "a.tar.gz", data)
        assert found == everything and not damage
    with_zeros = gzip.compress(two + bytes(20 << 20), 1)
    found, damage = read(tmp_path / "a.tar.gz", with_zeros)
    assert found == list(members[1].values()) and not damage


@pytest.mark.parametrize("kind", PACK)
def test_damage_in_compressed_shards_is_recorded(tmp_path: Path, kind: str) -> None:
    members = some(0, 8)
    plain = archive(members)
    packed = PACK[kind](plain)
    hole = plain[:8192] + bytes(4096) + plain[12288:]
    unfinished = plain[: plain.index(b"007.jpg")]
    for data in (packed[: len(packed) // 2], packed[:-3], PACK[kind](hole), PACK[kind](unfinished), packed[:9]):
        found, damage = read(tmp_path / "a.tar", data)
        assert damage and damage[0].shard == "a.tar" and damage[0].reason
        assert "9,223" not in damage[0].reason


def test_names_of_any_bytes(tmp_path: Path) -> None:
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        members = {f"caf\xe9 {'x' * 200}\n{n}.jpg": bytes([n]) for n in range(3)}
        path = tmp_path / os.fsdecode(b"a\xff.tar")
        found, damage = read(path, archive(members, "latin-1", kind))
        assert found == list(members.values()) and not damage
    assert _hashed_id(os.fsdecode(b"caf\xe9")) != _hashed_id(os.fsdecode(b"caf\xe8"))


def test_what_belongs_to_no_image_is_counted_and_is_no_damage(tmp_path: Path) -> None:
    """As index has it. A dotted name of an image is damage, since the image would be lost in silence."""
    image = os.urandom(900)
    apple = dict.fromkeys(("._0.jpg", "__MACOSX/0.jpg", ".DS_Store", "__meta__/shard.json"), b"\x00\x05\x16\x07")
    members = {**apple, "0.jpg": image, "README": b"x", "0.cls": b"1", "notes.txt": b"y", "1.v2.jpg": image}
    (tmp_path / "a.tar").write_bytes(archive(members))
    damage: list[Damage] = []
    passed = Counter[str]()
    found = list(_read_samples(str(tmp_path / "a.tar"), damage, passed))
    assert [sorted(sample) for sample in found] == [
        ["__key__", "__url__", "cls", "jpg"],
        ["__key__", "__url__", "v2.jpg"],
    ]
    assert passed == {"hidden, of the system or metadata": 4, "without an extension": 1, "samples without an image": 1}
    assert not damage


def test_a_second_image_with_the_same_name_is_kept(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        for data in (b"one", b"two"):
            info = tarfile.TarInfo("a.jpg")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    found, damage = read(tmp_path / "b.tar", (tmp_path / "b.tar").read_bytes())
    assert found == [b"one", b"two"] and not damage


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_shard_that_is_truncated_behind_contents_of_zeros(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    """Zeros at the end of the file are no end mark where a member's contents are zero."""
    whole = archive({"0.jpg": b"x", "0.npy": bytes(4096), "1.jpg": b"y"})
    cut = whole[: whole.index(b"1.jpg")]
    found, damage = read(tmp_path / "a.tar", pack(cut))
    assert found == [b"x"] and len(damage) == 1 and "truncated" in damage[0].reason
    one_block = whole[: whole.rindex(b"y") + 512 + 512]
    found, damage = read(tmp_path / "a.tar", pack(one_block[: len(one_block) // 512 * 512]))
    assert found == [b"x", b"y"] and not damage


def test_compression_that_is_not_read_is_named(tmp_path: Path) -> None:
    found, damage = read(tmp_path / "a.tar.zst", b"\x28\xb5\x2f\xfd" + bytes(900))
    assert (
        not found
        and f"it is compressed (zstd), which a stream does not read; unpack it: zstd --rm -d '{tmp_path}"
        in (damage[0].reason)
    )
