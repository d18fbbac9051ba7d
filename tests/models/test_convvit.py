"""ConvMAE's encoder against the official numbers, and the two ways to compute its convolution stages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mimscale.models.config import StudentConfig
from mimscale.models.convvit import ConvBlock, ConvStages, ConvViT, to_map, to_windows
from mimscale.models.patches import patchify, unpatchify
from mimscale.models.token_selection import mask_of
from tests import golden
from tests.golden import close, gradient_close

STUDENT = StudentConfig(width=32, depth=2, heads=2, drop_path=0.5)
STAGES: dict[str, Any] = {"widths": (8, 12), "depths": (1, 2)}


def small(student: StudentConfig = STUDENT, image_size: int = 64, fusion: bool = True, **stages: Any) -> ConvViT:
    """Every weight moved, so that no bias hides what it does."""
    torch.manual_seed(0)
    network = ConvViT(student, ConvStages(**{**STAGES, **stages}), image_size, fusion=fusion)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def images(count: int = 2, side: int = 64) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def some_ids(network: ConvViT, count: int = 2, keep: int = 5, seed: int = 2) -> Tensor:
    return torch.rand(count, network.patches, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)[:, :keep]


def test_golden_block() -> None:
    g = golden.load("convmae_block_dev")
    block = ConvBlock(g.config["dim"], g.config["mlp_ratio"])
    block.load_state_dict(g.part("state"))
    grid = (g.config["hw"], g.config["hw"])
    x = g["input/x"].requires_grad_()
    out = to_map(block(to_windows(x, grid), None, grid, None, g["input/visible_mask"].flatten(1)), grid)
    close(out, g["output/masked"])
    (out * g["input/cotangent"]).sum().backward()
    gradient_close(x.grad, g["grad/input"])
    for name, parameter in block.named_parameters():
        gradient_close(parameter.grad, g[f"grad/{name}"])
    close(to_map(block(to_windows(x, (4, 4)), None, (4, 4)), (4, 4)), g["output/unmasked"])


@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    side=st.integers(1, 4),
    keep=st.integers(1, 16),
    seed=st.integers(),
)
@settings(max_examples=50, deadline=None)
def test_windows_and_maps_are_inverse(rows: int, columns: int, side: int, keep: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(abs(seed) % 2**31)
    maps = torch.randn(2, 3, rows * side, columns * side, generator=generator)
    grid, keep = (rows, columns), min(keep, rows * columns)
    windows = to_windows(maps, grid)
    assert torch.equal(windows.permute(0, 1, 4, 2, 3), patchify(maps, side))
    assert torch.equal(to_map(windows, grid), maps)
    ids = torch.rand(2, rows * columns, generator=generator).argsort(dim=1)[:, :keep]
    some = to_map(to_windows(maps, grid, ids), grid, ids)
    hidden = (
        mask_of(ids, rows * columns).reshape(2, 1, rows, columns).repeat_interleave(side, 2).repeat_interleave(side, 3)
    )
    assert torch.equal(some, maps * (1 - hidden))
    assert torch.equal(to_windows(some, grid, ids), to_windows(maps, grid, ids))


@pytest.mark.parametrize(
    ("stages", "patch", "side"),
    [({}, 16, 64), ({"patches": (2, 2, 2)}, 8, 40), ({"patches": (4, 1, 3)}, 12, 48), ({"class_token": True}, 16, 96)],
)
@pytest.mark.parametrize("fusion", [True, False])
def test_skipping_masked_windows_changes_no_number(stages: dict[str, Any], patch: int, side: int, fusion: bool) -> None:
    """Outputs and gradients of visible windows alone equal those of all windows multiplied by the mask."""
    student = STUDENT.model_copy(update={"patch": patch})
    plain = small(student, side, fusion, **stages, skip_masked=False)
    fast = small(student, side, fusion, **stages)
    fast.load_state_dict(plain.state_dict())
    ids = some_ids(plain, 3)
    noise = torch.rand(3, plain.depth, 2, generator=torch.Generator().manual_seed(3))
    results = []
    for network in (plain, fast):
        image = images(3, side).requires_grad_()
        out = network(image, ids, noise, levels=(0, 1))
        direction = torch.randn(out.tokens.shape, generator=torch.Generator().manual_seed(4))
        (out.tokens * direction + out.levels[0]).sum().backward()
        gradients = {name: p.grad for name, p in network.named_parameters()}
        results.append((out, {**gradients, "image": image.grad}))
    (plain_out, plain_gradients), (fast_out, fast_gradients) = results
    close(fast_out.tokens, plain_out.tokens, 1e-6)
    close(fast_out.levels[1], plain_out.levels[1], 1e-6)
    assert (fast_out.stage_outputs is None) == (not fusion)
    for name, gradient in plain_gradients.items():
        assert gradient is not None
        gradient_close(fast_gradients[name], gradient)


@pytest.mark.parametrize("skip_masked", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_no_masked_pixel_reaches_the_latent(skip_masked: bool, seed: int) -> None:
    network = small(skip_masked=skip_masked)
    ids = some_ids(network, seed=seed)
    latent = network(images(), ids).tokens
    hidden = mask_of(ids, network.patches)[:, :, None, None, None]
    noise = torch.randn(patchify(images(), 16).shape, generator=torch.Generator().manual_seed(seed))
    changed = unpatchify(patchify(images(), 16) + 9 * hidden * noise, network.grid)
    assert not torch.equal(changed, images())
    assert torch.equal(network(changed, ids).tokens, latent)
    changed = unpatchify(patchify(images(), 16) + 9 * (1 - hidden) * noise, network.grid)
    assert not torch.equal(network(changed, ids).tokens, latent)
    whole = network(images()).tokens  # without a mask the neighbouring windows do reach it
    assert all((whole[sample, ids[sample]] - latent[sample]).abs().max() > 1e-2 for sample in range(2))


def test_all_patches_in_raster_order_are_the_whole_image() -> None:
    for skip_masked in (True, False):
        network = small(skip_masked=skip_masked)
        close(network(images(), torch.arange(16).expand(2, -1)).tokens, network(images()).tokens)


def test_drop_path_rises_over_all_stages() -> None:
    network = small(student=StudentConfig(width=32, depth=2, heads=2, drop_path=0.4))
    ids = some_ids(network)
    noise = torch.full((2, network.depth, 2), 0.35)
    assert network.depth == 5
    dropped = network(images(), ids, noise, levels=(0, 1))  # rates 0 0.1 0.2 0.3 0.4: only the last block is dropped
    assert torch.equal(dropped.levels[0], dropped.levels[1])
    kept = network(images(), ids, torch.full((2, 5, 2), 0.45), levels=(0, 1))
    assert not torch.equal(kept.levels[0], kept.levels[1])
    noise[:, 1:] = 0
    one = network(images(), ids, noise)
    assert torch.equal(one.tokens, network(images(), ids, noise).tokens) and not torch.equal(one.tokens, kept.tokens)


def test_recomputation_changes_no_gradient() -> None:
    gradients = []
    for every in (0, 1):
        network = small()
        network.recompute_every = every
        network(images(), some_ids(network)).tokens.square().sum().backward()
        gradients.append([p.grad for p in network.parameters()])
    for ours, stored in zip(*gradients, strict=True):
        assert ours is not None and torch.equal(ours, stored)


def test_two_kinds_of_norm() -> None:
    """As released: the configured 1e-6 reaches the attention stage and the last norm only."""
    norms = {name: m.eps for name, m in small().named_modules() if isinstance(m, torch.nn.LayerNorm)}
    attention = {name for name in norms if name.startswith("blocks3.") or name == "norm"}
    assert {norms[name] for name in attention} == {1e-6} and len(attention) == 5
    assert {eps for name, eps in norms.items() if name not in attention} == {1e-5}


def test_initialisation() -> None:
    """Matrices are Xavier-uniform where the release makes them so; other convolutions keep PyTorch's default."""
    network = ConvViT(STUDENT, ConvStages(widths=(64, 96)), 64)

    def bound(weight: Tensor) -> float:
        return float(weight.detach().abs().max())

    fan_in, fan_out = 96 * 4, 32
    assert bound(network.patch_embed3.proj.weight) == pytest.approx((6 / (fan_in + fan_out)) ** 0.5, rel=0.01)
    assert bound(network.patch_embed2.proj.weight) == pytest.approx((64 * 4) ** -0.5, rel=0.01)
    assert bound(network.state_dict()["blocks1.0.attn.weight"]) == pytest.approx(1 / 5, rel=0.01)
    assert bound(network.patch_embed4.weight) == pytest.approx((6 / 64) ** 0.5, rel=0.05)
    assert not network.patch_embed4.bias.any()
