"""The parts of an evaluation while a run trains: subset, copy of the student, checks of the section."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from mimscale.config.recipes import load_recipe, validate
from mimscale.config.run import method_class
from mimscale.data.loader import eval_batches
from mimscale.data.manifest import Manifest
from mimscale.distributed.coordination import Coordinator
from mimscale.distributed.world import World
from mimscale.errors import UserError
from mimscale.evals import protocols
from mimscale.evals.config import EvalsConfig
from mimscale.evals.frozen_student import StudentSkeleton, copied
from mimscale.evals.subset import evenly_spread, part_of, read_images
from mimscale.evals.while_training import CheckedEvals, Evaluator, prepare
from mimscale.models.vit import ViT
from tests import ranks
from tests.evals.conftest import shards, small_run

CPU = torch.device("cpu")


def checked(data: tuple[Path, Path], **section: Any) -> CheckedEvals:
    run = small_run("mae")
    values = {"val": str(data[1]), "train": str(data[0]), "protocols": {"ridge": {}}, **section}
    config = run.data.model_copy(update={"workers": 2})
    return prepare(EvalsConfig.model_validate(values), config, Manifest.load(data[0]), 8, 0)


def test_the_subset_is_spread_over_the_data_set(data: tuple[Path, Path]) -> None:
    manifest = Manifest.load(data[0])
    assert evenly_spread(manifest, 4).ids.tolist() == [0, 30, 60, 90]
    whole = evenly_spread(manifest, 10**6)
    assert whole.ids.tolist() == list(range(120)) and manifest.labels is not None
    assert whole.labels.tolist() == manifest.labels.tolist()
    for world in (1, 2, 7):
        parts = [part_of(whole, rank, world).ids.tolist() for rank in range(world)]
        assert sum(parts, []) == list(range(120)) and max(map(len, parts)) - min(map(len, parts)) <= 1
    assert whole.as_manifest().samples == 120 and evenly_spread(manifest, 4).as_manifest().samples == 4


def test_images_are_the_centre_crops_of_an_evaluation(data: tuple[Path, Path]) -> None:
    manifest = Manifest.load(data[1])
    images = read_images(evenly_spread(manifest, 10**6), 32, 0.875, threads=3)
    batches = eval_batches(manifest, 32, batch=45, workers=0)
    assert torch.equal(images, torch.cat([batch.images[: int(batch.weights.sum())] for batch in batches]))  # type: ignore[union-attr]
    nothing = part_of(evenly_spread(manifest, 1), 1, 3)
    assert read_images(nothing, 32, 0.875, 1).shape == (0, 3, 32, 32)


@pytest.mark.parametrize("name", [*ranks.METHODS])
def test_the_copy_of_a_student_computes_what_the_student_does(name: str, tmp_path: Path) -> None:
    run = load_recipe(str(ranks.recipe(tmp_path, tmp_path, name)))
    from mimscale.teachers.ensemble import build_skeletons, describe

    method = method_class(run.method.name)(run, describe(build_skeletons(run.teachers, run.data.image_size)))
    skeleton = StudentSkeleton(method.student)
    tensors = [(n, p) for n, p in method.named_parameters() if n.startswith("student.")]
    student = skeleton.filled([*copied(tensors, torch.float32), *method.student.named_buffers()])
    images = torch.randn(2, 3, 32, 32)
    method.eval()
    with torch.no_grad():
        assert torch.equal(student(images).tokens, method.student(images).tokens)
    assert not student.training and not any(p.requires_grad for p in student.parameters())
    ours = {p.data_ptr() for p in student.parameters()}
    assert not ours & {p.data_ptr() for p in method.student.parameters()}
    with pytest.raises(KeyError, match="was not given"):
        skeleton.filled(copied(tensors[1:], torch.float32))


def test_a_failing_copy_still_takes_every_parameter() -> None:
    taken = []

    def given() -> Any:
        for index in range(3):
            taken.append(index)
            yield f"student.{index}", torch.zeros(2) if index else "no tensor"

    with pytest.raises(AttributeError):
        copied(given(), torch.float32)
    assert taken == [0, 1, 2]


GREEDY = '''
import random
import numpy, torch
from pydantic import Field
from mimscale.config.base import Strict
from mimscale.errors import UserError
from mimscale.evals.protocols.base import Protocol


class GreedyConfig(Strict):
    least: int = Field(1, ge=1)


class Greedy(Protocol):
    """draws from every global generator and writes over the features that it is given"""

    Config = GreedyConfig
    metrics = {"greedy": "greedy"}

    @classmethod
    def check(cls, config, train, val):
        if train.samples < config.least:
            raise UserError(f"--least {config.least} is more than the {train.samples} training samples; lower it")

    def run(self, train, val):
        train.values.zero_()
        return {"greedy": float(torch.rand(1)) + random.random() + float(numpy.random.rand())}
'''


@pytest.fixture
def greedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A protocol of this name, beside those of the package."""
    folder = tmp_path / "protocols"
    folder.mkdir()
    (folder / "greedy.py").write_text(GREEDY)
    monkeypatch.setattr(protocols, "__path__", [*protocols.__path__, str(folder)])
    yield
    sys.modules.pop(f"{protocols.__name__}.greedy", None)


@pytest.mark.usefixtures("greedy")
def test_generators_and_features_survive_a_protocol(data: tuple[Path, Path]) -> None:
    torch.manual_seed(0)
    student = ViT(small_run("mae").student, 32)
    found = []
    choices: tuple[dict[str, Any], ...] = ({"ridge": {}}, {"greedy": {}, "ridge": {}})
    for names in choices:
        evaluator = Evaluator(checked(data, protocols=names), student, World(0, 1, 0, CPU), Coordinator(), "fp32")
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]
        state = [(f"student.{n}", p) for n, p in student.named_parameters()]
        found.append(evaluator.evaluate(lambda prefix: iter(state), student.named_buffers()).metrics)  # noqa: B023  # at once
        after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]
        assert before[:2] == after[:2] and torch.equal(before[2], after[2])
    assert found[1].pop("greedy") >= 0
    assert found[0] == found[1] and found[0].keys() == {"ridge", "rankme", "spread"}


def test_features_that_are_not_finite_are_no_figure(data: tuple[Path, Path]) -> None:
    student = ViT(small_run("mae").student, 32)
    evaluator = Evaluator(checked(data), student, World(0, 1, 0, CPU), Coordinator(), "fp32")
    broken = [(f"student.{n}", torch.full_like(p, torch.nan)) for n, p in student.named_parameters()]
    with pytest.raises(ValueError, match="not finite"):
        evaluator.evaluate(lambda prefix: iter(broken), student.named_buffers())


def test_the_default_interval_follows_the_images() -> None:
    config = EvalsConfig(val=Path("v"))
    assert config.interval(12_000, 4096) == 1000  # 293 would train on 100 times the images
    assert config.interval(12_000, 256) == 4688 and config.interval(100, 32) == 1000
    assert EvalsConfig(val=Path("v"), every=7).interval(12_000, 4096) == 7
    evals = CheckedEvals(config, None, None, 10, {}, 32, 1, 0)  # type: ignore[arg-type]
    assert [step for step in range(1, 26) if evals.due(step, 25)] == [10, 20, 25]


@pytest.mark.parametrize(
    ("section", "line"),
    [
        ({"protocols": {"knm": {}}}, "evals.protocols: 'knm' is unknown; did you mean 'knn'?"),
        ({"evry": 5}, "unknown key evals.evry; did you mean 'every'?"),
        ({"every": 0}, "evals.every = 0: input should be greater than or equal to 1"),
        ({"val": None}, "evals.val"),
    ],
)
def test_a_bad_section_is_one_line(section: dict[str, Any], line: str) -> None:
    values = small_run("mae").dump()
    with pytest.raises(UserError) as found:
        validate({**values, "evals": {"val": "shards/val", **section}}, "r.yaml")
    assert line in str(found.value) and "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("section", "line"),
    [
        ({"val": "/nowhere"}, "evals.val = /nowhere: data set '/nowhere': no such folder"),
        ({"protocols": {"greedy": {"least": 0}}}, "evals.protocols.greedy.least = 0: input should be greater than or"),
        ({"protocols": {"greedy": {"lest": 1}}}, "unknown key evals.protocols.greedy.lest; did you mean 'least'?"),
        ({"protocols": {"greedy": {"least": 11}}, "train_samples": 10}, "evals.protocols.greedy: --least 11 is more"),
        ({"protocols": {"attentive": {}}}, "'attentive' does not learn from pooled features; measure it after the run"),
        ({"val": "TRAIN"}, "is the training set itself"),
        ({"val": "TRAIN", "train": "VAL"}, "is the training set itself; give data that data.shards = "),
        ({"val": "UNLABELLED"}, "has samples without labels"),
        ({"val": "OTHER"}, "has other classes than evals.train"),
        (
            {"protocols": {"ridge": {}}, "train_samples": 2},
            "evals.protocols.ridge: evals.train has images of one class",
        ),
    ],
)
@pytest.mark.usefixtures("greedy")
def test_what_cannot_be_measured_is_refused_before_the_run(
    section: dict[str, Any], line: str, data: tuple[Path, Path], tmp_path: Path
) -> None:
    from mimscale.data.synthetic import make_image_folder

    if section.get("val") in ("UNLABELLED", "OTHER"):
        images = make_image_folder(tmp_path / "images", classes=2, per_class=4, side=32, seed=5)
        section = {"val": str(shards(images, tmp_path / "other", labelled=section["val"] == "OTHER"))}
    if section.get("val") == "TRAIN":
        section = {"val": str(data[0]), **({"train": str(data[1])} if "train" in section else {})}
    with pytest.raises(UserError) as found:
        checked(data, **section)
    assert line in str(found.value) and "\n" not in str(found.value)


def test_without_labels_rank_and_spread_remain(data: tuple[Path, Path], tmp_path: Path) -> None:
    from mimscale.data.synthetic import make_image_folder

    images = make_image_folder(tmp_path / "images", classes=2, per_class=4, side=32, seed=5)
    unlabelled = shards(images, tmp_path / "bare", labelled=False)
    assert checked((data[0], unlabelled), protocols={}).protocols == {}


def test_it_may_change_at_a_resume() -> None:
    plain = small_run("mae")
    values = yaml.safe_load(yaml.safe_dump(plain.dump()))
    measured = validate({**values, "evals": {"val": "shards/val"}}, "test")
    assert measured.shaping() == plain.shaping() and measured.evals is not None
    assert measured.evals.protocols == {"knn": {}, "ridge": {}}
