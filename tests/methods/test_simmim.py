"""SimMIM against the official program's numbers, and the properties that make it SimMIM."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mimscale.convert.formats.simmim import from_official
from mimscale.errors import UserError
from mimscale.methods.simmim import SimMIM, masked_pixel_loss
from mimscale.models.patches import patchify, unnormalised, unpatchify
from mimscale.models.rel_pos_bias import index_among
from mimscale.models.token_selection import gather_tokens, raster_order
from mimscale.optim.param_groups import parameter_groups
from mimscale.types import TeacherInfo
from tests import golden
from tests.golden import Golden, batch_of, close, gradient_close, run_config

STUDENT = {"width": 32, "depth": 2, "heads": 2}


def small(student: dict[str, Any] | None = None, **values: Any) -> SimMIM:
    """Moved away from its start, where the bias tables and the biases are zero."""
    torch.manual_seed(3)
    method = SimMIM(run_config({"name": "simmim", **values}, {**STUDENT, **(student or {})}, 96), {})
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return method


def inputs(method: SimMIM, count: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    images = torch.randn(count, 3, 96, 96, generator=generator)
    return images, torch.rand(count, *method.needs.noise["mask"].shape, generator=generator)


def mask_by(method: SimMIM, noise: Tensor) -> Tensor:
    """float32 [B, L], 1 = masked."""
    images = torch.zeros(len(noise), 3, 96, 96)
    return raster_order(method.masking.choose(batch_of(images, mask=noise), {})).mask


def golden_method(g: Golden) -> SimMIM:
    c = g.config
    section = {
        "name": "simmim",
        "masking": {"ratio": c["mask_ratio"], "unit": c["mask_patch_size"]},
        "positions": {"shared": "relative", "ape": "absolute"}[c["position"]],
        "layer_scale": c["layer_scale_init"],
    }
    student = {"width": c["embed"], "depth": c["depth"], "heads": c["heads"], "patch": c["patch"]}
    method = SimMIM(run_config(section, student, c["img_size"]), {})
    method.load_state_dict(from_official(g.part("state")).weights)
    return method


@pytest.mark.parametrize("name", ["simmim_dev", "simmim_ape"])
def test_golden(name: str) -> None:
    g = golden.load(name)
    method = golden_method(g)
    factor = method.masking.count.factor
    masked_units = g["mask"][:, ::factor, ::factor].flatten(1).bool()
    noise = torch.where(masked_units, 0.25, 0.75)  # an order in which the golden's units come first
    batch, mask = batch_of(g["image"], mask=noise), mask_by(method, noise)
    assert method.masking.count.masked == g.config["mask_count"]
    golden.equal(mask, g["mask"].flatten(1).float())

    entering: list[Tensor] = []
    method.student.blocks[0].register_forward_hook(lambda _, inputs, output: entering.append(inputs[0]))
    out = method.student(g["image"], mask, levels=range(g.config["depth"]))
    close(entering[0], g["encoder_input"])
    for level, output in out.levels.items():
        close(output, g[f"enc_block_out/{level}"])
    grid = method.student.grid
    close(out.tokens[:, 1:].transpose(1, 2).unflatten(2, grid), g["z"])
    pred = method.head(out.tokens[:, 1:])
    close(unpatchify(pred, grid), g["reconstruction"])
    if method.student.rel_pos_bias is not None:
        close(method.student.rel_pos_bias(index_among(method.student.grid, torch.device("cpu")))[0], g["rel_pos_bias"])

    loss = method(batch, {})["loss"]
    golden.loss_close(loss, g["loss"])
    loss.backward()
    ours = {n: p.grad for n, p in method.named_parameters()}
    stored = from_official(g.part("grad")).weights
    assert len(stored) == len(g.part("grad")) >= 9
    for parameter, gradient in stored.items():
        gradient_close(ours[parameter], gradient)
    golden.every_parameter_has_a_gradient(method)

    groups = parameter_groups(method, weight_decay=0.05, no_weight_decay=method.no_weight_decay())
    undecayed = {n for group in groups for n in group["names"] if not group["weight_decay"]}
    names = dict(method.named_parameters())
    exempt = {name.replace("encoder.", "student.") for name in g.config["no_weight_decay"]} & names.keys()
    assert undecayed == exempt | {name for name, p in names.items() if p.dim() == 1}
    assert "student.mask_token" not in undecayed


@pytest.mark.parametrize("positions", ["relative", "absolute"])
def test_masked_pixels_do_not_reach_the_tokens(positions: str) -> None:
    method = small(positions=positions)
    images, noise = inputs(method)
    mask = mask_by(method, noise)
    changed = unpatchify(patchify(images, 16) + 5 * mask[:, :, None, None, None], method.student.grid)
    assert not torch.equal(changed, images)
    assert torch.equal(method.student(changed, mask).tokens, method.student(images, mask).tokens)
    assert not torch.equal(method.student(images + 1, mask).tokens, method.student(images, mask).tokens)


def test_loss_reads_masked_patches_only() -> None:
    pred, target = torch.zeros(2, 3, 3, 2, 2), torch.ones(2, 3, 3, 2, 2)
    mask = torch.tensor([[1.0, 0, 0], [0, 1, 1]])
    target[0, 1:], target[1, 1] = 7, -4
    assert float(masked_pixel_loss(pred, target, mask)) == pytest.approx((1 + 4 + 1) / 3, rel=1e-5)


@pytest.mark.parametrize("positions", ["relative", "absolute"])
def test_dropped_patches(positions: str) -> None:
    """Tokens may be dropped before the first block: nothing of them is left, and the others keep their positions."""
    method = small(positions=positions).double()
    images, noise = inputs(method)
    images, mask = images.double(), mask_by(method, noise)
    every = torch.arange(36).expand(3, -1).flip(1)
    whole = method.student(images, mask).tokens
    torch.testing.assert_close(method.student(images, mask, ids_keep=every).tokens[:, 1:], whole[:, 1:].flip(1))

    kept = torch.rand(3, 36, generator=torch.Generator().manual_seed(1)).argsort(1)[:, :20]
    tokens = method.student(images, mask, ids_keep=kept).tokens
    assert tokens.shape == (3, 21, 32)
    dropped = torch.ones(3, 36, dtype=torch.double).scatter(1, kept, 0)
    changed = unpatchify(patchify(images, 16) + dropped[:, :, None, None, None], method.student.grid)
    assert torch.equal(method.student(changed, mask, ids_keep=kept).tokens, tokens)
    assert not torch.allclose(tokens[:, 1:], gather_tokens(whole[:, 1:], kept))


def test_drop_path() -> None:
    method = small({"drop_path": 0.1})
    assert {k: (n.kind, n.shape) for k, n in method.needs.noise.items()} == {
        "mask": ("uniform", (9,)),
        "drop_path": ("uniform", (2, 2)),
    }
    images, noise = inputs(method)

    def loss(value: float) -> Tensor:
        return method(batch_of(images, mask=noise, drop_path=torch.full((3, 2, 2), value)), {})["loss"]

    assert loss(0.99) != loss(0.05)  # in the last block, 0.1 of the draws drop
    before = torch.get_rng_state()
    assert torch.equal(loss(0.05), loss(0.05)) and torch.equal(torch.get_rng_state(), before)


def test_initialisation() -> None:
    torch.manual_seed(0)
    method = SimMIM(run_config({"name": "simmim"}, {"width": 64, "depth": 4, "heads": 4}), {})
    student = method.student
    weights = dict(student.named_parameters())
    for name in ("patch_embed.proj.weight", "blocks.1.attn.qkv.weight", "blocks.3.mlp.fc1.weight"):
        weight = weights[name]
        assert 0.019 < weight.abs().max() <= 0.02
        assert weight.std().item() == pytest.approx(0.5396 * 0.02, rel=0.02)  # a normal, cut at one deviation
    for block in range(4):
        for name in ("attn.proj.weight", "mlp.fc2.weight"):
            assert 0.019 < weights[f"blocks.{block}.{name}"].abs().max() * (2 * (block + 1)) ** 0.5 <= 0.0200001
    for name, weight in weights.items():
        assert not weight.any() or not name.endswith(("bias", "bias_table")), name
        assert weight.eq(0.1).all() or "gamma" not in name, name
    assert all(0 < weights[name].abs().max() <= 0.02 for name in ("cls_token", "mask_token"))
    assert "pos_embed" not in weights and "rel_pos_bias.relative_position_bias_table" in weights
    assert method.head.weight.abs().max().item() == pytest.approx(64**-0.5, rel=0.01)  # PyTorch's own


@pytest.mark.parametrize("every", [1, 2])
def test_activation_checkpointing_changes_nothing(every: int) -> None:
    method = small({"drop_path": 0.2})
    images, noise = inputs(method)
    batch = batch_of(images, mask=noise, drop_path=torch.rand(3, 2, 2, generator=torch.Generator().manual_seed(1)))
    method(batch, {})["loss"].backward()
    plain = {name: p.grad for name, p in method.named_parameters()}
    method.zero_grad()
    method.student.recompute_every = every
    method(batch, {})["loss"].backward()
    for name, parameter in method.named_parameters():
        stored = plain[name]
        assert parameter.grad is not None and stored is not None and torch.equal(parameter.grad, stored), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_fp32(dtype: torch.dtype) -> None:
    method = small()
    images, noise = inputs(method, 8)
    batch = batch_of(images, mask=noise)
    full = method(batch, {})["loss"]
    method.to(dtype)
    half = method(batch, {})["loss"]
    assert half.dtype == torch.float32
    half.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())
    torch.testing.assert_close(half, full, rtol=5e-3, atol=0)


def test_view() -> None:
    method = small({"drop_path": 0.1})
    images, noise = inputs(method)
    view = method.view(batch_of(images, mask=noise, drop_path=torch.zeros(3, 2, 2)), {})
    assert view.reconstruction is not None and view.reconstruction.shape == images.shape
    assert view.mask is not None and view.mask.shape == (3, 36) and view.mask.sum(1).eq(4 * 6).all()
    assert not view.reconstruction.requires_grad
    pred = method.head(method.student(images, view.mask).tokens[:, 1:])
    torch.testing.assert_close(view.reconstruction, unnormalised(unpatchify(pred, (6, 6))))


@pytest.mark.parametrize(
    ("values", "fragment"),
    [
        ({"masking": {"ratio": 0.0}}, "leaves 9 of 9 units of 32 px visible; raise it"),
        ({"masking": {"ratio": 0.9}}, "leaves 0 of 9 units of 32 px visible; lower it"),
        ({"masking": {"unit": 24}}, "masking.unit = 24 must be a multiple of student.patch = 16"),
        ({"masking": {"unit": 64}}, "divide data.image_size = 96"),
        ({"positions": "both"}, "method.positions = 'both'"),
        ({"layer_scale": 0}, "method.layer_scale = 0"),
    ],
)
def test_refusals(values: dict[str, Any], fragment: str) -> None:
    with pytest.raises(UserError, match=fragment) as refused:
        small(**values)
    assert "\n" not in str(refused.value)


def test_a_teacher_is_refused() -> None:
    teacher = TeacherInfo("clip", 8, 2, (6, 6), 96, has_cls=True)
    with pytest.raises(UserError, match="teachers.clip: neither simmim nor the masking policy random uses it; remove"):
        SimMIM(run_config({"name": "simmim"}, STUDENT, 96), {"clip": teacher})


def test_fusion_of_levels() -> None:
    method = small(fusion={"kind": "mff", "levels": [0, 1]})
    images, noise = inputs(method)
    out = method(batch_of(images, mask=noise), {})
    out["loss"].backward()
    golden.every_parameter_has_a_gradient(method)
    assert out.keys() == {"loss", "weight_0", "weight_1"} and method.needs.noise.keys() == {"mask"}
    with pytest.raises(UserError, match="levels = .0. must be ascending, from 0 or more to 1"):
        small(fusion={"kind": "sum", "levels": [0]})
