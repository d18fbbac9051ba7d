"""Weights & Biases (extra `wandb`). Its own process writes RUN/wandb and, where it is online, sends it.

The id of the run is ours and stands in RUN/wandb.json, so that every launch of a run folder continues one run. Of the
machine and the process nothing is sent: no command line, no environment, no git state, no console, no statistics.
"""

from __future__ import annotations

import json
import netrc
import os
import secrets
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from torch import Tensor

from mimscale.errors import UserError
from mimscale.files.atomic import atomic_write
from mimscale.monitoring.config import LogConfig, WandbConfig
from mimscale.monitoring.tracker import Start, Tracker
from mimscale.monitoring.trackers.ids import stored_id

HOSTS = (".wandb.ai", ".coreweave.com")
"""Endings of the names of its makers' servers; others are named by WANDB_BASE_URL."""
ROWS = 8
"""Of one step, at most: numbers, evaluations, an image."""
OFF = ("offline", "dryrun", "disabled")


def check(config: LogConfig) -> None:
    if find_spec("wandb") is None:
        raise UserError("log.trackers names wandb, which is not installed; pip install -e '.[wandb]'")
    mode = config.wandb.mode or os.environ.get("WANDB_MODE") or "online"
    if mode not in OFF and not _has_key():
        raise UserError(
            "log.trackers names wandb, but there is no API key for it; run `wandb login`, set WANDB_API_KEY, or write "
            "files only with log.wandb.mode=offline"
        )


def _has_key() -> bool:
    """In the environment, or in .netrc, where `wandb login` leaves it; wandb would ask the person at the terminal."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    own = urlsplit(os.environ.get("WANDB_BASE_URL", "")).hostname
    named = os.environ.get("NETRC")
    for path in [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            hosts = netrc.netrc(path).hosts
        except (OSError, ValueError, netrc.NetrcParseError):
            continue
        if any(host == own or host.endswith(HOSTS) for host in hosts):
            return True
    return False


def _quiet() -> None:
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # of its own failures, to its makers
    os.environ.setdefault("WANDB_SILENT", "true")


def make() -> Tracker:
    return Wandb()


class Wandb:
    """A step that is done again is a second point: wandb takes no number back."""

    def start(self, start: Start) -> None:
        _quiet()
        import wandb

        config: WandbConfig = start.log.wandb
        path, place = start.run_dir / "wandb.json", {"project": config.project, "entity": config.entity}
        identity = stored_id(path, place)
        if identity is None:
            identity = secrets.token_hex(4)
            atomic_write(path, (json.dumps({**place, "id": identity}) + "\n").encode())
        self._wandb = wandb
        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            group=config.group,
            tags=list(config.tags) or None,
            mode=config.mode,
            dir=str(start.run_dir),
            name=start.run_dir.resolve().name,
            id=identity,
            resume="allow",
            settings=wandb.Settings(
                silent=True,
                console="off",
                save_code=False,
                disable_code=True,
                disable_git=True,
                disable_job_creation=True,
                x_disable_meta=True,
                x_disable_machine_info=True,
                x_disable_stats=True,
            ),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log_config(self, values: Mapping[str, Any]) -> None:
        self._run.config.update(dict(values), allow_val_change=True)

    def log_scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._log(step, values)

    def log_image(self, step: int, name: str, image_3HW: Tensor) -> None:
        image = self._wandb.Image(image_3HW.permute(1, 2, 0).numpy())
        self._log(step, {name: image})

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        """One row of its table. wandb's own number of a row must grow, also over launches; ours is a column."""
        self._run.log({"step": step, **values}, step=max(ROWS * step, self._run.step), commit=True)

    def close(self, done: bool) -> None:
        if not done:
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if done else 1)
