"""AMT's table of patch importance: one row of bytes per sample of the data set, split over the ranks.

Rank r of W holds the rows [N r / W, N (r + 1) / W) on its device. A small exchange between hosts (`gather`) gives every
rank which samples are in which rank's batch. So every rank knows all message sizes, the rows travel in one all-to-all
on the network of the training, and nothing is copied from a device to the host.
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


class ImportanceTable:
    """uint8 [samples, width], initially `fill`. rows: this rank's part, [n, width]. first: the sample of its first row.

    width: patches per sample. rank, world: of the process group by default; given, the table never communicates (to
    measure memory). Collective if there are several ranks.
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
        self._host_group: Any = None
        if connected and self.world > 1:
            self._host_group = dist.new_group(backend="gloo", timeout=timedelta(minutes=30))

    def gather(self, values: Ints) -> Ints:
        """All-gather between hosts: an array of the same shape on every rank -> [W, ...] on every rank."""
        if self._host_group is None:
            return values[None]
        gathered = torch.empty((self.world, *values.shape), dtype=torch.int64)
        dist.all_gather(list(gathered.unbind(0)), torch.from_numpy(values), group=self._host_group)
        return gathered.numpy()

    def read(self, ids_WB: Ints) -> Tensor:
        """Sample ids of every rank -> the rows of this rank's samples, uint8 [B, width]. Collective."""
        owners_WB = self._owner(ids_WB)
        here_WB = owners_WB == self.rank
        requested = self.rows[self._index(ids_WB[here_WB] - self.first)]
        order = np.argsort(owners_WB[self.rank], kind="stable")
        counts = np.bincount(owners_WB[self.rank], minlength=self.world)
        received = self._exchange(requested, here_WB.sum(axis=1), counts)
        return received[self._index(np.argsort(order))]

    def write(self, ids: list[Ints], positions: list[Ints], rows_FX: Tensor, valid_F: Tensor) -> None:
        """Write rows: ids and positions have one array per rank; this rank brings the rows uint8 [F, width].
        Collective.

        positions: of each row, ordered and the same on all ranks; of several rows for one sample the one with the
        highest position is written. Rows that are not valid (bool [F]) leave the table unchanged.
        """
        owners = [self._owner(rank_ids) for rank_ids in ids]
        order = np.argsort(owners[self.rank], kind="stable")
        packed = torch.cat([rows_FX, valid_F[:, None].to(torch.uint8)], dim=1)[self._index(order)]
        mine = [owner == self.rank for owner in owners]
        counts = np.array([int(here.sum()) for here in mine])
        received = self._exchange(packed, np.bincount(owners[self.rank], minlength=self.world), counts)
        samples, at = (np.concatenate([a[here] for a, here in zip(x, mine, strict=True)]) for x in (ids, positions))
        latest = np.argsort(at)[::-1]
        samples, kept = np.unique(samples[latest], return_index=True)
        target, received = self._index(samples - self.first), received[self._index(latest[kept])]
        self.rows[target] = torch.where(received[:, -1:].bool(), received[:, :-1], self.rows[target])

    def _owner(self, ids: Ints) -> Ints:
        """The rank that holds each sample's row."""
        return np.searchsorted(self._bounds, ids, side="right") - 1

    def _index(self, indices: Ints) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(indices)).to(self.rows.device, non_blocking=True)

    def _exchange(self, rows: Tensor, sent: Ints, received: Ints) -> Tensor:
        """All-to-all: rows ordered by receiver -> rows ordered by sender. sent, received: [W], numbers of rows."""
        if self._host_group is None:
            return rows
        group = None if rows.is_cuda else self._host_group
        answer = rows.new_empty((int(received.sum()), rows.shape[1]))
        dist.all_to_all_single(answer, rows.contiguous(), received.tolist(), sent.tolist(), group=group)
        return answer
