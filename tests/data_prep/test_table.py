"""Lists of images: text, CSV and parquet give the samples that a folder of the same images gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_prep.__main__ import main
from data_prep.plan import ShardPlan
from data_prep.table import read_table
from mimscale.data.manifest import Manifest
from mimscale.data.synthetic import make_image_folder

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("images"), classes=3, per_class=8, side=40)


def names(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.glob("*/*.jpg"))


def converted(folder: Path, *arguments: object) -> dict[bytes, str]:
    """Encoded image -> class name, after a conversion with these arguments; "" without labels."""
    assert main(["table", *map(str, arguments), str(folder), "--shard-samples", "5"]) == 0
    assert main(["verify", "--decode", str(folder)]) == 0
    manifest = Manifest.load(folder)
    classes = manifest.classes
    return {
        manifest.read(n): "" if manifest.labels is None or classes is None else classes[manifest.labels[n]]
        for n in range(manifest.samples)
    }


def expected(root: Path, labelled: bool) -> dict[bytes, str]:
    return {(root / name).read_bytes(): name.split("/")[0] if labelled else "" for name in names(root)}


def test_text(root: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("\n".join(names(root)) + "\n\n")
    assert converted(tmp_path / "out", tmp_path / "list.txt", "--root", root) == expected(root, False)
    (tmp_path / "all.txt").write_text("\n".join(str(root / name) for name in names(root)))
    assert converted(tmp_path / "absolute", tmp_path / "all.txt") == expected(root, False)
    keys = {Manifest.load(tmp_path / "absolute").key(n) for n in range(24)}
    assert keys == {name.removesuffix(".jpg") for name in names(root)}


def test_csv(root: Path, tmp_path: Path) -> None:
    rows = "".join(f"{name},{name.split('/')[0]},{n % 5}\n" for n, name in enumerate(names(root)))
    (tmp_path / "list.csv").write_text("path,label,other\n" + rows)
    arguments = (tmp_path / "list.csv", "--root", root)
    assert converted(tmp_path / "named", *arguments) == expected(root, True)
    assert set(converted(tmp_path / "numbers", *arguments, "--label", "other").values()) == set("01234")
    assert converted(tmp_path / "none", *arguments, "--label", "none") == expected(root, False)


def parquet(root: Path, path: Path, kind: str, rows: slice = slice(None)) -> Path:
    listed = names(root)[rows]
    data = [(root / name).read_bytes() for name in listed]
    images = {
        "struct": [{"bytes": d, "path": None} for d in data],
        "bytes": data,
        "paths": [str(root / name) for name in listed],
    }[kind]
    labels = [name.split("/")[0] for name in listed]
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"image": images, "label": labels}), path, row_group_size=3)
    return path


@pytest.mark.parametrize("kind", ["struct", "bytes", "paths"])
def test_parquet(root: Path, tmp_path: Path, kind: str) -> None:
    table = parquet(root, tmp_path / "one.parquet", kind)
    assert converted(tmp_path / "out", table) == expected(root, True)


def test_a_folder_of_parquet_files(root: Path, tmp_path: Path) -> None:
    for part in range(3):
        parquet(root, tmp_path / "many" / f"{part}.parquet", "struct", slice(8 * part, 8 * part + 8))
    assert converted(tmp_path / "out", tmp_path / "many") == expected(root, True)
    assert converted(tmp_path / "again", tmp_path / "many") == expected(root, True)
    shards = [sorted((tmp_path / name).glob("*.tar")) for name in ("out", "again")]
    assert [path.read_bytes() for path in shards[0]] == [path.read_bytes() for path in shards[1]]


def test_row_groups_stay_together_and_are_shuffled(root: Path, tmp_path: Path) -> None:
    source = read_table(parquet(root, tmp_path / "one.parquet", "struct"))
    plan = ShardPlan(source, seed=0, shard_samples=6)
    groups = [{item.offset // 3 for item in plan.shard(n)} for n in range(plan.shards)]
    assert all(len(group) == 2 for group in groups) and sorted(g for group in groups for g in group) == list(range(8))
    rows = [item.offset for item in plan.items]
    assert sorted(rows) == list(range(24)) and np.any(np.diff(rows) < 0)
    assert [item.offset for item in ShardPlan(source, seed=1, shard_samples=6).items] != rows


def test_rows_without_an_image_are_left_out(root: Path, tmp_path: Path) -> None:
    data = [(root / name).read_bytes() for name in names(root)[:3]]
    pq.write_table(pa.table({"bytes": [data[0], None, b"<html>", data[1]]}), tmp_path / "holes.parquet")
    assert set(converted(tmp_path / "out", tmp_path / "holes.parquet")) == set(data[:2])
    assert set(Manifest.load(tmp_path / "out").file.left_out) == {"holes/000000001", "holes/000000002"}


def test_mistakes_are_named(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(name: str, content: str | None, *options: str) -> str:
        if content is not None:
            (tmp_path / name).write_text(content)
        assert main(["table", str(tmp_path / name), str(tmp_path / "out"), *options]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and not (tmp_path / "out").exists()
        return error

    assert "no such file" in refused("nowhere.txt", None)
    assert "must end in .txt, .csv, .tsv or .parquet" in refused("list.json", "[]")
    assert "1 of 1 files cannot be read (No such file or directory): 'missing.jpg'" in refused(
        "list.txt", "missing.jpg\n"
    )
    assert "no images in" in refused("empty.txt", "\n")
    assert "name the one of the images" in refused("a.csv", "a,b\n1,2\n")
    assert "has columns path, not 'kind'" in refused("b.csv", "path\nx.jpg\n", "--label", "kind")
    assert "2 of 2 rows have no path" in refused("c.csv", 'path\n""\n\n""\n')
    here = root / names(root)[0]
    assert "1 of 2 rows have no label (empty, NaN, None or -1)" in refused("d.csv", f"path,label\n{here},1\n{here},\n")
    assert "cannot be read" in refused("e.parquet", "no parquet")
    (tmp_path / "folder").mkdir()
    assert "holds no .parquet files" in refused("folder", None)
