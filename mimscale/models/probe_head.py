"""The head of MAE's linear probe: BatchNorm without parameters, then a linear layer (He et al. 2022, app. A.1)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

EPS = 1e-6


class GroupedBatchNorm(nn.BatchNorm1d):
    """BatchNorm1d without affine parameters whose statistics are those of a group of samples, on whatever ranks.

    In train mode a sample is normalised with the mean and the biased variance of its group; each group moves the
    running statistics once (unbiased variance, momentum 0.1), lower groups first, so that they are the same on every
    rank. Nothing is differentiated: the features below come from frozen weights. A group that is not finite leaves the
    running statistics alone. State dict and evaluation are torch's.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=EPS, affine=False)

    def forward(self, x_BD: Tensor, group_B: Tensor | None = None, groups: int = 1) -> Tensor:
        """x: float32. group: int64, the group of each sample, below `groups`; None: one group. Collective in train
        mode, where every rank must give the same `groups`.
        """
        if not self.training:
            normalised: Tensor = super().forward(x_BD)
            return normalised
        with torch.no_grad():
            index = torch.zeros(len(x_BD), dtype=torch.int64, device=x_BD.device) if group_B is None else group_B
            mean, variance, count = group_statistics(x_BD.detach(), index, groups)
            self._follow(mean, variance * (count / (count - 1).clamp_min(1)))
        return (x_BD - mean[index]) / (variance[index] + self.eps).sqrt()

    def _follow(self, mean_GD: Tensor, variance_GD: Tensor) -> None:
        for mean, variance in zip(mean_GD, variance_GD, strict=True):
            finite = (mean + variance).isfinite().all()
            for running, new in ((self.running_mean, mean), (self.running_var, variance)):
                running.copy_(torch.where(finite, (1 - self.momentum) * running + self.momentum * new, running))
            self.num_batches_tracked += finite


def group_statistics(x_BD: Tensor, group_B: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance [G, D] and number of samples [G, 1] of each group, over all ranks. Collective."""
    rows = torch.cat([x_BD, torch.ones_like(x_BD[:, :1])], dim=1)
    sums = _all_sum(x_BD.new_zeros(groups, rows.shape[1]).index_add_(0, group_B, rows))
    count = sums[:, -1:].clamp_min(1)
    mean = sums[:, :-1] / count
    squares = (x_BD - mean[group_B]).square()
    variance = _all_sum(x_BD.new_zeros(groups, x_BD.shape[1]).index_add_(0, group_B, squares)) / count
    return mean, variance, count


def _all_sum(tensor: Tensor) -> Tensor:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


class ProbeHead(nn.Sequential):
    """`0`, the norm, and `1`, the layer: the names of the official checkpoints. [B, D] float32 -> [B, classes]."""

    def __init__(self, width: int, classes: int, std: float = 0.01) -> None:
        layer = nn.Linear(width, classes)
        nn.init.trunc_normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)
        super().__init__(GroupedBatchNorm(width), layer)

    def forward(self, x_BD: Tensor, group_B: Tensor | None = None, groups: int = 1) -> Tensor:
        logits: Tensor = self[1](self[0](x_BD, group_B, groups))
        return logits
