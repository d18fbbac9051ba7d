"""SimMIM's head: one linear layer from a token to the pixels of its patch."""

from __future__ import annotations

from torch import Tensor, nn


class PixelHead(nn.Linear):
    """The release's 1 x 1 convolution and pixel shuffle, computed as one matrix product per patch.

    Rows of the weight are ordered channel, row, column, unlike MAE's. PyTorch's default initialisation, which is the
    same for a linear layer and a 1 x 1 convolution.
    """

    def __init__(self, width: int, patch: int) -> None:
        super().__init__(width, 3 * patch * patch)
        self.patch = patch

    def forward(self, input: Tensor) -> Tensor:
        """Tokens [B, L, D] -> pixels [B, L, 3, p, p] in the parameters' dtype, for `patches.unpatchify`."""
        return super().forward(input).unflatten(-1, (3, self.patch, self.patch))
