"""BEiT's network and its relative positions against timm's."""

from __future__ import annotations

import pytest
import torch
from timm.models.beit import Beit as TimmBeit
from timm.models.beit import gen_relative_position_index
from torch import nn

from mimscale.models.beit import Beit, Block, Positions
from mimscale.models.config import StudentConfig
from mimscale.models.rel_pos_bias import RelativePositionBias, index_among, relative_index, table_rows

CPU = torch.device("cpu")


def moved(module: nn.Module) -> nn.Module:
    """With weights at which no bias is zero and no scale is one."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return module.eval()


@pytest.mark.parametrize("positions", ["relative", "per_block", "absolute"])
@pytest.mark.parametrize("layer_scale", [None, 0.1])
def test_equal_to_timm(positions: Positions, layer_scale: float | None) -> None:
    config = StudentConfig(width=32, depth=3, heads=4, patch=8)
    ours = moved(Beit(config, 40, positions=positions, layer_scale=layer_scale))
    theirs = TimmBeit(
        img_size=40,
        patch_size=8,
        embed_dim=32,
        depth=3,
        num_heads=4,
        num_classes=0,
        init_values=layer_scale,
        use_abs_pos_emb=positions == "absolute",
        use_rel_pos_bias=positions == "per_block",
        use_shared_rel_pos_bias=positions == "relative",
        global_pool="token",
    ).eval()
    older = {n for n in theirs.state_dict() if n.endswith("relative_position_index")}  # of timm before it was left out
    assert ours.state_dict().keys() == theirs.state_dict().keys() - older
    theirs.load_state_dict(ours.state_dict(), strict=False)
    images = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours(images).tokens, theirs.forward_features(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (5, 2), (4, 4)])
def test_index_is_timms(grid: tuple[int, int]) -> None:
    ours = relative_index(grid, CPU)
    assert torch.equal(ours, gen_relative_position_index(grid))
    assert int(ours.max()) + 1 == table_rows(grid)


def test_drop_path_scales_each_branch() -> None:
    block = moved(Block(16, 2, 4.0, layer=1, layer_scale=0.1))
    assert isinstance(block, Block) and block.gamma_1 is not None and block.gamma_2 is not None
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(2))
    out = block(x, torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]]))
    assert torch.equal(out[0], x[0])
    torch.testing.assert_close(out[1], x[1] + 2 * block.gamma_1 * block.attn(block.norm1(x[1:2]))[0])
    torch.testing.assert_close(out[2], x[2] + 2 * block.gamma_2 * block.mlp(block.norm2(x[2:3]))[0])


def test_bias_of_a_16_bit_table_is_fp32() -> None:
    assert RelativePositionBias((2, 2), heads=2).bfloat16()(index_among((2, 2), CPU)).dtype == torch.float32


def test_bias_depends_on_the_offset_only() -> None:
    module = moved(RelativePositionBias((3, 4), heads=2))
    bias = module(index_among((3, 4), CPU))[0, :, 1:, 1:]
    assert torch.equal(bias[:, 0, 5], bias[:, 6, 11])  # one row down, one column right
    assert not torch.equal(bias[:, 0, 5], bias[:, 5, 0])


def test_bias_of_the_patches_that_are_there() -> None:
    module = moved(RelativePositionBias((3, 3), heads=2))
    ids = torch.tensor([[4, 0], [8, 2]])
    kept, whole = module(index_among((3, 3), CPU, ids)), module(index_among((3, 3), CPU))
    for sample in range(2):
        rows = torch.cat([torch.zeros(1, dtype=torch.long), ids[sample] + 1])
        assert torch.equal(kept[sample], whole[0][:, rows][:, :, rows])


def test_a_copy_of_the_shared_table_in_each_block_is_the_same_network() -> None:
    config = StudentConfig(width=32, depth=3, heads=4, patch=8)
    shared, own = moved(Beit(config, 40)), Beit(config, 40, positions="per_block")
    table = shared.state_dict()["rel_pos_bias.relative_position_bias_table"]
    state = {name: shared.state_dict().get(name, table) for name in own.state_dict()}
    own.load_state_dict(state)
    images = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[3, 1, 24], [0, 7, 8]])
    for ids_keep in (None, ids):
        theirs, ours = (net(images, ids_keep=ids_keep, levels=(0, 2), attention=True) for net in (shared, own))
        assert torch.equal(ours.tokens, theirs.tokens) and torch.equal(ours.attention, theirs.attention)


def test_without_a_mask_token_a_mask_is_refused() -> None:
    student = Beit(StudentConfig(width=8, depth=1, heads=2, patch=8), 16)
    assert "mask_token" not in student.state_dict()
    with pytest.raises(AssertionError, match="without a mask token"):
        student(torch.zeros(1, 3, 16, 16), torch.ones(1, 4))
