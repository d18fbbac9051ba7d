"""The trainer with a fault in its data, teacher or gradients:  python -m tests.faulty FAULTS.json train RECIPE ...

FAULTS.json: {"images": {batch: factor}, "teacher": [batches], "gradients": [batches], "stops": [batches], "rank": r,
"full": [batch, batch], "slow_save_s": seconds}.
A batch is a global batch of the endless sequence, so the fault belongs to its samples and is met again wherever these
are; `rank` limits it to one rank. factor null means NaN. At one of `stops` the rank stands still until it is killed.
From the first batch of `full` to the second (null: the end) no file takes a byte. Shards are written that slowly.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mimscale.__main__ import main
from mimscale.checkpoint.host_buffer import HostBuffer
from mimscale.config.recipes import load_recipe
from mimscale.distributed.end_process import end_process
from mimscale.engine.deepspeed_engine import DeepSpeedEngine
from mimscale.teachers.ensemble import TeacherEnsemble
from mimscale.types import Batch


def plant(faults: dict[str, Any], global_batch: int) -> None:
    """Wrap what the loop calls."""
    now: list[int] = [0]
    normalised, step, compute_targets = Batch.normalised, DeepSpeedEngine.forward_backward, TeacherEnsemble.__call__
    here = faults.get("rank", int(os.environ.get("RANK", "0"))) == int(os.environ.get("RANK", "0"))
    limit, write = resource.getrlimit(resource.RLIMIT_FSIZE)[1], HostBuffer.write
    images = {int(k): math.nan if v is None else v for k, v in faults.get("images", {}).items()}

    def bad_images(self: Batch) -> Batch:
        now[0] = int(self.positions[0]) // global_batch
        if "full" in faults:
            first, last = faults["full"]
            full = first <= now[0] and (last is None or now[0] < last)
            resource.setrlimit(resource.RLIMIT_FSIZE, (0 if full else limit, limit))
        if here and now[0] in faults.get("stops", ()):
            os.kill(os.getpid(), signal.SIGSTOP)
        batch = normalised(self)
        factor = images.get(now[0])
        return dataclasses.replace(batch, images=batch.images * factor) if here and factor is not None else batch

    def bad_gradients(self: DeepSpeedEngine, batch: Any, targets: Any, check_loss: Callable[..., Any]) -> Any:
        planted = here and now[0] in faults.get("gradients", ())
        return step(self, batch, targets, lambda loss: check_loss(loss) * math.inf if planted else check_loss(loss))

    def bad_teacher(self: TeacherEnsemble, images: torch.Tensor) -> Any:
        broken = here and now[0] in faults.get("teacher", ())
        return compute_targets(self, images * math.nan if broken else images)

    def slow_write(self: HostBuffer, path: Path) -> tuple[int, str]:
        end_s = time.monotonic() + faults.get("slow_save_s", 0) * here
        while time.monotonic() < end_s:
            self.written += 1
            time.sleep(0.1)
        return write(self, path)

    HostBuffer.write = slow_write  # type: ignore[method-assign]
    Batch.normalised = bad_images  # type: ignore[method-assign]
    DeepSpeedEngine.forward_backward = bad_gradients  # type: ignore[method-assign, assignment]
    TeacherEnsemble.__call__ = bad_teacher  # type: ignore[method-assign]


if __name__ == "__main__":
    words = sys.argv[2:]
    plant(json.loads(Path(sys.argv[1]).read_text()), load_recipe(words[1]).schedule.global_batch)
    end_process(main(words))
