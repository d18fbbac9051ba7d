"""How much of their space features fill, without labels: effective rank and spread. Both fall where they collapse."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-7


def rankme(features_ND: Tensor) -> float:
    """RankMe: exp of the entropy of the singular values' shares, between 1 and min(N, D).

    features: [N, D] of any float type, not centred, N at least D for a figure that does not depend on N. The singular
    values come from the Gram matrix of the smaller side in float64: those below about 1e-8 of the largest are noise,
    and their shares too small to count.
    Source: Garrido et al., ICML 2023 (arXiv 2210.02885), eq. 2 and 3, with its epsilon of 1e-7.
    """
    rows, channels = features_ND.shape
    narrow = features_ND if rows >= channels else features_ND.T
    gram = torch.zeros(narrow.shape[1], narrow.shape[1], dtype=torch.float64, device=features_ND.device)
    for piece in narrow.split(8192):  # of a large set no whole copy in float64
        piece = piece.double()
        gram += piece.T @ piece
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    shares = singular / singular.sum().clamp_min(torch.finfo(torch.float64).tiny) + EPSILON
    return float(torch.exp(-(shares * shares.log()).sum()))


def spread(features_ND: Tensor) -> float:
    """Feature spread: sqrt(D) times the mean over channels of the deviation of L2-normalised features.

    features: [N, D] of any float type. 0 where all features point the same way, near 1 where they lie evenly in all
    directions.
    Source: the output deviation of Chen and He, CVPR 2021 (arXiv 2011.10566), sec. 4.1, where 1 / sqrt(D) is the value
    of a zero-mean isotropic Gaussian; the factor makes that 1 for every width.
    """
    unit = F.normalize(features_ND.double(), dim=1)
    return float(unit.std(dim=0, correction=0).mean() * features_ND.shape[1] ** 0.5)
