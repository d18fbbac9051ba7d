"""PixMIM: MAE that regresses low frequencies (arXiv 2303.02416, TMLR 2024).

Two changes to MAE: the target is low-pass filtered (`low_pass_radius`, see `mimscale.models.targets.low_pass`), the
encoder's input is not; and the crop keeps nearly the whole image (`data.crop: padded` in a recipe).

Differences from the release: none in target, crop, network and loss; the filter is the released one, including its
centre half a bin off and its modulus.
"""

from __future__ import annotations

from pydantic import Field

from mimscale.methods import mae


class PixMIMConfig(mae.MAEConfig):
    """As MAE's, with the filter: 40 cycles per side is the published radius at 224 px."""

    low_pass_radius: float = Field(40.0, gt=0, le=1e4)


class PixMIM(mae.MAE):
    """MAE with OpenMMLab's rule for weight decay: none on the class and mask tokens."""

    Config = PixMIMConfig

    def no_weight_decay(self) -> set[str]:
        return mae.TOKENS
