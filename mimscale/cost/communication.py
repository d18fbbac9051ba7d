"""What the ranks send each other in one optimiser step: messages, bytes on the wire, and how long they take.

As DeepSpeed 0.19.8 does it, counted on real ranks (tests/cost/test_communication.py): stages 0 to 2 all-reduce whole
buckets of gradients, also where a rank keeps a part of them only, and stages 1 and 2 then gather the parameters; stage
3 gathers parameters in every forward pass (and again in the backward pass where more than `live` of them are needed)
and reduce-scatters gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mimscale.cost.devices import Device, Interconnect
from mimscale.cost.memory import Zero

Kind = Literal["all-reduce", "reduce", "all-gather", "reduce-scatter"]
LOCAL_HOP_S = 1e-6
"""Latency of a hop inside a node."""


@dataclass(frozen=True)
class Collective:
    """`messages` collectives of one kind in an optimiser step, `size` bytes in all (of the whole tensors).

    phase: beside what it runs: the backward pass, the forward pass, or the update, where nothing hides it.
    inside: whether it stays inside a node.
    """

    kind: Kind
    size: float
    messages: int
    phase: Literal["forward", "backward", "update"]
    inside: bool = False

    def wire(self, ranks: int) -> float:
        """Bytes that each rank sends, in a ring of `ranks`."""
        return self.size * (ranks - 1) / ranks * (2 if self.kind == "all-reduce" else 1)


def buckets(sizes: Sequence[int], limit: float) -> int:
    """How many messages parameters of these sizes make, in buckets of at most `limit` elements. As in DeepSpeed, one
    that is larger than a bucket goes alone.
    """
    count, filled = 0, 0
    for size in sizes:
        if filled and filled + size > limit:
            count, filled = count + 1, 0
        filled += size
    return count + bool(filled)


def collectives(zero: Zero, sizes: Sequence[int], ranks: int, accumulation: int) -> list[Collective]:
    """The collectives of one optimiser step. sizes: elements of each parameter that DeepSpeed holds, in forward order.

    Norms and flags, a few bytes each, are left out.
    """
    if ranks == 1:
        return []
    total = float(sum(sizes))
    size = total * zero.width
    reduced = buckets(sizes[::-1], zero.bucket)
    if zero.stage == 0:
        return [Collective("all-reduce", size, reduced, "backward")]
    if zero.stage < 3:
        times = accumulation if zero.stage == 2 else 1
        parts = reduced + ranks - 1  # a bucket that reaches into another rank's part is cut
        kind: Kind = "reduce" if zero.to_owner else "all-reduce"
        return [
            Collective(kind, size * times, (parts if zero.to_owner else reduced) * times, "backward"),
            Collective("all-gather", size, max(1, math.ceil(total / zero.gather)), "update"),
        ]
    gathered = buckets(sizes, max(zero.gather, 1.0))
    found = [
        Collective("all-gather", size * accumulation, gathered * accumulation, "forward"),
        Collective("reduce-scatter", size * accumulation, reduced * accumulation, "backward"),
    ]
    if total > zero.live:
        again = Collective("all-gather", size * accumulation, gathered * accumulation, "backward", zero.secondary > 1)
        found.append(again)
    return found


def seconds(one: Collective, gpu: Device, link: Interconnect, ranks: int, per_node: int) -> float:
    """How long it takes: a ring crosses each node's boundary once, so the bytes of a rank pass its node's network once;
    inside the node they pass its link. Each message also takes a hop per rank.
    """
    nodes = math.ceil(ranks / per_node)
    local = min(ranks, per_node)
    if one.inside or nodes == 1:
        members = local
        rate = gpu.link * link.efficiency
        hops = (members - 1) * LOCAL_HOP_S
    else:
        members = ranks
        rate = min(gpu.link, link.bandwidth) * link.efficiency
        hops = (nodes - 1) * link.latency + (ranks - nodes) * LOCAL_HOP_S
    if members == 1:
        return 0.0
    rounds = 2 if one.kind == "all-reduce" else 1
    return one.wire(members) / rate + one.messages * rounds * hops


def crossing(found: Sequence[Collective], ranks: int, per_node: int) -> float:
    """Bytes that each node sends over its network in a step."""
    if ranks <= per_node:
        return 0.0
    return sum(one.wire(ranks) for one in found if not one.inside)
