"""Labels are numbers or names by their value, in any spelling."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.labels import MAX_CLASSES, classes_of, label_value
from data_prep.table import TableOptions, read_table
from mimscale.data.synthetic import make_image_folder
from mimscale.errors import UserError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.mark.parametrize("value", [2, 2.0, "2", "2.0", " 2. ", b"2\n", "002", "+2", "2e0", "20e-1"])
def test_spellings_of_a_number(value: object) -> None:
    assert label_value(value) == 2 and isinstance(label_value(value), int)


@pytest.mark.parametrize("value", [None, "", " ", "nan", float("nan"), "NaN", "None", "<NA>", -1, -1.0, "-1", "-1.0"])
def test_no_label(value: object) -> None:
    assert label_value(value) is None


@pytest.mark.parametrize("value", ["cat", "n01440764", "inf", "1_000", "2 cats", "½"])
def test_names(value: str) -> None:
    assert label_value(value) == value


def test_numbers_are_the_indices_and_names_are_sorted() -> None:
    assert classes_of(["0.0", "10.0", "2.0", "2"], "x") == (
        [str(n) for n in range(11)],
        {"0.0": 0, "10.0": 10, "2.0": 2, "2": 2},
    )
    assert classes_of(["b", "a", "0", "0.0"], "x") == (["0", "a", "b"], {"b": 2, "a": 1, "0": 0, "0.0": 0})


@pytest.mark.parametrize(
    ("label", "message"),
    [("2.5", "no whole number"), ("-2", "below 0"), (str(MAX_CLASSES), "is an id"), ("9" * 29, "id")],
)
def test_numbers_that_are_no_class(label: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        classes_of(["0", label], "x")


def table(tmp_path: Path, labels: list[object]) -> Path:
    images = sorted(make_image_folder(tmp_path / "images", classes=1, per_class=len(labels), side=16).glob("*/*.jpg"))
    rows = "".join(f"{path},{label}\n" for path, label in zip(images, labels, strict=True))
    (tmp_path / "list.csv").write_text("path,label\n" + rows)
    data = [path.read_bytes() for path in images]
    values = [None if label in ("", "nan") else float(str(label)) for label in labels]
    pq.write_table(pa.table({"image": data, "label": values}), tmp_path / "list.parquet", row_group_size=2)
    return tmp_path


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_rows_without_a_label_are_refused_or_left_out(tmp_path: Path, kind: str) -> None:
    labels: list[object] = ["3.0", "nan", "11", "", "-1", "0"]
    path = table(tmp_path, labels) / f"list.{kind}"
    with pytest.raises(UserError, match="3 of 6 rows have no label"):
        read_table(path)
    source = read_table(path, options=TableOptions(skip_unlabelled=True))
    assert [item.label for item in source.items] == [3, 11, 0] and source.skipped == {"without a label": 3}
    assert source.classes == [str(n) for n in range(12)]
    assert source.runs == (None if kind == "csv" else [1, 1, 1])
    assert read_table(path, options=TableOptions(label="none")).classes is None


def test_an_id_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    path = table(tmp_path, ["1585214400", "3"]) / "list.csv"
    limit = 3 << 30

    done = subprocess.run(
        [sys.executable, "-m", "data_prep", "table", str(path), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "2 rows, 2 different labels: label 1,585,214,400 is an id" in done.stderr


@pytest.mark.parametrize("label", ["inf", "-inf", "Infinity"])
def test_an_infinite_label_among_numbers_renumbers_no_class(label: str) -> None:
    """As a column of floats after a division by zero; among names it is a name."""
    with pytest.raises(UserError, match=f"label {label} is no whole number"):
        classes_of([label, "3", "0.0"], "table")
    assert classes_of([label, "bird", "cat"], "table")[0] == sorted([label, "bird", "cat"])
    assert classes_of([label], "table")[0] == [label]


def test_a_byte_order_mark_before_a_label_is_no_part_of_it() -> None:
    assert label_value(b"\xef\xbb\xbf2\r\n") == 2


@pytest.mark.parametrize("odd", ["?", "1,000", "0x1", "１", "NaT", "1_0", "cat"])
def test_a_name_among_numbers_renumbers_no_class(odd: str) -> None:
    """Sorted as text, 10 would be class 2 and 2 class 3."""
    with pytest.raises(UserError, match=f"for example '{re.escape(odd)}', and .* would become class"):
        classes_of(["0", "1", "2", "10", odd], "table")
    digits_and_letters = [*map(str, range(10)), "A", "b"]
    assert classes_of(digits_and_letters, "table")[1] == {label: n for n, label in enumerate(digits_and_letters)}


def test_numbers_with_a_comma_are_not_sorted_as_text() -> None:
    with pytest.raises(UserError, match="label '3,0' has a comma"):
        classes_of(["3,0", "10,0"], "table")
    assert classes_of(["3,0", "10,0"], "table", ["10,0", "3,0"])[1] == {"3,0": 1, "10,0": 0}
    assert classes_of(["3,0", "cat"], "table")[0] == ["3,0", "cat"]


def test_the_list_of_classes_decides() -> None:
    """Where labels are names, a number may be one of them, and so may a word for a missing value."""
    assert classes_of(["50", "other", "10"], "x", ["10", "50", "other"])[1] == {"50": 1, "other": 2, "10": 0}
    assert classes_of(["none", "cat"], "x", ["cat", "none"])[1] == {"none": 1, "cat": 0}
    assert label_value("none") is None and label_value("N/A") is None and label_value("#N/A") is None
    for names, message in ((["a", "a"], "'a' is given twice"), (["a", "", "b"], "class 1 has an empty name")):
        with pytest.raises(UserError, match=message):
            classes_of(["a"], "x", names)
