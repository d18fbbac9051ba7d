"""The section `log` of a recipe."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator

from mimscale.config.base import Strict

TrackerName = Literal["tensorboard", "wandb", "mlflow"]
STORES = ("file", "http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")


class WandbConfig(Strict):
    """project: of Weights & Biases, made where it does not exist. entity: the user or team that the project belongs
    to; null: your default one. group: under which the site gathers runs. tags: labels of the run on the site. mode:
    online; offline (files in RUN/wandb, which `wandb sync` sends later); null: WANDB_MODE of the environment, else
    online.
    """

    project: str = Field("mimscale", min_length=1)
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    mode: Literal["online", "offline"] | None = None


class MlflowConfig(Strict):
    """uri: file:FOLDER, sqlite:///FILE, http://HOST:PORT and others that mlflow knows; null: MLFLOW_TRACKING_URI of
    the environment. experiment: name of the mlflow experiment that the run belongs to.
    """

    uri: str | None = None
    experiment: str = Field("mimscale", min_length=1)

    @field_validator("uri", mode="before")  # whose advice is better than that for any secret
    @classmethod
    def _uri(cls, uri: object) -> object:
        if not isinstance(uri, str):
            return uri
        scheme, separator, rest = uri.partition(":")
        if not separator or scheme.partition("+")[0] not in STORES:
            raise ValueError(
                f"'{uri}' is no place that mlflow knows; write file:FOLDER, sqlite:///FILE or http://HOST:PORT"
            )
        if "@" in re.split(r"[/?#]", rest.removeprefix("//"), maxsplit=1)[0]:
            raise ValueError(
                "it holds a user or a password, which would stand in the run folder; give them in "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or the whole address in MLFLOW_TRACKING_URI"
            )
        return uri


class ProfileConfig(Strict):
    """at: the first step that torch.profiler records. steps: how many. ranks: the first so many write their traces."""

    at: int = Field(ge=1)
    steps: int = Field(3, ge=1, le=1000)
    ranks: int = Field(1, ge=1)


class LogConfig(Strict):
    """every: optimiser steps between log lines. panels: steps between panels of images, 0 = none. trackers: where
    curves, evaluations and panels go besides metrics.jsonl. wandb: options of Weights & Biases. mlflow: options
    of mlflow. profile: a window of steps that torch.profiler records, none by default.
    """

    every: int = Field(20, ge=1)
    panels: int = Field(0, ge=0)
    trackers: tuple[TrackerName, ...] = ("tensorboard",)
    wandb: WandbConfig = WandbConfig()
    mlflow: MlflowConfig = MlflowConfig()
    profile: ProfileConfig | None = None

    @field_validator("trackers")
    @classmethod
    def _once(cls, names: tuple[TrackerName, ...]) -> tuple[TrackerName, ...]:
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"'{twice[0]}' is given twice; remove one")
        return names
