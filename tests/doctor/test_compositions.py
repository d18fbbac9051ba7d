"""The table of compositions agrees with the checks, and every composition trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mimscale.config.registry import names_in
from mimscale.config.run import method_class
from mimscale.doctor import compositions
from mimscale.methods.base import MaskedMethod
from mimscale.types import Batch, Targets, TeacherInfo
from tests import golden
from tests.golden import batch_of, run_config
from tests.ranks import DECODER

DOCS = Path(__file__).parents[2] / "docs" / "compositions.md"


def test_the_committed_table_is_current() -> None:
    """For the methods and policies that it has: a new one stops nobody until its row or column is pasted."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in DOCS.read_text().splitlines() if "|" in line]
    header, *body = rows
    names = list(dict.fromkeys(row[0] for row in body if row[0] in compositions.methods()))
    table = compositions.table(names, header[2:])
    assert table in DOCS.read_text(), "paste what `mimscale doctor --compositions` prints"
    assert {"mae", "maskalign", "simmim"} <= set(names) and {"amt", "random"} <= set(header)


def test_answers() -> None:
    plain: dict[str, Any] = {"fusion": {"kind": "none"}}
    assert compositions.answer("mae", "random", plain) == ("yes", [])
    text, reasons = compositions.answer("mae", "attention", plain)
    assert text == "teacher with class token" and "no teacher has a class token" in reasons[0]
    text, reasons = compositions.answer("maskalign", "random", {"fusion": "linear"})
    assert text == "teacher with class token, as deep" and "teachers.t 13 blocks, the student 12" in reasons[-1]
    text, reasons = compositions.answer("mae", "random", {"fusion": {"kind": "mff", "levels": [0]}})
    assert text == "no" and all("would get no gradient" in reason for reason in reasons)


def build(name: str, policy: str, section: dict[str, Any]) -> tuple[MaskedMethod, Batch, dict[str, Targets]]:
    """A method on 64-px images, with a teacher if it uses one, and its inputs."""
    torch.manual_seed(3)
    fields = method_class(name).Config.model_fields
    decoder = DECODER if "decoder_width" in fields else {"levels": "top2"} if name == "maskalign" else {}
    stages = {"stages": {"widths": [8, 12], "depths": [1, 1]}} if name == "convmae" else {}
    masking = {"policy": policy, "ratio": 0.5}
    run = run_config(
        {"name": name, "masking": masking, **decoder, **stages, **section}, {"width": 32, "depth": 12, "heads": 2}
    )
    info = TeacherInfo("t", dim=24, depth=12, grid=(4, 4), image_size=64, has_cls=True)
    has_teacher = name in ("maskalign", "mrmae") or policy in ("attention", "topk")
    method = method_class(name)(run, {"t": info} if has_teacher else {})
    generator = torch.Generator().manual_seed(4)
    noise = {
        purpose: torch.rand(2, *wanted.shape, generator=generator) + 0.01
        for purpose, wanted in method.needs.noise.items()
    }
    levels = {level: torch.randn(2, 16, 24, generator=generator) for level in range(12)}
    cls = {level: torch.randn(2, 24, generator=generator) for level in range(12)}
    attention = torch.rand(2, 16, generator=generator).softmax(dim=1)
    batch = batch_of(torch.randn(2, 3, 64, 64, generator=generator), **noise)
    return method, batch, {"t": Targets(levels, cls, attention)} if has_teacher else {}


@pytest.mark.parametrize("policy", names_in("mimscale.masking"))
@pytest.mark.parametrize("name", compositions.methods())
def test_every_composition_trains_every_parameter(name: str, policy: str) -> None:
    for _, section in compositions.fusions(name):
        method, batch, targets = build(name, policy, section)
        loss = method(batch, targets)["loss"]
        loss.backward()
        assert loss.isfinite()
        golden.every_parameter_has_a_gradient(method)
        assert method.view(batch, targets) is not None
