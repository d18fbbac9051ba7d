"""Draws pictures beside the training loop, which never waits for them."""

from __future__ import annotations

import queue
import threading
from dataclasses import fields, replace

from mimscale.contracts import View
from mimscale.observe.logbook import Logbook
from mimscale.observe.panels import panel

SHOWN = 8  # samples of a panel


class Gallery:
    """A thread that turns views into panels for the logbook.

    A view that comes while the one before it still waits is dropped: a picture may be missed, time may not. One that
    cannot be drawn is an event in the log and no more.
    """

    def __init__(self, logbook: Logbook) -> None:
        self._logbook = logbook
        self._views: queue.Queue[tuple[int, View] | None] = queue.Queue(maxsize=1)
        self._thread = threading.Thread(target=self._work, name="gallery", daemon=True)
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
                self._logbook.picture(step, "view", panel(on_host(view), SHOWN))
            except Exception as error:
                self._logbook.event("picture_failed", at=step, error=f"{type(error).__name__}: {error}")


def on_host(view: View) -> View:
    """Copies in host memory; waits for the device."""
    parts = {field.name: getattr(view, field.name) for field in fields(View)}
    return replace(view, **{name: part.cpu() for name, part in parts.items() if part is not None})
