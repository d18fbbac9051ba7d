"""MLflow (extra `mlflow`): a tracking server, a database or a folder.

The extra installs mlflow-skinny, which speaks to servers and writes folders; a database needs the whole `mlflow`. The
run's id stands in RUN/mlflow.json, so that every launch of a run folder continues one run.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from mimscale.errors import UserError, without_secrets
from mimscale.files.atomic import atomic_write
from mimscale.monitoring.config import LogConfig
from mimscale.monitoring.tracker import Start, Tracker
from mimscale.monitoring.trackers.ids import stored_id

DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
PARAMS_AT_ONCE = 100  # mlflow's limits
LONGEST_PARAM = 6000


def check(config: LogConfig) -> None:
    if find_spec("mlflow") is None:
        raise UserError("log.trackers names mlflow, which is not installed; pip install -e '.[mlflow]'")
    uri = uri_of(config)
    if not uri:
        raise UserError(
            "log.trackers names mlflow, but neither log.mlflow.uri nor MLFLOW_TRACKING_URI says where; set "
            "log.mlflow.uri=http://HOST:PORT, or file:FOLDER"
        )
    if uri.startswith(DATABASES) and find_spec("sqlalchemy") is None:
        raise UserError(
            f"log.mlflow.uri = {without_secrets(uri)}: a database needs the whole of mlflow (pip install mlflow); "
            f"mlflow-skinny writes file:FOLDER and speaks to http://HOST:PORT"
        )


def uri_of(config: LogConfig) -> str | None:
    return config.mlflow.uri or os.environ.get("MLFLOW_TRACKING_URI")


def make() -> Tracker:
    return Mlflow()


class Mlflow:
    """A step that is done again is a second point: mlflow takes no number back."""

    def start(self, start: Start) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # which may hold a password
        uri = uri_of(start.log) or ""
        if uri.startswith("file:") or ":" not in uri:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # mlflow 3.17 refuses folders without it
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        experiment = start.log.mlflow.experiment
        path, place = start.run_dir / "mlflow.json", {"uri": without_secrets(uri), "experiment": experiment}
        found = stored_id(path, place)
        self._fresh = found is None
        if found is not None:
            self._id = found
            self._client.update_run(self._id, status="RUNNING")
            return
        known = self._client.get_experiment_by_name(experiment)
        where = known.experiment_id if known is not None else self._client.create_experiment(experiment)
        self._id = self._client.create_run(where, run_name=start.run_dir.resolve().name).info.run_id
        atomic_write(path, (json.dumps({**place, "id": self._id}) + "\n").encode())

    def log_config(self, values: Mapping[str, Any]) -> None:
        """Once: mlflow refuses other values later."""
        from mlflow.entities import Param

        params = [Param(key, str(value)[:LONGEST_PARAM]) for key, value in values.items()] if self._fresh else []
        for first in range(0, len(params), PARAMS_AT_ONCE):
            self._client.log_batch(self._id, params=params[first : first + PARAMS_AT_ONCE])

    def log_scalars(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[Metric(name, value, now_ms, step) for name, value in values.items()])

    def log_image(self, step: int, name: str, image_3HW: Tensor) -> None:
        image = image_3HW.permute(1, 2, 0).numpy()
        self._client.log_image(self._id, image, key=name, step=step, synchronous=True)

    def close(self, done: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if done else "KILLED")
