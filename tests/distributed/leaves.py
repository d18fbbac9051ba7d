"""Two ranks that meet, and one of them is killed in the first collective:  python -m tests.distributed.leaves"""

from __future__ import annotations

import os
import signal
import sys

import torch

from mimscale.distributed.coordination import Coordinator
from mimscale.distributed.rendezvous import meet, while_meeting
from mimscale.distributed.world import World
from mimscale.engine.torch_engine import open_process_group
from mimscale.errors import UserError, warn

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # with which launchers end the other ranks, perhaps too soon
    rank = int(os.environ["RANK"])
    world = World(rank, 2, rank, torch.device("cpu"))
    store = meet(world)
    try:
        with while_meeting(world):
            open_process_group(world)
            coordinator = Coordinator(store)
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            coordinator.gather("recipe")
    except UserError as error:
        warn(str(error))
        sys.exit(2)
