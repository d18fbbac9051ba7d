"""The engine's fast paths: few parameters, one norm, a fused update; the same numbers, fewer operators."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._dynamo.config
from torch import Tensor, nn

from mimscale.bench._operators import count_hooks, count_operators
from mimscale.config.deepspeed import load_ds_config
from mimscale.config.recipes import load_recipe
from mimscale.config.run import method_class
from mimscale.distributed.world import from_environment
from mimscale.engine.config import EngineConfig
from mimscale.engine.factory import make_engine
from mimscale.engine.fast_paths import choose, fitted
from mimscale.engine.flat_parameters import Place, flatten
from mimscale.engine.global_norm import CPU_CHUNK, global_norm
from mimscale.models.vit import Block, ViTOutput, run_blocks
from mimscale.optim.param_groups import parameter_groups
from tests import ranks


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(16, 2) for _ in range(3))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor, every: int = 0, prefix: int | None = None) -> ViTOutput:
        out = run_blocks(self.blocks, x, None, every, attention_prefix=prefix)
        return out._replace(tokens=self.head(out.tokens))


def flat_twin(chain: Chain, layer_decay: float = 1.0) -> tuple[Chain, list[Place], list[dict[str, Any]]]:
    twin = copy.deepcopy(chain)

    def layer_of(name: str) -> int:
        return int(name.split(".")[1]) if name.startswith("blocks.") else 3

    groups = parameter_groups(twin, weight_decay=0.1, layer_decay=layer_decay, layer_of=layer_of)
    return twin, flatten(twin, groups), groups


@pytest.fixture(scope="module")
def chain() -> Chain:
    torch.manual_seed(0)
    return Chain()


@pytest.mark.parametrize("every", [0, 1])
@pytest.mark.parametrize("compiled", [False, True])
@torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True)
def test_flat_parameters_give_the_same_numbers(every: int, compiled: bool, chain: Chain) -> None:
    """Eager and in one graph, with and without recomputing; nothing is left on the modules."""
    twin, places, _ = flat_twin(chain)
    forward: Any = twin
    if compiled:
        torch._dynamo.reset()
        forward = torch.compile(twin, backend="aot_eager", fullgraph=True, dynamic=False)
    x = torch.randn(2, 5, 16)
    chain.zero_grad()
    chain(x, every).tokens.square().sum().backward()
    out = forward(x, every).tokens
    out.square().sum().backward()
    assert torch.equal(out, chain(x, every).tokens)
    theirs = dict(chain.named_parameters())
    assert [place.name for place in places] == list(theirs)
    for place in places:
        gradient = place.holder.grad
        assert gradient is not None and torch.equal(place.read(), theirs[place.name])
        ours = gradient.view(-1)[place.start : place.start + place.numel].view(place.shape)
        torch.testing.assert_close(ours, theirs[place.name].grad, rtol=1e-6, atol=1e-6)
    first: Any = twin.blocks[0]
    assert first.attn.qkv.weight is None
    assert torch.equal(twin(x, prefix=1).attention, chain(x, prefix=1).attention)


def test_one_parameter_per_block_and_group(chain: Chain) -> None:
    twin, places, groups = flat_twin(chain)
    assert len(list(twin.parameters())) == 3 * 2 + 2
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in twin.parameters()}
    assert [len(group["params"]) for group in groups] == [4, 4]
    assert sum(place.numel for place in places) == sum(p.numel() for p in chain.parameters())
    _, _, finer = flat_twin(chain, layer_decay=0.5)
    assert [len(group["params"]) for group in finer] == [1] * 8


def test_a_pass_that_fails_leaves_no_views(chain: Chain) -> None:
    twin, _, _ = flat_twin(chain)
    with pytest.raises(RuntimeError, match="shape"):
        twin(torch.randn(2, 5, 15))
    first: Any = twin.blocks[0]
    assert first.norm1.weight is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_norm_of_long_and_short_gradients(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gradients = [torch.randn(3 * CPU_CHUNK + 7).to(dtype), torch.randn(5).to(dtype)]
    exact = torch.cat(gradients).double().norm()
    assert float(global_norm(gradients)) == pytest.approx(float(exact), rel=1e-5)
    for value in (math.inf, -math.inf, math.nan):
        bad = [gradients[0].clone(), gradients[1]]
        bad[0][-1] = value
        assert float(global_norm(bad)) == math.inf
    assert count_operators(lambda: global_norm(gradients))[1] < 16


def test_what_a_norm_can_hold() -> None:
    """float16's largest number everywhere is finite; float32 gradients whose squares overflow are not."""
    assert float(global_norm([torch.full((1 << 20,), 65504.0, dtype=torch.float16)])) == pytest.approx(65504 * 2**10)
    assert float(global_norm([torch.full((4,), 1e18)])) == pytest.approx(2e18)
    assert float(global_norm([torch.full((4,), 1e20)])) == math.inf


def test_which_path_runs_is_said() -> None:
    assert choose(EngineConfig()).line(396, 76) == (
        "fast paths: flat_parameters (76 instead of 396 parameters), norm_check, fused_update"
    )
    assert choose(EngineConfig(plain=("norm_check",))).line(396, 76) == (
        "fast paths: flat_parameters (76 instead of 396 parameters), fused_update; plain: norm_check (engine.plain)"
    )
    torch_engine = choose(EngineConfig(backend="torch"))
    assert "flat_parameters" not in torch_engine and "fused_update" in torch_engine
    assert choose(EngineConfig(plain="all")).line(9, 9).startswith("fast paths: none; plain: flat_parameters (engine")


def test_zero_3_fetches_whole_blocks() -> None:
    blocks, file = [[100, 30], [400, 50], []], {"stage": 3, "stage3_param_persistence_threshold": 10}
    found = fitted({**file, "stage3_prefetch_bucket_size": 7}, blocks)
    assert found == {"stage": 3, "stage3_prefetch_bucket_size": 450, "stage3_param_persistence_threshold": 51}
    assert fitted(file, blocks)["stage3_prefetch_bucket_size"] == 50_000_000
    assert fitted({"stage": 2, "reduce_bucket_size": 7}, blocks) == {"stage": 2, "reduce_bucket_size": 7}


@pytest.mark.parametrize(("ds_config", "hooks"), [("cpu_zero2_bf16", 30), ("cpu_zero3_bf16", 100)])
def test_hooks_that_remain(ds_config: str, hooks: int, process_group: None) -> None:
    """Of a student of 4 blocks and a decoder of 2: flat parameters and Blocks as one unit leave few."""
    found = {}
    for plain in ("[]", "all"):
        words = ["student.depth=4", "method.decoder_depth=2", f"engine.ds_config={ds_config}", f"engine.plain={plain}"]
        run = load_recipe("mae_tiny", [*words, "engine.device=cpu"])
        method = method_class("mae")(run, {})
        world, file = from_environment("cpu"), load_ds_config(ds_config)
        engine = make_engine(method, run, world, micro_batch=2, accumulation=1, ds_config=file)
        found[plain] = count_hooks(method)
        engine.close()
    assert 0 < found["[]"] < min(hooks, found["all"] / 3), found


@pytest.mark.multi
def test_on_two_ranks(shards: Path, tmp_path: Path) -> None:
    """A bad element on one rank; equal numbers; checkpoints of the plain twin, to the bit."""
    ranks.run(2, "tests.engine.fast_path_cases", ranks.recipe(tmp_path, shards, ema={"decay": 0.9}))
