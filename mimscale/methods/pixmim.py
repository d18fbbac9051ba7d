"""PixMIM: MAE that regresses low frequencies (arXiv 2303.02416, TMLR 2024).

Two changes to MAE. The target is filtered (`low_pass_radius`, see `mimscale.models.targets.low_pass`) while the encoder
sees the image as it is. And the crop keeps nearly the whole image, which a recipe asks for with `data.crop: padded`.

Differences to the release: none in target, crop, network and loss; the filter is the released one with its half bin
off the centre and its modulus. The warm-up of the recipe starts at zero (theirs at 1e-9 of the peak).
"""

from __future__ import annotations

from pydantic import Field

from mimscale.methods import mae


class PixMIMConfig(mae.MAEConfig):
    """MAE's, with the filter on: 40 cycles per side is the published radius at 224 px."""

    low_pass_radius: float = Field(40.0, gt=0)


class PixMIM(mae.MAE):
    """MAE with OpenMMLab's rule of weight decay: the class and mask tokens are exempt."""

    Config = PixMIMConfig

    def no_weight_decay(self) -> set[str]:
        return mae.TOKENS
