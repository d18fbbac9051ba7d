"""A table with one row of bytes per sample of the data set, cut over the ranks and read and written by sample.

Rank r of W holds the rows [N r / W, N (r + 1) / W) on its device. Which sample stands in whose batch is known to
every rank after one small exchange between hosts (`Table.gather`); so the sizes of what follows are known everywhere,
the rows travel by one all-to-all on the training's own network, and nothing is read back from a device.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]


class Table:
    """uint8 [samples, width], `fill` at first; `rows` are this rank's, from `first` on.

    rank, world: of the process group by default; others only measure memory. Collective where there are several ranks.
    """

    def __init__(
        self,
        samples: int,
        width: int,
        fill: int,
        device: torch.device,
        rank: int | None = None,
        world: int | None = None,
    ) -> None:
        connected = dist.is_initialized() and world is None
        self.rank = dist.get_rank() if connected else rank or 0
        self.world = dist.get_world_size() if connected else world or 1
        self.width = width
        self._bounds: Ints = np.array([samples * r // self.world for r in range(self.world + 1)])
        self.first = int(self._bounds[self.rank])
        self.rows = torch.full(
            (int(self._bounds[self.rank + 1]) - self.first, width), fill, dtype=torch.uint8, device=device
        )
        self._hosts: Any = None
        if connected and self.world > 1:
            self._hosts = dist.new_group(backend="gloo", timeout=timedelta(minutes=30))

    def gather(self, values: Ints) -> Ints:
        """An array of one shape on every rank -> [W, ...] on every rank. Between hosts."""
        if self._hosts is None:
            return values[None]
        everyone = torch.empty((self.world, *values.shape), dtype=torch.int64)
        dist.all_gather(list(everyone.unbind(0)), torch.from_numpy(values), group=self._hosts)
        return everyone.numpy()

    def read(self, ids_WB: Ints) -> Tensor:
        """Sample ids of every rank -> the rows of this rank's samples, uint8 [B, width]. Collective."""
        owners = self._owner(ids_WB)
        here = owners == self.rank
        answers = self.rows[self._index(ids_WB[here] - self.first)]
        order = np.argsort(owners[self.rank], kind="stable")
        received = self._exchange(answers, here.sum(axis=1), np.bincount(owners[self.rank], minlength=self.world))
        return received[self._index(np.argsort(order))]

    def write(self, ids: list[Ints], places: list[Ints], rows_FX: Tensor, valid_F: Tensor) -> None:
        """Put new rows at the samples `ids` of every rank; this rank brings uint8 [F, width]. Collective.

        places: of each, in any order that all ranks share; of several rows for one sample the last in it counts. Rows
        that are not valid (bool [F]) leave what is there.
        """
        owners = [self._owner(theirs) for theirs in ids]
        order = np.argsort(owners[self.rank], kind="stable")
        packed = torch.cat([rows_FX, valid_F[:, None].to(torch.uint8)], dim=1)[self._index(order)]
        mine = [owner == self.rank for owner in owners]
        counts = np.array([int(here.sum()) for here in mine])
        received = self._exchange(packed, np.bincount(owners[self.rank], minlength=self.world), counts)
        samples, at = (np.concatenate([a[here] for a, here in zip(each, mine, strict=True)]) for each in (ids, places))
        latest = np.argsort(at)[::-1]
        samples, kept = np.unique(samples[latest], return_index=True)
        target, received = self._index(samples - self.first), received[self._index(latest[kept])]
        self.rows[target] = torch.where(received[:, -1:].bool(), received[:, :-1], self.rows[target])

    def _owner(self, ids: Ints) -> Ints:
        return np.searchsorted(self._bounds, ids, side="right") - 1

    def _index(self, places: Ints) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(places)).to(self.rows.device, non_blocking=True)

    def _exchange(self, rows: Tensor, sent: Ints, received: Ints) -> Tensor:
        """Rows in the order of their receivers -> rows in the order of their senders. sent, received: [W] counts."""
        if self._hosts is None:
            return rows
        group = None if rows.is_cuda else self._hosts
        answer = rows.new_empty((int(received.sum()), rows.shape[1]))
        dist.all_to_all_single(answer, rows.contiguous(), received.tolist(), sent.tolist(), group=group)
        return answer
