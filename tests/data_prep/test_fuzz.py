"""Damaged shards, data sets and tables of any kind: no traceback, no hang, nothing taken in silence.

MIMSCALE_FUZZ=2000 python -m pytest -n 0 tests/data_prep/test_fuzz.py --hypothesis-seed=1      # the long run
"""

from __future__ import annotations

import gzip
import io
import random
import shutil
import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.__main__ import main
from mimscale.api.shards import open_shards
from mimscale.data.manifest import Manifest
from mimscale.data.wds_stream import _read_samples
from mimscale.errors import Stopped, UserError
from mimscale.types import Damage
from tests.faults.folders import harm
from tests.fuzz import FUZZ, RUNS, no_hang


def image(number: int) -> bytes:
    return b"\xff\xd8\xff\xe0" + bytes([number]) * (300 + 217 * number)


def shard(kind: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for number in range(6):
            name = f"{'long/' * 30}ü{number}" if number % 2 else f"{number}"
            for extension, data in (("jpg", image(number)), ("cls", b"%d" % (number % 3))):
                info = tarfile.TarInfo(f"{name}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


SHARDS = [shard(kind) for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]
IMAGES = {image(number) for number in range(6)}
BLOCKS = st.integers(0, len(SHARDS[0]) // 512)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A shard with some damage: bytes flipped, blocks removed, repeated, emptied, moved, cut, or something appended."""
    data = bytearray(draw(st.sampled_from(SHARDS)))
    for _ in range(draw(st.integers(1, 4))):
        at, more = draw(BLOCKS) * 512, 512 * draw(st.integers(1, 8))
        what = draw(st.sampled_from(["flip", "header", "remove", "repeat", "zero", "cut", "append", "move"]))
        if what == "flip" and data:
            place = draw(st.integers(0, len(data) - 1))
            data[place] ^= 1 << draw(st.integers(0, 7))
        elif what == "header":  # fields with any contents, and a checksum that fits
            field = draw(st.sampled_from([(0, 100), (124, 12), (156, 1), (257, 8), (345, 155)]))
            value = draw(st.binary(min_size=field[1], max_size=field[1]))
            data[at + field[0] : at + sum(field)] = value[: max(0, len(data) - at - field[0])]
            block = data[at : at + 512]
            if len(block) == 512:
                total = sum(block[:148]) + 256 + sum(block[156:])
                data[at + 148 : at + 156] = b"%06o\0 " % total
        elif what == "remove":
            del data[at : at + more]
        elif what == "repeat":
            data[at:at] = data[at : at + more]
        elif what == "zero":
            data[at : at + more] = bytes(len(data[at : at + more]))
        elif what == "cut":
            del data[draw(st.integers(0, len(data))) :]
        elif what == "append":
            data += draw(st.sampled_from([b"x", bytes(512), SHARDS[1], b"\0" * 700 + b"rest", SHARDS[2][:1500]]))
        else:
            piece = data[at : at + more]
            del data[at : at + more]
            data += piece
    return bytes(data)


@FUZZ
@given(damaged(), st.booleans())
def test_index_verify_and_info_of_damaged_shards(data: bytes, skip: bool) -> None:
    """Either all of a file is accounted for, or it is refused. What is indexed is read as it was indexed."""
    with tempfile.TemporaryDirectory() as place, no_hang():
        folder = Path(place)
        (folder / "a.tar").write_bytes(SHARDS[0])
        (folder / "b.tar").write_bytes(data)
        code = main(["index", place, *(["--skip-bad", "--skip-unlabelled"] if skip else [])])
        assert code in (0, 2)
        assert (folder / "manifest.json").exists() == (code == 0)
        if code == 0:
            manifest = Manifest.load(folder)
            file = manifest.file
            assert manifest.samples >= 6
            assert all(manifest.read(n)[:3] == b"\xff\xd8\xff" for n in range(manifest.samples))
            assert main(["verify", place]) == 0 and main(["info", place]) == 0
            if "b.tar" in file.bad_shards:
                assert manifest.samples == 6
            elif data in SHARDS:
                assert manifest.samples == 12 and not file.skipped


@FUZZ
@given(damaged(), st.booleans())
def test_a_stream_of_damaged_shards(data: bytes, packed: bool) -> None:
    """What is not read is recorded. Contents are not checked by tar, but their number of bytes is."""
    with tempfile.TemporaryDirectory() as place, no_hang():
        path = Path(place) / "a.tar"
        path.write_bytes(gzip.compress(data, 1) if packed else data)
        damage: list[Damage] = []
        samples = list(_read_samples(str(path), damage))
        if data in SHARDS:
            assert len(samples) == 6 and not damage
        elif len(samples) < 6 and not damage:
            names = [key for sample in samples for key in sample]
            assert names or not data  # nothing at all is never taken for a whole shard


def contents(folder: Path) -> list[tuple[str, bytes, int]]:
    """(key, image, label) of every sample."""
    manifest = Manifest.load(folder)
    assert manifest.labels is not None
    return [(manifest.key(n), manifest.read(n), int(manifest.labels[n])) for n in range(manifest.samples)]


@settings(FUZZ, max_examples=max(12, RUNS // 5))
@given(st.integers(0, 2**32 - 1))
def test_one_damaged_file_of_a_data_set(shards: Path, number: int) -> None:
    """Every verb reports; what `verify` lets pass is what was written. All samples are read, or one line says why."""
    dice = random.Random(number)
    with tempfile.TemporaryDirectory() as place, no_hang():
        folder = Path(shutil.copytree(shards, Path(place) / "set"))
        damage = harm(folder, dice.choice(sorted(path.relative_to(folder) for path in folder.iterdir())), dice)
        verbs = (["verify"], ["verify", "--decode"], ["info"], ["doctor", "--ranks", "2", "--global-batch", "8"])
        verified, *codes = [main([*line, str(folder)]) for line in verbs]
        assert {verified, *codes} <= {0, 1, 2}, damage
        try:
            read = sum(len(batch.ids) for batch in open_shards(folder).batches(32, image_size=32, workers=0))
            assert read == 80, damage
        except (UserError, Stopped) as error:
            assert "\n" not in str(error) and verified != 0, damage
        if verified == 0:
            assert contents(folder) == contents(shards), damage


ROWS = st.lists(st.lists(st.text(st.characters(codec="utf-8"), max_size=12), max_size=4), max_size=6)


@FUZZ
@given(ROWS, st.sampled_from(",;\t|"), st.binary(max_size=12), st.booleans())
def test_tables_of_any_text(rows: list[list[str]], mark: str, junk: bytes, tabs: bool) -> None:
    with tempfile.TemporaryDirectory() as place, no_hang():
        folder = Path(place)
        (folder / "x.jpg").write_bytes(image(1))
        lines = [f"path{mark}label{mark}note", f"x.jpg{mark}1{mark}a", *(mark.join(row) for row in rows)]
        data = "\n".join(lines).encode() + junk
        (folder / ("t.tsv" if tabs else "t.csv")).write_bytes(data)
        (folder / "t.txt").write_bytes(b"x.jpg\n" + data.split(b"\n", 2)[-1])
        for number, name in enumerate(sorted(path.name for path in folder.glob("t.*"))):
            for options in ([], ["--skip-missing", "--skip-unlabelled"]):
                out = folder / f"out{number}{len(options)}"
                code = main(["table", str(folder / name), str(out), "--no-check", *options])
                assert code in (0, 2) and (out / "manifest.json").exists() == (code == 0)
                if code == 0:
                    assert Manifest.load(out).samples >= 1


@pytest.mark.parametrize(
    "record", [b"0 path=a\n", b"00000000000 path=a\n", b"9" * 400 + b" path=a\n", b"11 size=" + b"9" * 5000]
)
def test_pax_headers_that_would_not_end(tmp_path: Path, record: bytes) -> None:
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, len(record)
    data = header.tobuf(tarfile.USTAR_FORMAT) + record + bytes(-len(record) % 512) + SHARDS[0]
    (tmp_path / "a.tar").write_bytes(data)
    with no_hang():
        assert main(["index", str(tmp_path)]) in (0, 2)
