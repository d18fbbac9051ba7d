"""Our ViT against timm's, and the parts that timm's does not have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mimscale.models.config import StudentConfig
from mimscale.models.vit import ViT, drop_path_scales
from tests.golden import close

SMALL = StudentConfig(width=32, depth=3, heads=2, drop_path=0.5)


def images(count: int = 2, side: int = 64) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def small(seed: int = 0, **options: object) -> ViT:
    torch.manual_seed(seed)
    return ViT(SMALL, 64, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("width", "depth", "heads", "patch", "side", "mlp_ratio"),
    [(32, 2, 2, 16, 64, 4.0), (48, 3, 3, 8, 40, 2.0), (64, 1, 4, 14, 70, 4.0), (36, 4, 1, 4, 16, 3.0)],
)
def test_equals_timm(width: int, depth: int, heads: int, patch: int, side: int, mlp_ratio: float) -> None:
    torch.manual_seed(width)
    vit = ViT(StudentConfig(width=width, depth=depth, heads=heads, patch=patch, mlp_ratio=mlp_ratio), side)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    reference = VisionTransformer(
        img_size=side,
        patch_size=patch,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=mlp_ratio,
        num_classes=0,
    )
    reference.load_state_dict(vit.state_dict())  # strict: the names are timm's
    out = vit(images(side=side), levels=range(depth))
    close(out.tokens, reference.forward_features(images(side=side)))
    close(vit.norm(out.levels[depth - 1]), out.tokens)


def test_visible_tokens_are_those_of_the_whole_image_before_attention() -> None:
    """With depth 0 attention cannot mix, so a masked pass must give a subset, in the given order, of the whole pass."""
    vit = small()
    vit.blocks = torch.nn.ModuleList()
    ids = torch.tensor([[5, 0, 9], [1, 2, 3]])
    whole, some = vit(images()).tokens, vit(images(), ids).tokens
    assert some.shape == (2, 4, 32)
    for sample in range(2):
        close(some[sample, 1:], whole[sample, 1 + ids[sample]])
        close(some[sample, 0], whole[sample, 0])


def test_all_ids_in_raster_order_are_the_whole_image() -> None:
    vit = small()
    close(vit(images(), torch.arange(16).expand(2, -1)).tokens, vit(images()).tokens)


def test_drop_path_is_exact() -> None:
    """A dropped branch leaves no trace, a kept one is divided by the probability to keep it."""
    noise = torch.tensor([[[0.0, 0.99], [0.2, 0.3], [0.4, 0.6]]])
    scales = drop_path_scales(noise, 0.5)
    assert torch.equal(scales, torch.tensor([[[1.0, 1.0], [0.0, 1 / 0.75], [0.0, 2.0]]]))

    vit = small(final_norm=False)
    out = vit(images(1), drop_noise=noise, levels=range(3))
    blocks: list[Any] = list(vit.blocks)
    first, second, third = blocks
    x = out.levels[0]
    x = x + second.mlp(second.norm2(x)) / 0.75
    close(out.levels[1], x)
    close(out.tokens, x + third.mlp(third.norm2(x)) * 2)
    close(first(images_in(vit)), out.levels[0])
    assert torch.equal(out.tokens, vit(images(1), drop_noise=noise).tokens)


def images_in(vit: ViT) -> Tensor:
    """What enters the first block for `images(1)`."""
    caught: list[Tensor] = []
    handle = vit.blocks[0].register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    vit(images(1))
    handle.remove()
    return caught[0]


def test_drop_path_keeps_the_expectation_and_follows_the_rate() -> None:
    noise = torch.rand(20000, 4, 2, generator=torch.Generator().manual_seed(2))
    scales = drop_path_scales(noise, 0.3)
    dropped = (scales == 0).float().mean(dim=(0, 2))
    close(dropped, torch.tensor([0.0, 0.1, 0.2, 0.3]), 0.01)
    close(scales.mean(dim=(0, 2)), torch.ones(4), 0.02)
    assert torch.equal(drop_path_scales(noise[:, :1], 0.3), torch.ones(20000, 1, 2))


@pytest.mark.parametrize("every", [1, 2])
def test_checkpointing_changes_no_gradient(every: int) -> None:
    noise = torch.rand(2, 3, 2, generator=torch.Generator().manual_seed(3))
    gradients = []
    for recompute_every in (0, every):
        vit = small(recompute_every=recompute_every)
        before = torch.get_rng_state()
        vit(images(), torch.tensor([[3, 1], [0, 7]]), noise).tokens.square().sum().backward()
        assert torch.equal(torch.get_rng_state(), before)
        gradients.append([p.grad for p in vit.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True) if a is not None and b is not None)
    assert all(a is not None for a in gradients[0] + gradients[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters(dtype: torch.dtype) -> None:
    vit = small()
    full = vit(images()).tokens
    for parameter in vit.parameters():
        parameter.data = parameter.data.to(dtype)
    half = vit(images()).tokens
    assert half.dtype == dtype and half.isfinite().all()
    close(half.float(), full.detach(), 0.06 if dtype == torch.bfloat16 else 0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layer_norm_is_evaluated_in_fp32(dtype: torch.dtype) -> None:
    """On values whose squares overflow fp16, and only one rounding away from the fp32 result."""
    norm = torch.nn.LayerNorm(64, eps=1e-6)
    x = (300 * torch.randn(16, 64, generator=torch.Generator().manual_seed(4)) + 1000).to(dtype)
    assert torch.equal(norm.to(dtype)(x), norm.float()(x.float()).to(dtype))


def test_initialisation_is_maes() -> None:
    torch.manual_seed(0)
    vit: Any = ViT(StudentConfig(width=256, depth=1, heads=4), 64)
    qkv = vit.blocks[0].attn.qkv
    for weight, fan_in, fan_out in ((qkv.weight, 256, 768), (vit.patch_embed.proj.weight, 768, 256)):
        bound = (6 / (fan_in + fan_out)) ** 0.5
        assert 0.99 * bound < weight.abs().max() <= bound
        assert abs(weight.std().item() - bound / 3**0.5) < 0.01 * bound
    assert not qkv.bias.any() and vit.patch_embed.proj.bias.abs().max() <= 768**-0.5
    assert vit.patch_embed.proj.bias.any()
    assert abs(vit.cls_token.std().item() - 0.02) < 0.004
    assert (vit.norm.weight == 1).all() and not vit.norm.bias.any()


def test_positions_are_a_buffer_or_a_parameter() -> None:
    fixed, learned = small(), small(learned_pos=True)
    assert fixed.state_dict().keys() == learned.state_dict().keys()
    names = {n for n, _ in learned.named_parameters()} - {n for n, _ in fixed.named_parameters()}
    assert names == {"pos_embed"}
    assert "norm.weight" not in small(final_norm=False).state_dict()
