"""The fast paths inside the model on a CUDA device: equal to their plain twins, in the kernels that they promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mimscale.config.run import method_class
from mimscale.teachers.ensemble import TeacherEnsemble, build_skeletons
from mimscale.types import Batch, Targets
from tests.golden import batch_of, run_config
from tests.operators import Attentions, Operators, attention_matrices
from tests.teachers import tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CUDA = torch.device("cuda")
DECODER = {"decoder_width": 64, "decoder_depth": 2, "decoder_heads": 4}
STAGES = {"widths": [16, 32], "depths": [1, 1]}
METHODS: dict[str, dict[str, Any]] = {
    "mae": {"name": "mae", **DECODER},
    "convmae": {"name": "convmae", **DECODER, "stages": STAGES},
    "simmim": {"name": "simmim", "positions": "absolute"},
    "simmim, a relative bias": {"name": "simmim"},
}


def inputs(method: Any, side: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    noise = {name: torch.rand(8, *wanted.shape, generator=generator) for name, wanted in method.needs.noise.items()}
    return batch_of(torch.randn(8, 3, side, side, generator=generator), **noise).to(CUDA)


def step(
    section: dict[str, Any], dtype: torch.dtype, plain: Any
) -> tuple[Tensor, dict[str, Tensor], Operators, Attentions]:
    """Loss, gradients and operators of one forward and backward pass."""
    run = run_config(section, {"width": 64, "depth": 3, "heads": 4, "drop_path": 0.2}, 96, engine={"plain": plain})
    torch.manual_seed(3)
    method: Any = method_class(section["name"])(run, {}).to(CUDA)
    for parameter in method.parameters():
        parameter.data = parameter.data.to(dtype)
    with Attentions() as attentions, Operators() as operators:
        loss = method(inputs(method, 96), {})["loss"]
        loss.backward()
    return loss.detach(), {name: p.grad for name, p in method.named_parameters()}, operators, attentions


def error(ours: Tensor, reference: Tensor) -> float:
    return float((ours.float() - reference.float()).norm() / reference.float().norm().clamp_min(1e-12))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("name", METHODS)
def test_equals_its_plain_twin(name: str, dtype: torch.dtype, limit: float) -> None:
    loss, gradients, _, _ = step(METHODS[name], dtype, [])
    plain_loss, plain_gradients, _, _ = step(METHODS[name], dtype, "all")
    assert error(loss, plain_loss) < limit / 10
    assert gradients.keys() == plain_gradients.keys()
    ours, theirs = (torch.cat([g.float().flatten() for g in each.values()]) for each in (gradients, plain_gradients))
    assert error(ours, theirs) < limit


@pytest.mark.parametrize("name", ["mae", "convmae", "simmim"])
def test_attention_is_a_fused_kernel_without_copies(name: str) -> None:
    _, _, operators, attentions = step(METHODS[name], torch.bfloat16, [])
    forward = [n for n in operators.names.elements() if "_scaled_dot_product_" in n and "backward" not in n]
    assert len(forward) == len(attentions.calls) and not [n for n in forward if "math" in n]
    assert not attention_matrices(operators, attentions)
    assert operators.names["aten.stack.default"] == len(forward)


def targets(config: Any, fused: bool) -> tuple[Targets, Operators]:
    configs = {"t": config}
    ensemble = TeacherEnsemble(configs, build_skeletons(configs, 64), {"t": tiny.ALL}, 64, CUDA, fused)
    with Operators() as operators:
        found = ensemble(tiny.images(4, 64).to(CUDA))["t"]
    return found, operators


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-4), ("fp16", 0.01), ("bf16", 0.05)])
@pytest.mark.parametrize("name", ["vit_base_patch16_clip_quickgelu_224", "ViT-B-16-quickgelu"])
def test_a_teachers_quickgelu_is_one_kernel(name: str, precision: str, limit: float) -> None:
    make = tiny.open_clip_config if name.startswith("ViT") else tiny.timm_config
    config = make(name, None, random=True, precision=precision)
    (fused, operators), (plain, plain_operators) = targets(config, True), targets(config, False)
    assert operators.names["aten.silu.default"] == 3 and operators.names["aten.sigmoid.default"] == 0
    assert plain_operators.names["aten.sigmoid.default"] == 3
    for level, tokens in plain.levels.items():
        assert error(fused.levels[level], tokens) < limit
