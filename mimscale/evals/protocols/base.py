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

Need = Literal["pooled", "tokens", "labels"]
Results = dict[str, Any]
"""Metrics and what belongs to them, as plain JSON values. `warnings`: lines that the user must see."""


class Features(NamedTuple):
    """What one network computes from a data set, or from a part of it.

    values: float32, [N, D] for a protocol that needs "pooled", [N, T, D] for one that needs "tokens" (T patch tokens).
    A protocol may change them in place. labels: int64 [N], -1 where the data set has none; shared, so read only.
    """

    values: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Context:
    """What holds for every protocol. classes: labels are 0 to classes - 1. device: where to compute."""

    classes: int
    seed: int
    device: torch.device


class Protocol(ABC):
    """Base class; the first line of a subclass's docstring is its line in `mimscale evaluate --help`.

    One object measures one network and pooling. A subclass sets:

    Config: its options, pydantic fields with a description; on the command line `--k 20` sets the field `k`.
    needs: "pooled" or "tokens", and "labels" where an unlabelled data set is to be refused.
    metrics: key in the results -> heading of its column, in which `{k}` stands for the field k. Where the results also
        hold KEY_sd, the column shows it behind a ±.
    constants: what the report is to say of the protocol beside the Config.
    unit: of the metrics.
    """

    Config: ClassVar[type[Strict]]
    needs: ClassVar[frozenset[Need]] = frozenset({"pooled", "labels"})
    metrics: ClassVar[Mapping[str, str]]
    constants: ClassVar[Mapping[str, Any]] = {}
    unit: ClassVar[str] = "percent top-1"

    def __init__(self, config: Any, context: Context) -> None:
        self.config, self.context = config, context

    @classmethod  # noqa: B027  # most protocols have nothing to check
    def check(cls, config: Any, train: Manifest, val: Manifest) -> None:
        """Raises UserError where the data sets do not do, before any image is read."""

    @abstractmethod
    def run(self, train: Features, val: Features) -> Results:
        """Learn from `train`, measure on `val`; both are whole and in host memory."""


class StreamingProtocol(Protocol):
    """A protocol that takes the training set in pieces, so that only the validation set has to fit into memory.

    One pass over the training set then serves all networks.
    """

    @abstractmethod
    def start(self, val: Features) -> None:
        """Before the first piece; `val` is in host memory."""

    @abstractmethod
    def add(self, train: Features) -> None:
        """The next piece of the training set, on the device that computes."""

    @abstractmethod
    def finish(self) -> Results:
        """After the last piece."""

    def run(self, train: Features, val: Features) -> Results:
        """The whole training set as one piece."""
        self.start(val)
        self.add(Features(*(tensor.to(self.context.device) for tensor in train)))
        return self.finish()
