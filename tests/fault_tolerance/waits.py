"""Two ranks that meet, then rank 1 stays away:  python -m tests.fault_tolerance.waits PHASE MARK

Rank 0 waits for it in a call in which no handler runs: open, where it opens the process group; else in a collective.
MARK: a file that appears when it does.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import torch.distributed as dist

from mimscale.distributed import coordination
from mimscale.distributed.coordination import Coordinator, Opening
from mimscale.distributed.end_process import end_process
from mimscale.distributed.rendezvous import meet
from mimscale.distributed.world import from_environment
from mimscale.fault_tolerance import preemption
from mimscale.fault_tolerance.preemption import Preemption, SignalWatch

if __name__ == "__main__":
    phase, mark = sys.argv[1:]
    preemption.STUCK_S = 2.0  # of the loop
    coordination.GONE_S = 1.5
    world = from_environment("cpu")
    asked = Preemption([])
    watch = SignalWatch(asked, world.rank, report_s=1.0)
    store = meet(world)
    if phase == "open":
        if world.rank == 1:
            watch.close()
            time.sleep(300)
        watch.coordinator = Opening(store, world.rank, world.size)
        threading.Timer(3.5, Path(mark).touch).start()
    dist.init_process_group("gloo", rank=world.rank, world_size=world.size)
    watch.coordinator = coordinator = Coordinator(store)
    assert coordinator.gather(world.rank) == [0, 1]
    asked.phase = phase  # type: ignore[assignment]
    if world.rank == 1:
        watch.close()
        time.sleep(300)
    threading.Timer(2.5, Path(mark).touch).start()
    coordinator.gather(0)
    end_process(0)
