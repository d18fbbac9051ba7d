"""SimMIM's head: one linear layer from a token to the pixels of its patch."""

from __future__ import annotations

from torch import Tensor, nn


class PixelHead(nn.Linear):
    """The 1 x 1 convolution and pixel shuffle of the release, as the matrix product that they are, patch by patch.

    Rows of the weight are in the order channel, row, column, which is not MAE's. PyTorch's default initialisation, the
    same for a linear layer and for a 1 x 1 convolution.
    """

    def __init__(self, width: int, patch: int) -> None:
        super().__init__(width, 3 * patch * patch)
        self.patch = patch

    def forward(self, input: Tensor) -> Tensor:
        """Tokens [B, L, D] -> [B, L, 3, p, p] in the parameters' type; `patches.assemble` makes an image of them."""
        return super().forward(input).unflatten(-1, (3, self.patch, self.patch))
