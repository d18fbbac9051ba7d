"""TensorBoard: event files in RUN/tensorboard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mimscale.monitoring.config import LogConfig
from mimscale.monitoring.tracker import Start, Tracker


def check(config: LogConfig) -> None:
    """It is always installed, and its folder is the run's."""


def make() -> Tracker:
    return TensorBoard()


class TensorBoard:
    """Steps that are done again replace those of before."""

    def start(self, start: Start) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(start.run_dir / "tensorboard"), purge_step=start.step)

    def log_config(self, values: Mapping[str, Any]) -> None:
        rows = "\n".join(f"| {key} | {str(value).replace('|', chr(92) + '|')} |" for key, value in values.items())
        self._board.add_text("recipe", f"| key | value |\n| --- | --- |\n{rows}")

    def log_scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def log_image(self, step: int, name: str, image_3HW: Tensor) -> None:
        self._board.add_image(name, image_3HW, step)

    def close(self, done: bool) -> None:
        self._board.close()
