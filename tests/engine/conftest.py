"""A process group of one rank, for engines in the process of the tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from mimscale.distributed.world import close_process_group, from_environment
from mimscale.engine.deepspeed_runtime import open_process_group


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    from deepspeed.utils import groups

    before = dict(os.environ)
    open_process_group(from_environment("cpu"))
    yield
    close_process_group()
    groups._WORLD_GROUP = None  # DeepSpeed would use the closed one for the next file
    assert not dist.is_initialized()
    os.environ.clear()  # RANK and the like would reach the processes that later tests start
    os.environ.update(before)
