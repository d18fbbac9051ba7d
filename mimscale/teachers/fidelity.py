"""Distance of a teacher's targets in low precision from those in fp32. Pure functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def relative_error(ours_BLD: Tensor, reference_BLD: Tensor) -> float:
    """L2 norm of the difference divided by that of the reference, over all tokens of all images."""
    reference = reference_BLD.double()
    return float((ours_BLD.double() - reference).norm() / reference.norm())


def cosine(ours_BLD: Tensor, reference_BLD: Tensor) -> tuple[float, float]:
    """(mean, minimum) over tokens of the cosine similarity with the reference."""
    values = F.cosine_similarity(ours_BLD.double(), reference_BLD.double(), dim=-1)
    return float(values.mean()), float(values.min())


def top_overlap(ours_BL: Tensor, reference_BL: Tensor, share: float) -> float:
    """Overlap of the tokens with the largest values, as a fraction of their number, mean over images.

    share: number of tokens compared, as a fraction of L (rounded, at least one).
    """
    count = max(1, round(share * ours_BL.shape[1]))

    def largest(values_BL: Tensor) -> Tensor:
        chosen = torch.zeros_like(values_BL, dtype=torch.bool)
        return chosen.scatter(1, values_BL.topk(count, dim=1).indices, True)

    both = largest(ours_BL) & largest(reference_BL)
    return float(both.sum(1).double().mean() / count)
