"""Ranks of an evaluation: which rows each one works on, and sums over all of them."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from mimscale.distributed.coordination import Coordinator
from mimscale.distributed.rendezvous import meet, while_meeting
from mimscale.distributed.world import World

PARTS = 8  # of a sum over samples, at least
TIMEOUT_S = 7200.0  # of a collective: rank 0 may fit for long while the others wait


def rows_of(count: int, rank: int, world: int) -> slice:
    """The rank-th of `world` consecutive parts of `count` rows; their lengths differ by one at most."""
    return slice(count * rank // world, count * (rank + 1) // world)


def all_sum(tensor: Tensor) -> Tensor:
    """The sum over the ranks, in place, on the tensor's device. One process: the tensor itself.

    Every rank must call it, with one shape and dtype.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return tensor
    carried = _carried(tensor)
    dist.all_reduce(carried)
    return tensor if carried is tensor else tensor.copy_(carried)


def all_gather(tensor: Tensor) -> list[Tensor]:
    """The tensor of every rank, in rank order, on every rank. All must have one shape and dtype."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [tensor]
    carried = _carried(tensor).contiguous()
    found = [torch.empty_like(carried) for _ in range(dist.get_world_size())]
    dist.all_gather(found, carried)
    return [each.to(tensor.device) for each in found]


def _carried(tensor: Tensor) -> Tensor:
    """Where the process group can carry it: nccl's alone, which a trainer has opened, knows no host memory."""
    return tensor.cuda() if tensor.device.type == "cpu" and dist.get_backend() == "nccl" else tensor


def parts_of(count: int, rank: int, world: int, most: int) -> list[slice]:
    """This rank's share of consecutive parts of `count` rows, at most `most` rows each.

    For up to `PARTS` ranks the parts are the same, so what is computed part by part is the same to the bit.
    """
    total = max(PARTS, world, -(-count // most))
    return [rows_of(count, number, total) for number in range(total)[rows_of(total, rank, world)]]


def all_rows(part: Tensor, count: int, rank: int, world: int) -> Tensor:
    """[count, ...] out of the parts [n, ...] that the ranks hold of it by `rows_of`, on every rank.

    A sum with zeros, so every number arrives as it was. Not for floating-point negative zeros.
    """
    if world == 1:
        return part
    whole = torch.zeros(count, *part.shape[1:], dtype=part.dtype, device=part.device)
    whole[rows_of(count, rank, world)] = part
    return all_sum(whole)


def join(world: World) -> Coordinator:
    """Meet the other ranks of this launch and open the process group: nccl for tensors on GPUs, gloo for all others.

    Raises UserError, see `rendezvous.meet`.
    """
    store = meet(world)
    with while_meeting(world):
        if world.size > 1 and not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
            limit = timedelta(seconds=TIMEOUT_S)
            dist.init_process_group(backend, rank=world.rank, world_size=world.size, timeout=limit)
        return Coordinator(store, timeout_s=TIMEOUT_S)
