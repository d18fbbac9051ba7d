"""Draws panels in a thread; the training loop never waits for them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import fields, replace

from torch import Tensor

from mimscale.monitoring.panels import tiles
from mimscale.types import View

WAITING = 4  # views at most


class PanelWriter:
    """A thread that turns views into `tiles` and calls publish(step, tiles), or failed(step, error).

    A view that comes while too many still wait is dropped: the loop does not wait.
    """

    def __init__(
        self, publish: Callable[[int, dict[str, Tensor]], None], failed: Callable[[int, Exception], None]
    ) -> None:
        self._publish, self._failed = publish, failed
        self._views: queue.Queue[tuple[int, View] | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._work, name="panel_writer", daemon=True)
        self._thread.start()

    def show(self, step: int, view: View) -> bool:
        """Whether it will be drawn. Its tensors may be on a device, and nobody may change them afterwards."""
        try:
            self._views.put_nowait((step, view))
        except queue.Full:
            return False
        return True

    def close(self) -> None:
        """Draw what waits, and end."""
        self._views.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (item := self._views.get()) is not None:
            step, view = item
            try:
                self._publish(step, tiles(on_host(view)))
            except Exception as error:
                self._failed(step, error)


def on_host(view: View) -> View:
    """Copies in host memory; waits for the device."""
    parts = {field.name: getattr(view, field.name) for field in fields(View)}
    return replace(view, **{name: part.cpu() for name, part in parts.items() if part is not None})
