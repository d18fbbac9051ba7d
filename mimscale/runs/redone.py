"""Which lines of metrics.jsonl count, after resumes and roll-backs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mimscale.files.plain_numbers import whole


class Redone:
    """To be asked about each line, the last one first. A line of step s counts unless a later one says that the run
    went back behind s: a launch that began at an earlier step, a roll-back to one, or a line of s or of a step before.

    The order of the lines decides, not their times: the clock of a machine may be set.
    """

    def __init__(self) -> None:
        self._until: float = math.inf

    def counts(self, line: Mapping[str, Any]) -> bool:
        """Whether it does. Of events only evaluations can fail to; a line that is neither has no step and does not."""
        event, at = line.get("event"), whole(line.get("at"))
        if event is None:
            step = whole(line.get("step"))
            if step is None or step > self._until:
                return False
            self._until = step - 1
            return True
        back_to = {"start": at, "rollback": whole(line.get("to"))}.get(event) if isinstance(event, str) else None
        if back_to is not None:
            self._until = min(self._until, back_to)
        return event != "evals" or at is None or at <= self._until
