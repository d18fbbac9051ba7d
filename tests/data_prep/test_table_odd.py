"""Tables as other programs write them: encodings, dialects, quotes, missing files, odd columns."""

from __future__ import annotations

import csv
import datetime
import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from data_prep.__main__ import main
from data_prep.table import TableOptions, read_table
from mimscale.data.manifest import Manifest
from mimscale.data.synthetic import make_image_folder
from mimscale.errors import UserError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    for number, path in enumerate(sorted(make_image_folder(folder / "x", classes=1, per_class=6, side=16).glob("*/*"))):
        path.rename(folder / f"{number}.jpg")
    return folder


def names(root: Path, content: str | bytes, name: str = "t.csv", **options: object) -> list[tuple[str, str]]:
    """(file, class) of the rows of a table."""
    table = root / name
    table.write_bytes(content if isinstance(content, bytes) else content.encode())
    source = read_table(table, options=TableOptions(**options))  # type: ignore[arg-type]
    return [(os.path.basename(i.path), "" if source.classes is None else source.classes[i.label]) for i in source.items]


TWO = [("0.jpg", "cat"), ("1.jpg", "dog")]


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_dialects(root: Path, mark: str, end: str, encoding: str) -> None:
    text = end.join(
        mark.join(row) for row in (("label", " path", "note"), ("cat", "0.jpg", "a"), ("dog", "1.jpg", "ü"))
    )
    assert names(root, (text + end).encode(encoding)) == TWO


def test_delimiter_by_the_column_that_is_asked_for_or_given(root: Path) -> None:
    text = "a;b,c;d,photo\n1,0.jpg\n2,1.jpg\n"
    with pytest.raises(UserError, match="row 2: 2 fields, but 3 columns"):
        names(root, text, image="photo")
    text = "a;b,photo\n1,0.jpg\n2,1.jpg\n"
    assert [name for name, _ in names(root, text, image="photo")] == ["0.jpg", "1.jpg"]
    assert [name for name, _ in names(root, "path~z\n0.jpg~1\n", delimiter="~")] == ["0.jpg"]


def test_fields_with_every_separator(root: Path) -> None:
    caption = 'one\u2028two\x85three\x0bfour, "five"\nsix\r\n' + "x" * 200_000
    with open(root / "q.csv", "w", newline="") as file:
        csv.writer(file).writerows([["path", "caption", "label"], ["0.jpg", caption, "cat"], ["1.jpg", "b", "dog"]])
    assert names(root, (root / "q.csv").read_bytes()) == TWO


def test_tabs_with_lone_quotes(root: Path) -> None:
    text = 'path\tcaption\tlabel\n0.jpg\t"open\tcat\n1.jpg\t5" screen\t"dog"\n'
    assert names(root, text, "t.tsv") == TWO
    quoted = 'path\tcaption\tlabel\n0.jpg\t"tab\there"\tcat\n1.jpg\t""\tdog\n'
    assert names(root, quoted, "t.tsv") == TWO


@pytest.mark.parametrize(
    "text, message",
    [
        ('path,label\n0.jpg,"cat\n1.jpg,dog\n', "is not a row of CSV"),
        ("path,label\n0.jpg,cat,more\n", "row 2: 3 fields, but 2 columns"),
        ("path,label\n0.jpg\n", "row 2: 1 fields, but 2 columns"),
        ("path,path,label\n0.jpg,1.jpg,cat\n", "has 2 columns 'path'"),
        ("0.jpg,cat\n1.jpg,dog\n", "its first line must name the columns"),
    ],
)
def test_what_would_lose_rows_is_refused(root: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        names(root, text)


def test_names_that_are_not_utf8(root: Path) -> None:
    name = os.fsdecode(b"caf\xe9 \xff.jpg")
    (root / name).write_bytes((root / "0.jpg").read_bytes())
    for content, table in ((b"path\ncaf\xe9 \xff.jpg\n", "l.csv"), (b"caf\xe9 \xff.jpg\n", "l.txt")):
        assert names(root, content, table) == [(name, "")]
        out = root / f"out_{table}"
        assert main(["table", str(root / table), str(out)]) == 0 and Manifest.load(out).samples == 1
    assert main(["table", str(root / "l.csv"), str(root / os.fsdecode(b"out\xe9"))]) == 0


def test_every_missing_file_is_counted(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = "".join(f"missing/{number:02d}.jpg,0\n" for number in range(25))
    (root / "m.csv").write_text("path,label\n0.jpg,0\n" + rows)
    assert main(["table", str(root / "m.csv"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "25 of 26 files cannot be read" in error
    assert "missing/09.jpg" in error and "missing/10.jpg" not in error and "--skip-missing" in error
    assert main(["table", str(root / "m.csv"), str(tmp_path / "out"), "--skip-missing"]) == 0
    assert sum(Manifest.load(tmp_path / "out").file.skipped.values()) == 25
    with pytest.raises(UserError, match="addresses are not downloaded"):
        names(root, "path\nhttps://host/a.jpg\n")


@pytest.mark.parametrize("name", ["a::b.parquet", "UPPER.PARQUET", "x.parquet::y.parquet"])
def test_parquet_files_by_any_name(root: Path, tmp_path: Path, name: str) -> None:
    data = [(root / f"{n}.jpg").read_bytes() for n in range(3)]
    pq.write_table(pa.table({"my::image": data}), tmp_path / name, row_group_size=2)
    assert main(["table", str(tmp_path / name), str(tmp_path / "out"), "--image", "my::image"]) == 0
    manifest = Manifest.load(tmp_path / "out")
    assert sorted(manifest.read(n) for n in range(3)) == sorted(data)


def test_path_where_bytes_are_null(root: Path, tmp_path: Path) -> None:
    def write(values: list[Any], name: str) -> Path:
        pq.write_table(pa.table({"image": pa.array(values, type=STRUCT)}), tmp_path / name)
        return tmp_path / name

    paths = write([{"bytes": None, "path": f"{n}.jpg"} for n in range(3)], "paths.parquet")
    assert main(["table", str(paths), str(tmp_path / "out"), "--root", str(root)]) == 0
    mixed = [
        {"bytes": (root / "0.jpg").read_bytes(), "path": "gone.jpg"},
        {"bytes": None, "path": "1.jpg"},
        {"bytes": None, "path": "gone.jpg"},
        {"bytes": None, "path": None},
    ]
    assert main(["table", str(write(mixed, "m.parquet")), str(tmp_path / "mixed"), "--root", str(root)]) == 0
    manifest = Manifest.load(tmp_path / "mixed")
    assert {manifest.read(n) for n in range(2)} == {(root / f"{n}.jpg").read_bytes() for n in range(2)}
    assert manifest.samples == 2 and len(manifest.file.left_out) == 2
    missing = write([{"bytes": None, "path": "gone.jpg"}], "gone.parquet")
    with pytest.raises(UserError, match="1 of 1 files cannot be read"):
        read_table(missing)


@pytest.mark.parametrize(
    "column", [[[b"SECRET" * 99]], [{"a": {"b": b"SECRET"}}], [1], [[{"bytes": b"SECRET", "path": None}] * 2], [None]]
)
def test_columns_that_hold_no_images_are_refused_without_their_content(tmp_path: Path, column: list[object]) -> None:
    pq.write_table(pa.table({"image": column}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="'image' holds [a-z0-9]+, not one image") as error:
        read_table(tmp_path / "a.parquet")
    assert "SECRET" not in str(error.value) and len(str(error.value)) < 400 + len(str(tmp_path))
    images = {"image": [b"\xff\xd8\xff"], "label": [[b"SECRET"]]}
    pq.write_table(pa.table(images), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="'label' holds list, not class labels") as error:
        read_table(tmp_path / "a.parquet")


def hugging_face(path: Path, labels: list[int], classes: object) -> Path:
    features = {"image": {"_type": "Image"}, "label": {"names": classes, "_type": "ClassLabel"}}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    table = pa.table({"image": [b"\xff\xd8\xff\xe0" + bytes([n]) for n in range(len(labels))], "label": labels})
    path.parent.mkdir(exist_ok=True, parents=True)
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return path


@pytest.mark.parametrize("classes", [["tench", "shark", "ray"], {"0": "tench", "1": "shark", "2": "ray"}])
def test_class_names_of_hugging_face(tmp_path: Path, classes: object) -> None:
    source = read_table(hugging_face(tmp_path / "a.parquet", [2, 0, 2], classes))
    assert source.classes == ["tench", "shark", "ray"] and [item.label for item in source.items] == [2, 0, 2]
    with pytest.raises(UserError, match="label 3 has no name among the 3"):
        read_table(hugging_face(tmp_path / "a.parquet", [3], classes))
    with pytest.raises(UserError, match="2 of 3 rows have no label"):
        read_table(hugging_face(tmp_path / "a.parquet", [-1, -1, 0], classes))
    hugging_face(tmp_path / "two/sub/a.parquet", [0], classes)
    assert read_table(tmp_path / "two").classes == ["tench", "shark", "ray"]  # folders below too
    hugging_face(tmp_path / "two/b.parquet", [0], ["ray", "shark"])
    with pytest.raises(UserError, match="its files name different classes"):
        read_table(tmp_path / "two")


def test_classes_of_a_file(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "names.txt").write_bytes("\ufeffdog\r\ncat\r\nbird\r\n".encode())
    (root / "c.csv").write_text("path,label\n0.jpg,cat\n1.jpg,dog\n2.jpg,1\n")
    out = tmp_path / "out"
    assert main(["table", str(root / "c.csv"), str(out), "--classes", str(tmp_path / "names.txt")]) == 0
    manifest = Manifest.load(out)
    assert manifest.classes == ["dog", "cat", "bird"] and manifest.labels is not None
    assert sorted(manifest.labels.tolist()) == [0, 1, 1]
    (root / "c.csv").write_text("path,label\n0.jpg,cat\n1.jpg,frog\n")
    assert main(["table", str(root / "c.csv"), str(tmp_path / "o"), "--classes", str(tmp_path / "names.txt")]) == 2
    assert "1 labels are not among the 3 class names, the first is 'frog'" in capsys.readouterr().err


def test_a_row_group_is_read_once_and_memory_holds_a_part_of_it(tmp_path: Path) -> None:
    """One group of 48 MB in 24 shards: the bytes that the process reads, and Arrow's largest allocation.

    Small batches when writing make small pages, which are what is read at a time.
    """
    rng_rows = [b"\xff\xd8\xff\xe0" + os.urandom(200_000) for _ in range(240)]
    path = tmp_path / "one.parquet"
    table = pa.table({"image": pa.array([{"bytes": row, "path": None} for row in rng_rows], type=STRUCT)})
    pq.write_table(table, path, row_group_size=240, compression="none", write_batch_size=8)
    del table
    pool, before = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        read_before = _bytes_read()
        assert main(["table", str(path), str(tmp_path / "out"), "--no-check", "--shard-samples", "10"]) == 0
        read = _bytes_read() - read_before
        peak = pool.max_memory()
    finally:
        pa.set_memory_pool(before)
    assert read < 1.5 * path.stat().st_size
    assert 0 < peak < path.stat().st_size / 2
    manifest = Manifest.load(tmp_path / "out")
    assert {manifest.read(n) for n in range(240)} == set(rng_rows)


def _bytes_read() -> int:
    with open("/proc/self/io") as file:
        return int(next(line for line in file if line.startswith("rchar")).split()[1])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", gzip.compress(b"path,label\nx.jpg,1\n", mtime=0), "is compressed (gzip); unpack it"),
        ("a.csv", "path,label\nx.jpg,1\n".encode("utf-16-be"), "save it as UTF-8"),
        ("a.tsv", b"", "is empty; its first line names the columns"),
        ("a.csv", b"image\n/9j/4AAQSkZJRgABAQAAAQABAAD" + b"A" * 9000 + b"\n", "holds images as base64 text"),
        ("a.csv", "\u200bpath,label\nx.jpg,1\n".encode(), "has columns \\u200bpath, label"),
    ],
)
def test_files_that_are_something_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    assert main(["table", str(tmp_path / name), str(tmp_path / "out")]) == 2
    assert message in (error := capsys.readouterr().err) and len(error) < 600 + len(str(tmp_path))


def test_excels_line_and_rows_that_name_a_file_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_image_folder(tmp_path / "images", classes=1, per_class=2, side=16)
    first, second = sorted((tmp_path / "images").glob("*/*.jpg"))
    (tmp_path / "a.csv").write_text(f"sep=;\r\npath;label\r\n{first};0\r\n{second};1\r\n{first};1\r\n")
    assert main(["table", str(tmp_path / "a.csv"), str(tmp_path / "out")]) == 0
    assert "1 rows name a file again, and are kept, 1 of them with different labels" in capsys.readouterr().err


def test_columns_of_views_and_of_dates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = next((make_image_folder(tmp_path / "images", classes=1, per_class=1, side=16)).glob("*/*.jpg"))
    images = pa.array([path.read_bytes()], pa.binary_view())
    pq.write_table(pa.table({"image": images, "label": [0]}), tmp_path / "a.parquet")
    assert main(["table", str(tmp_path / "a.parquet"), str(tmp_path / "out")]) == 0
    pq.write_table(pa.table({"image": images, "label": [datetime.date(2020, 1, 1)]}), tmp_path / "b.parquet")
    assert main(["table", str(tmp_path / "b.parquet"), str(tmp_path / "out2")]) == 2
    assert "column 'label' holds date32" in capsys.readouterr().err


def test_texts_of_parquet_that_are_not_utf8(root: Path, tmp_path: Path) -> None:
    """As programs write them that do not check: labels, paths, and paths beside bytes that are null."""
    name = os.fsdecode(b"caf\xe9.jpg")
    (tmp_path / name).write_bytes((root / "0.jpg").read_bytes())
    (tmp_path / "tea.jpg").write_bytes((root / "1.jpg").read_bytes())
    paths = pa.array([b"caf\xe9.jpg", b"tea.jpg"]).view(pa.string())
    pq.write_table(pa.table({"path": paths, "label": paths}), tmp_path / "paths.parquet")
    source = read_table(tmp_path / "paths.parquet")
    assert [os.path.basename(item.path) for item in source.items] == source.classes == [name, "tea.jpg"]
    struct = pa.StructArray.from_arrays(
        [pa.array([None, b"\xff\xd8\xff"], pa.binary()), paths], names=["bytes", "path"]
    )
    pq.write_table(pa.table({"image": struct}), tmp_path / "struct.parquet")
    assert main(["table", str(tmp_path / "struct.parquet"), str(tmp_path / "out"), "--no-check"]) == 0
    manifest = Manifest.load(tmp_path / "out")
    assert {manifest.read(n) for n in range(2)} == {(root / "0.jpg").read_bytes(), b"\xff\xd8\xff"}


@pytest.mark.parametrize("kind", ["csv", "tsv", "txt"])
def test_lines_that_end_with_carriage_returns_only(root: Path, kind: str) -> None:
    mark = "\t" if kind == "tsv" else ","
    rows = ["0.jpg", "1.jpg"] if kind == "txt" else [f"path{mark}label", f"0.jpg{mark}cat", f"1.jpg{mark}dog"]
    assert names(root, "\r".join([*rows, ""]), f"mac.{kind}") == (
        TWO if kind != "txt" else [("0.jpg", ""), ("1.jpg", "")]
    )


def test_hidden_parquet_files_are_counted(root: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [(root / "0.jpg").read_bytes()]}), tmp_path / "a.parquet")
    (tmp_path / "._a.parquet").write_bytes(b"\0\5\x16\7")
    (tmp_path / ".cache").mkdir()
    source = read_table(tmp_path)
    assert source.skipped == {"hidden or of the system": 1, "folders that are hidden or of the system": 1}
