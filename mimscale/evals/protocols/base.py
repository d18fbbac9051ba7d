"""What an evaluation protocol is: it learns from a training set's features and measures on a validation set's.

A protocol is one file in this folder that defines one `Protocol`; it is found by the file's name. Adding one needs its
file and a test, and no edit anywhere else: `mimscale evaluate NAME` then exists, with one option for each field of its
`Config`. What reads images, runs networks, shows progress and writes results is shared (see `evals/runner.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from mimscale.config.base import Strict
from mimscale.data.manifest import Manifest

Need = Literal["pooled", "tokens", "blocks", "labels"]
Results = dict[str, Any]
"""Metrics and what belongs to them, as plain JSON values. `warnings`: lines that the user must see."""


class Features(NamedTuple):
    """What one network computes from a whole data set, the same on every rank.

    values: float32 in host memory, [N, D] for a protocol that needs "pooled", [N, T, D] for "tokens" (T patch tokens),
    [N, L, 2, D] for "blocks": class token and mean of the patch tokens of each of the last L blocks, the last block
    last, [N, L, 1, D] (the mean) where the network has no class token, and L is 1 for raw pixels. They may be mapped
    from the feature cache, whose pages come from the disk when they are read, so take the rows that are needed, and
    change nothing in place. labels: int64 [N], -1 where the data set has none; shared, so read only.
    """

    values: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Context:
    """What holds for every protocol. classes: labels are 0 to classes - 1. device: where to compute.

    rank, world: of this process, see `evals.parallel`. All ranks run the protocol at the same time with the same
    features; they share its work, and each returns the same results, which rank 0 writes. train_data, val_data: the
    data sets behind the features, where they are on disk.
    """

    classes: int
    seed: int
    device: torch.device
    rank: int = 0
    world: int = 1
    train_data: Manifest | None = None
    val_data: Manifest | None = None


class Protocol(ABC):
    """Base class; the first line of a subclass's docstring is its line in `mimscale evaluate --help`.

    One object measures one network and pooling. A subclass sets:

    Config: its options, pydantic fields with a description; on the command line `--k 20` sets the field `k`.
    needs: "pooled", "tokens" or "blocks", and "labels" where an unlabelled data set is to be refused.
    blocks: L of "blocks".
    metrics: key in the results -> heading of its column, in which `{k}` stands for the field k. Where the results also
        hold KEY_sd, the column shows it behind a ±. See `headings`.
    constants: what the report is to say of the protocol beside the Config.
    departs: in what the figures differ from those of papers under the same name, a line each; printed under the table.
    unit: of the metrics.
    """

    Config: ClassVar[type[Strict]]
    needs: ClassVar[frozenset[Need]] = frozenset({"pooled", "labels"})
    blocks: ClassVar[int] = 1
    metrics: ClassVar[Mapping[str, str]]
    constants: ClassVar[Mapping[str, Any]] = {}
    departs: ClassVar[tuple[str, ...]] = ()
    unit: ClassVar[str] = "percent top-1"

    def __init__(self, config: Any, context: Context) -> None:
        self.config, self.context = config, context

    @classmethod  # noqa: B027  # most protocols have nothing to check
    def check(cls, config: Any, train: Manifest, val: Manifest) -> None:
        """Raises UserError where the data sets do not do, before any image is read."""

    @classmethod
    def headings(cls, config: Any) -> dict[str, str]:
        """Key in the results -> heading of its column; a key that the results lack leaves an empty cell."""
        options = config.model_dump(mode="json")
        return {key: heading.format(**options) for key, heading in cls.metrics.items()}

    @abstractmethod
    def run(self, train: Features, val: Features) -> Results:
        """Learn from `train`, measure on `val`. Every rank calls it."""
