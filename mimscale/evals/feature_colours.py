"""Patch features as colours: their first three principal components, so that several networks can be compared."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

COMPONENTS = 3
RANGE = 2.5  # standard deviations from the middle of a colour channel to its end


def colours(tokens: Sequence[Tensor]) -> list[Tensor]:
    """For each network, float32 [N, g, g, 3] in 0 to 1, from its tokens [N, g * g, D] of the same N images.

    Components are those of all patches of all images together, each scaled to variance 1. The sign of a component is
    arbitrary, and so is the order of two of nearly equal variance. Hence the first network gets the signs that make
    each third moment positive, and the others are turned (orthogonal Procrustes, Schoenemann 1966) to agree with the
    first on the same places of the same images. A turn keeps distances: it makes panels comparable, not alike.
    """
    scores = [principal_scores(some) for some in tokens]
    skewed_left = scores[0].pow(3).mean(dim=(0, 1, 2)) < 0
    reference = torch.where(skewed_left, -scores[0], scores[0])
    turned = [reference, *(_turned(some, reference) for some in scores[1:])]
    return [(0.5 + 0.5 * some / RANGE).clamp(0, 1) for some in turned]


def principal_scores(tokens_NTD: Tensor) -> Tensor:
    """float32 [N, g, g, 3]: scores on the components of largest variance, each of mean 0 and variance 1; a component
    without variance (fewer channels than three, or all patches alike) is 0.
    """
    images, patches, _ = tokens_NTD.shape
    side = int(patches**0.5)
    x = tokens_NTD.reshape(images * patches, -1).double()
    x = x - x.mean(dim=0)
    variances, vectors = torch.linalg.eigh(x.T @ x / len(x))  # ascending
    kept = vectors[:, -COMPONENTS:].flip(1)
    scores = x @ kept
    deviation = scores.std(dim=0, correction=0)
    scores = torch.where(deviation > 1e-6 * variances[-1].clamp_min(1e-12).sqrt(), scores / deviation, 0.0)
    scores = F.pad(scores, (0, COMPONENTS - scores.shape[1]))
    return scores.float().reshape(images, side, side, COMPONENTS)


def _turned(scores: Tensor, reference: Tensor) -> Tensor:
    """The scores times the rotation (with reflection) that brings them nearest to the reference, on its grid."""
    on_grid = F.interpolate(scores.permute(0, 3, 1, 2), reference.shape[1:3], mode="bilinear", antialias=True)
    u, _, vt = torch.linalg.svd(
        on_grid.permute(0, 2, 3, 1).reshape(-1, COMPONENTS).T @ reference.reshape(-1, COMPONENTS)
    )
    return scores @ (u @ vt)
