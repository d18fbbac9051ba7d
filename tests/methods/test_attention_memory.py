"""No student and no decoder makes a tensor with one number per sample, head, query and key, forward or backward.

The exception is a relative position bias (BEiT, SimMIM): the bias itself, one number per head, query and key for the
whole batch, is unavoidable, and PyTorch has no kernel that sums the gradient of a trained bias over the batch: on a CPU
it makes the scores, on a GPU the bias' gradient of every sample.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mimscale.config.run import method_class
from mimscale.types import Targets, TeacherInfo
from tests.golden import batch_of, run_config
from tests.operators import Attentions, Operators, attention_matrices

DECODER = {"decoder_width": 32, "decoder_depth": 2, "decoder_heads": 4}
STAGES = {"widths": [8, 12], "depths": [1, 1]}
CASES: dict[str, dict[str, Any]] = {
    "mae": {"name": "mae", **DECODER},
    "pixmim": {"name": "pixmim", **DECODER, "low_pass_radius": 20.0},
    "mff": {"name": "mff", **DECODER, "fusion": {"levels": [0, 2]}},
    "convmae": {"name": "convmae", **DECODER, "stages": STAGES},
    "mrmae": {"name": "mrmae", **DECODER},
    "maskalign": {"name": "maskalign", "levels": "top2"},
    "simmim, absolute positions": {"name": "simmim", "positions": "absolute"},
    "finetune": {"name": "finetune", "classes": 3},
    "finetune, ConvMAE": {"name": "finetune", "classes": 3, "stages": STAGES},
    "finetune, SimMIM, absolute positions": {"name": "finetune", "classes": 3, "beit": {"positions": "absolute"}},
}
BIASED: dict[str, dict[str, Any]] = {
    "simmim": {"name": "simmim"},
    "simmim, a bias per block": {"name": "simmim", "positions": "per_block"},
}
CLIP = TeacherInfo("clip", dim=24, depth=3, grid=(6, 6), image_size=96, has_cls=True)


def step(section: dict[str, Any], plain: Any) -> tuple[Operators, Attentions]:
    """Forward and backward of a batch of 5; no other dimension of the networks is a number of tokens."""
    taught = section["name"] in ("mrmae", "maskalign")
    run = run_config(section, {"width": 32, "depth": 3, "heads": 4, "drop_path": 0.2}, 96, engine={"plain": plain})
    method: Any = method_class(section["name"])(run, {"clip": CLIP} if taught else {})
    noise = {name: torch.rand(5, *wanted.shape) + 1e-3 for name, wanted in method.needs.noise.items()}
    targets = {"clip": Targets({i: torch.randn(5, 36, 24) for i in range(3)}, {i: torch.randn(5, 24) for i in range(3)},
                               torch.rand(5, 36))}  # fmt: skip
    with Attentions() as attentions, Operators() as operators:
        method(batch_of(torch.randn(5, 3, 96, 96), **noise), targets)["loss"].backward()
    return operators, attentions


@pytest.mark.parametrize("plain", [[], "all"])
@pytest.mark.parametrize("name", CASES)
def test_no_attention_matrix(name: str, plain: Any) -> None:
    operators, attentions = step(CASES[name], plain)
    assert len(attentions.calls) == 3 + ("decoder_depth" in CASES[name]) * 2
    assert not attention_matrices(operators, attentions)


@pytest.mark.parametrize("name", BIASED)
def test_a_trained_bias_is_the_exception(name: str) -> None:
    operators, attentions = step(BIASED[name], [])
    assert attention_matrices(operators, attentions) == {(5, 4, 37, 37), (20, 37, 37)}
    assert (1, 4, 37, 37) in operators.shapes


def test_heads_are_parted_without_copies() -> None:
    """In a step of MAE: one join of three gradients per block, and three copies outside of the blocks: channels to the
    end in the target, and the patch tokens' part of the gradient at the input of decoder and encoder.
    """
    operators, _ = step({**CASES["mae"], "norm_pix_loss": False}, [])
    names = operators.names
    assert names["aten.stack.default"] == 3 + 2
    assert names["aten.clone.default"] == 3
    assert names["aten._to_copy.default"] == 0 and names["aten.gather.default"] == 0
