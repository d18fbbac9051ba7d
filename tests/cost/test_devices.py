"""The table of machines, and measured numbers in its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mimscale.cost.devices import DEVICES, INTERCONNECTS, device, interconnect
from mimscale.errors import UserError


def test_every_row_has_a_source_and_sane_numbers() -> None:
    for row in DEVICES.values():
        assert row.source and 0 < row.matmul <= 1 and 0 < row.efficiency <= 1
        assert row.reserved < row.memory
    for link in INTERCONNECTS.values():
        assert link.source and link.bandwidth > 0


def test_measured_values_take_the_place_of_the_tables(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    file.write_text(
        json.dumps(
            {"device": {"bandwidth": 1e12, "peak": {"bf16": 5e14}, "source": "me"}, "host": {"step_s": 0.5}, "x": 1}
        )
    )
    row = device("H100", file)
    assert (row.bandwidth, row.peak["bf16"], row.host.step_s) == (1e12, 5e14, 0.5)
    assert row.peak["fp16"] == DEVICES["h100"].peak["fp16"] and row.host.kernel_s == DEVICES["h100"].host.kernel_s
    assert str(file) in row.source


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "neither a section device nor a section host"),
        ('{"device": {"bandwith": 1}}', "did you mean 'bandwidth'"),
        ('{"host": {"step_s": -1}}', "must be a number above 0"),
        ('{"host": {"step_s": true}}', "step_s = True must be a number above 0"),
        ('{"host": {"step_s": 1' + "0" * 400 + "}}", "must be a number above 0"),
        ('{"device": {"matmul": Infinity}}', "matmul = inf must be a number above 0"),
        ('{"device": {"peak": 5}}', "device.peak = 5 must be a rate for each precision"),
        ('{"device": {"peak": {"bf17": 5e14}}}', "did you mean 'bf16'"),
        ('{"device": {"peak": {"bf16": "fast"}}}', "peak.bf16 = 'fast' must be a number above 0"),
        ('{"device": {"memory": 1e9}}', "nothing would be left for tensors"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bench.json").write_text(text)
    with pytest.raises(UserError, match=message):
        device("h100", tmp_path / "bench.json")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'h100'"):
        device("h10")
    with pytest.raises(UserError, match="did you mean 'ib8x400'"):
        interconnect("ib8x40", DEVICES["h100"])
