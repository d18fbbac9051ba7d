"""Linear classification with few of the training set's labels."""

from __future__ import annotations

import hashlib
import statistics
from collections import Counter
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

from mimscale.config.base import Strict
from mimscale.data.manifest import Manifest
from mimscale.errors import UserError
from mimscale.evals.logistic_regression import MAX_ITERATIONS, TOLERANCE, Classifier, Rows, fit, predict, scaling_of
from mimscale.evals.metrics import mean_per_class, top1
from mimscale.evals.parallel import all_sum
from mimscale.evals.protocols.base import Context, Features, Protocol, Results

L2_GRID = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # strong to weak: each fit starts from the one before
L2_OF_ONE_SHOT = 1e-2  # one label per class leaves nothing to choose with
FOLDS = 5  # of the cross-validation, at most
SHOTS = 5
Ids = NDArray[np.int64]


class LowShotConfig(Strict):
    shots: int | None = Field(None, ge=1, description=f"labels per class (of the three {SHOTS} where none is given)")
    percent: float | None = Field(None, gt=0, lt=100, description="labels in percent of each class, at least one")
    list: Path | None = Field(None, description="file with the names of the labelled images, one a line")
    draws: int = Field(3, ge=1, description="choices of these labels; the mean is reported; a list is one")

    @model_validator(mode="after")
    def _one_of_three(self) -> LowShotConfig:
        given = [name for name in ("shots", "percent", "list") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"--{given[0]} and --{given[1]} exclude each other; leave one out")
        return self

    @property
    def what(self) -> str:
        """Which labels, in words."""
        if self.list is not None:
            return f"labels of {self.list.name}"
        return f"{self.percent:g} % of the labels" if self.percent else f"{self.shots or SHOTS} labels per class"


class LowShot(Protocol):
    """logistic regression on few labels per class, or 1 % of them

    Source: MSN (Assran et al., ECCV 2022, arXiv 2204.07141): logistic regression on frozen features with 1, 2 or 5
    images per class, mean and deviation over three draws, and with 1 % of ImageNet's labels, whose list SimCLR (Chen et
    al., ICML 2020, arXiv 2002.05709) has published. Here a draw comes from the seed, l2 is chosen by cross-validation
    among the drawn images, and features are standardised with the whole training set, whose other labels are not used.
    """

    Config = LowShotConfig
    metrics: ClassVar = {"lowshot": "few labels"}
    constants: ClassVar = {"l2_grid": L2_GRID, "tolerance": TOLERANCE, "max_iterations": MAX_ITERATIONS}
    departs: ClassVar = (
        "MSN's low-shot figures take its own draws and one l2 for all; the 1 % and 10 % figures of SimCLR and MAE "
        "fine-tune the network, here it is frozen; give ImageNet's published lists with --list",
    )

    def __init__(self, config: LowShotConfig, context: Context) -> None:
        super().__init__(config, context)
        self.config: LowShotConfig = config

    @classmethod
    def check(cls, config: LowShotConfig, train: Manifest, val: Manifest) -> None:
        assert train.labels is not None
        if config.list is None:
            drawn_ids(train.labels, config, seed=0, draw=0)
        else:
            _names(config.list)

    @classmethod
    def headings(cls, config: LowShotConfig) -> dict[str, str]:
        return {"lowshot": config.what}

    def run(self, train: Features, val: Features) -> Results:
        c, config = self.context, self.config
        chosen = self._choices(train.labels.numpy())
        scaling = scaling_of(train.values, c.rank, c.world)
        queries = scaling(val.values)
        found = torch.zeros(len(chosen), 4, dtype=torch.float64)  # accuracy, the same per class, l2, converged
        for draw in range(c.rank, len(chosen), c.world):
            ids = torch.from_numpy(chosen[draw])
            rows = Rows(train.values[ids], train.labels[ids], c.classes, c.device, scaling=scaling, parts=1)
            classifier, l2 = few_labels(rows, train.labels[ids])
            predicted = predict(classifier, queries)
            accuracy = top1(predicted, val.labels, c.classes)
            per_class = mean_per_class(predicted, val.labels, c.classes)
            found[draw] = torch.tensor([accuracy, per_class, l2, classifier.converged], dtype=torch.float64)
        draws, per_class_draws, strengths, converged = all_sum(found).T.tolist()
        cut = [str(draw) for draw, done in enumerate(converged) if not done]
        return {
            "lowshot": statistics.fmean(draws),
            "lowshot_per_class": statistics.fmean(per_class_draws),
            **({"lowshot_sd": statistics.stdev(draws)} if len(draws) > 1 else {}),
            "lowshot_draws": draws,
            "lowshot_l2": strengths,
            "labels": [len(ids) for ids in chosen],
            "labels_sha256": [hashlib.sha256(np.sort(ids).tobytes()).hexdigest() for ids in chosen],
            "labels_of": config.what,
            "warnings": [f"L-BFGS had not converged in draw {', '.join(cut)}"] if cut else [],
        }

    def _choices(self, labels_N: Ids) -> list[Ids]:
        if self.config.list is None:
            return [drawn_ids(labels_N, self.config, self.context.seed, draw) for draw in range(self.config.draws)]
        assert self.context.train_data is not None, "a list needs a data set on disk"
        return [listed_ids(self.config.list, self.context.train_data.keys())]


def drawn_ids(labels_N: Ids, config: LowShotConfig, seed: int, draw: int) -> Ids:
    """int64: rows of the training set whose labels this draw may see, class by class. Raises UserError."""
    random = np.random.default_rng([seed, draw])
    chosen = []
    for label in np.unique(labels_N):
        members = np.flatnonzero(labels_N == label)
        if config.percent is not None:
            count = max(1, round(len(members) * config.percent / 100))
        else:
            count = config.shots or SHOTS
        if len(members) < count:
            raise UserError(f"--shots {count}: class {label} has {len(members)} training samples; take fewer shots")
        chosen.append(random.choice(members, count, replace=False))
    return np.concatenate(chosen)


def listed_ids(path: Path, keys: list[str]) -> Ids:
    """int64: rows of the training set that a file names, by their key or by the last part of it where no other ends so,
    without extension.

    Raises UserError for a name that no sample has.
    """
    ends = [key.rpartition("/")[2] for key in keys]
    counts = Counter(ends)
    place = {end: number for number, end in enumerate(ends) if counts[end] == 1}
    place |= {key: number for number, key in enumerate(keys)}
    names = _names(path)
    absent = [name for name in names if name not in place]
    if absent:
        raise UserError(
            f"--list {path}: '{absent[0]}' is no sample of the training set ({len(absent):,} of {len(names):,} are "
            f"none); give the list of this data set"
        )
    return np.unique(np.array([place[name] for name in names], dtype=np.int64))


def _names(path: Path) -> list[str]:
    """The lines of a list without extensions, as `data_prep` writes keys. Raises UserError."""
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--list {path} cannot be read: {error}; give a text file with one image name a line") from None
    names = [line.rpartition(".")[0] or line for line in lines if line]
    if not names:
        raise UserError(f"--list {path} is empty; give a text file with one image name a line")
    return ["".join(c if c.isalnum() or c in "/-_" else "_" for c in name) for name in names]


def few_labels(rows: Rows, labels_N: Tensor) -> tuple[Classifier, float]:
    """A classifier of all these samples, and its l2: chosen by cross-validation among them."""
    y = labels_N.numpy()
    folds = min(FOLDS, int(np.bincount(y)[np.unique(y)].min()))
    chosen = L2_OF_ONE_SHOT
    if folds > 1:
        right = np.zeros(len(L2_GRID))
        for inside, outside in StratifiedKFold(folds).split(np.zeros(len(y)), y):
            use = torch.zeros(len(y), dtype=torch.bool)
            use[torch.from_numpy(inside)] = True
            classifier = None
            for number, l2 in enumerate(L2_GRID):
                classifier = fit(rows, l2, classifier, use)
                predicted = torch.cat([predict(classifier, x) for x, _ in rows.parts.values()])
                right[number] += int((predicted == labels_N)[torch.from_numpy(outside)].sum())
        chosen = L2_GRID[int(np.argmax(right))]
    return fit(rows, chosen), chosen
