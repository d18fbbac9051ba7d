"""A plain pre-norm Vision Transformer whose state dict has the names of timm's VisionTransformer.

Differences from timm's, all for masked pre-training: only the visible patches are embedded, the random numbers of drop
path are an argument, block outputs can be returned, and a module uses no parameter of another module (ZeRO-3 gathers
parameters module by module). Parameters may be fp32, bf16 or fp16; LayerNorm and softmax accumulate in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from itertools import pairwise
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mimscale.models.config import StudentConfig
from mimscale.models.patches import patches_at, patchify
from mimscale.models.pos_embed import sincos_2d

LN_EPS = 1e-6


class ViTOutput(NamedTuple):
    """tokens: [B, 1+K, D], class token first. levels: 0-based block index -> output of that block [B, 1+K, D], no norm.

    attention: of the last block if requested: the result of `patch_attention`.
    A NamedTuple, because DeepSpeed finds tensors only in tuples and dicts.
    """

    tokens: Tensor
    levels: dict[int, Tensor]
    attention: Tensor | None = None


class Linear(nn.Linear):
    """nn.Linear with MAE's initialisation: Xavier-uniform weight, zero bias.

    Initialised in the constructor: under zero.Init a later `apply` would find empty tensors.
    """

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class PatchProjection(nn.Conv2d):
    """The patch embedding: a convolution in the state dict, a matrix product in the forward pass.

    The weight is initialised as a matrix [D, 3*p*p] (MAE); the bias keeps PyTorch's default.
    """

    def __init__(self, width: int, patch: int) -> None:
        super().__init__(3, width, kernel_size=patch, stride=patch)
        nn.init.xavier_uniform_(self.weight.view(width, -1))

    def forward(self, patches_BKCpp: Tensor) -> Tensor:
        """Patches [B, K, 3, p, p] of any float type -> [B, K, D] in the weight's dtype."""
        return F.linear(patches_BKCpp.flatten(2).to(self.weight.dtype), self.weight.flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """Holds the projection under timm's name `patch_embed.proj`. projection: its class, which initialises it."""

    def __init__(self, width: int, patch: int, projection: type[PatchProjection] = PatchProjection) -> None:
        super().__init__()
        self.proj = projection(width, patch)

    def forward(self, patches_BKCpp: Tensor) -> Tensor:
        return self.proj(patches_BKCpp)


class Attention(nn.Module):
    """Multi-head self-attention [B, T, D] -> [B, T, D]; scale head_dim^-0.5, biases on."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x_BTD: Tensor, prefix: int | None = None, first: int = 0) -> Tensor:
        """prefix: if given, return `patch_attention` instead of the output. first: only the tokens from this one on
        ask: [B, T - first, D]; keys and values are of all.
        """
        batch, tokens, width = x_BTD.shape
        q, k, v = split_heads(self.qkv(x_BTD.flatten(0, 1)).view(batch, tokens, 3, self.heads, -1), first)
        if prefix is not None:
            return patch_attention(q, k, prefix)
        out_BHTd = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out_BHTd.transpose(1, 2).reshape(-1, width)).view(batch, -1, width)


def split_heads(qkv_BT3Hd: Tensor, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The output of `qkv` [B, T, 3, H, d] -> queries of the tokens from `first` on, keys and values of all, [B, H, T,
    d] each, all views.

    The heads are moved after the three are parted: so their gradients lie in memory as [B, T, H, d] and one copy brings
    them together, where moving the heads first takes two.
    """
    q, k, v = qkv_BT3Hd.unbind(2)
    return last_tokens(q, first).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def last_tokens(x_BTX: Tensor, first: int) -> Tensor:
    """The tokens from `first` on, a view. By a split, whose backward pass writes the gradient once; a slice's twice."""
    return x_BTX.split((first, x_BTX.shape[1] - first), dim=1)[1] if first else x_BTX


def patch_attention(q_BHTd: Tensor, k_BHTd: Tensor, prefix: int, bias_BHTT: Tensor | None = None) -> Tensor:
    """Attention that each patch receives, per head: float32 [B, H, L]. Softmax over all keys; only patches are
    returned.

    prefix: number of tokens before the patch tokens. 1: the attention of the class token. 0: the mean over the patches'
    attention, our choice for networks without a class token. bias: added to the scaled scores.
    """
    queries = q_BHTd[:, :, :1] if prefix else q_BHTd
    scores = queries.float() @ k_BHTd.float().transpose(2, 3) * q_BHTd.shape[-1] ** -0.5
    if bias_BHTT is not None:
        scores = scores + bias_BHTT[:, :, : queries.shape[2]].float()
    return scores.softmax(dim=-1).mean(dim=2)[:, :, prefix:]


class Mlp(nn.Module):
    """[..., D] -> [..., D] through `hidden` channels and exact (erf) GELU. fc1, fc2: classes of the two layers."""

    def __init__(
        self,
        width: int,
        hidden: int,
        fc1: Callable[[int, int], nn.Module] = Linear,
        fc2: Callable[[int, int], nn.Module] = Linear,
    ) -> None:
        super().__init__()
        self.fc1 = fc1(width, hidden)
        self.fc2 = fc2(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """The layers get a matrix: of more dimensions each would flatten and restore them itself, twice as often."""
        return self.fc2(F.gelu(self.fc1(x.flatten(0, -2)))).view(x.shape)


class Residual(nn.Module):
    """Base of all Blocks, which a network repeats. Sets no parameter.

    A Block is entered by a call only, and nothing outside uses its parameters or parts: an engine may hold its
    parameters as few flat tensors, and then they exist during `forward` only (`mimscale.engine.flat_parameters`).
    fused: drop path and the sum are one kernel, rounded once; else one after the other.
    """

    fused = True

    def add_branch(self, x_BX: Tensor, branch_BX: Tensor, scales_B2: Tensor | None, which: int) -> Tensor:
        """x + factor of the sample * branch. scales: a block's `drop_path_scales`, None: nothing is dropped. which: 0 =
        attention branch, 1 = MLP branch.
        """
        if scales_B2 is None:
            return x_BX + branch_BX
        factor = scales_B2[:, which].to(branch_BX.dtype).view(-1, *(1,) * (branch_BX.dim() - 1))
        return torch.addcmul(x_BX, branch_BX, factor) if self.fused else x_BX + branch_BX * factor


def set_fused_residuals(module: nn.Module, fused: bool) -> None:
    """Set `fused` of every Block in `module`."""
    for part in module.modules():
        if isinstance(part, Residual):
            part.fused = fused


class Block(Residual):
    """x + attn(norm1(x)), then x + mlp(norm2(x)), with drop path per sample on each branch."""

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=LN_EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=LN_EPS)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(
        self, x_BTD: Tensor, scales_B2: Tensor | None = None, *, first: int = 0, prefix: int | None = None
    ) -> Tensor:
        """first: compute only the tokens from this one on, [B, T - first, D]; they attend to all. prefix: if given,
        return the `patch_attention` instead.
        """
        if prefix is not None:
            return self.attn(self.norm1(x_BTD), prefix=prefix)
        attended = self.attn(self.norm1(x_BTD), first=first)
        x_BTD = self.add_branch(last_tokens(x_BTD, first), attended, scales_B2, 0)
        return self.add_branch(x_BTD, self.mlp(self.norm2(x_BTD)), scales_B2, 1)


def drop_path_scales(noise_BN2: Tensor, rate: float) -> Tensor:
    """Uniform noise [B, depth, 2] -> float32 factors [B, depth, 2] of the two branches of each block: 0 or 1 / keep.

    The rate rises linearly from 0 in the first block to `rate` in the last (Huang et al. 2016).
    """
    depth = noise_BN2.shape[1]
    keep = 1 - rate * torch.arange(depth, device=noise_BN2.device, dtype=torch.float32) / max(depth - 1, 1)
    return torch.floor(noise_BN2.float() + keep[:, None]) / keep[:, None]


class Segment(NamedTuple):
    """Some consecutive blocks and what they get. recompute: which in the backward pass. keep: whose outputs are wanted.
    extra: further arguments of every block, last: of the last.
    """

    blocks: tuple[nn.Module, ...]
    x_BTD: Tensor
    scales_BN2: Tensor | None
    extra: tuple[Any, ...]
    recompute: tuple[bool, ...]
    keep: tuple[bool, ...]
    last: Mapping[str, Any]


def run_segment(segment: Segment) -> tuple[Tensor, list[Tensor]]:
    """(output of the last block, outputs of those to `keep`).

    All that varies between segments is an argument, so that equal segments share one compiled graph.
    """
    blocks, x_BTD, scales_BN2, extra, recompute, keep, last = segment
    kept = []
    for index, block in enumerate(blocks):
        scales = None if scales_BN2 is None else scales_BN2[:, index]
        only = last if index == len(blocks) - 1 else {}
        if recompute[index]:
            x_BTD = checkpoint(block, x_BTD, scales, *extra, use_reentrant=False, preserve_rng_state=False, **only)
        else:
            x_BTD = block(x_BTD, scales, *extra, **only)
        if keep[index]:
            kept.append(x_BTD)
    return x_BTD, kept


class SegmentRunner(NamedTuple):
    """How an engine wants blocks to be run: `length` at a time, by `run`, which computes what `run_segment` does.

    An engine sets it as the attribute `runner` of each block.
    """

    length: int
    run: Callable[[Segment], tuple[Tensor, list[Tensor]]]


PLAIN = SegmentRunner(1000, run_segment)


def run_blocks(
    blocks: nn.ModuleList,
    x_BTD: Tensor,
    scales_BN2: Tensor | None,
    recompute_every: int,
    levels: Collection[int] = (),
    extra: tuple[Any, ...] = (),
    attention_prefix: int | None = None,
    last: Mapping[str, Any] = MappingProxyType({}),
) -> ViTOutput:
    """Run all blocks. Each k-th block, k = `recompute_every`, is recomputed in the backward pass (0: none is).

    extra: further arguments of every block. attention_prefix: the number of tokens before the patch tokens; if given,
    the attention of the last block is returned as well. last: further arguments of the last block: which tokens it
    computes.
    """
    chain: list[Any] = list(blocks)  # to mypy the items of a ModuleList are plain Modules
    runner: SegmentRunner = PLAIN
    starts = list(range(0, len(chain), PLAIN.length))
    if attention_prefix is not None:
        starts = sorted({0, len(chain) - 1})  # the last on its own
    elif chain:
        runner = getattr(chain[0], "runner", PLAIN)
        starts = list(range(0, len(chain), runner.length))
    recomputes = bool(recompute_every) and torch.is_grad_enabled()
    kept: dict[int, Tensor] = {}
    attention = None
    for start, stop in pairwise([*starts, len(chain)]):
        if attention_prefix is not None and stop == len(chain):
            attention = chain[-1](x_BTD, None, *extra, prefix=attention_prefix)
        which = range(start, stop)
        segment = Segment(
            tuple(chain[start:stop]),
            x_BTD,
            None if scales_BN2 is None else scales_BN2[:, start:stop],
            extra,
            tuple(recomputes and index % recompute_every == 0 for index in which),
            tuple(index in levels for index in which),
            dict(last) if stop == len(chain) else {},
        )
        x_BTD, outputs = runner.run(segment)
        kept |= zip((index for index in which if index in levels), outputs, strict=True)
    return ViTOutput(x_BTD, kept, attention)


class Encoder(nn.Module):
    """Base of the encoders that a method trains as its `student`: ViT, Beit and ConvViT. Sets no parameter."""

    config: StudentConfig
    grid: tuple[int, int]

    @property
    def patches(self) -> int:
        """Number of patches L."""
        return self.grid[0] * self.grid[1]

    @property
    def depth(self) -> int:
        """Number of blocks with drop path."""
        return self.config.depth

    @property
    def prefix(self) -> int:
        """Number of tokens before the patch tokens: 1 with a class token."""
        return 1


class ViT(Encoder):
    """final_norm: end with a LayerNorm. learned_pos: position embeddings are a parameter, else a fixed buffer.

    recompute_every: recompute every k-th block in the backward pass (activation checkpointing), 0 = none.
    """

    pos_embed: Tensor

    def __init__(
        self,
        config: StudentConfig,
        image_size: int,
        *,
        final_norm: bool = True,
        learned_pos: bool = False,
        recompute_every: int = 0,
    ) -> None:
        super().__init__()
        side = image_size // config.patch
        self.config = config
        self.grid = (side, side)
        self.recompute_every = recompute_every
        self.patch_embed = PatchEmbed(config.width, config.patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        nn.init.normal_(self.cls_token, std=0.02)
        table = sincos_2d(config.width, self.grid)
        if learned_pos:
            self.pos_embed = nn.Parameter(table)
        else:
            self.register_buffer("pos_embed", table)
        self.blocks = nn.ModuleList(Block(config.width, config.heads, config.mlp_ratio) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=LN_EPS) if final_norm else nn.Identity()

    def untrained(self) -> ViT:
        """A newly initialised network of the same shape, with a final norm."""
        return ViT(self.config, self.grid[0] * self.config.patch)

    def forward(
        self,
        images_B3HW: Tensor,
        ids_keep: Tensor | None = None,
        drop_noise: Tensor | None = None,
        levels: Collection[int] = (),
        apply_norm: bool = True,
        attention: bool = False,
    ) -> ViTOutput:
        """images: normalised, any float type. ids_keep: int64 [B, K], the visible patches, in the order of the tokens;
        None: all, in raster order. drop_noise: uniform [B, depth, 2]; None: nothing is dropped. levels: blocks whose
        output is returned. attention: return the attention of the last block.

        Returns tokens [B, 1+K, D] in the parameters' dtype. apply_norm: false skips the final norm, for a method that
        applies `norm` to something else.
        """
        positions_LD = self.pos_embed[0, 1:]
        if ids_keep is None:
            tokens = self.patch_embed(patchify(images_B3HW, self.config.patch))
            positions = positions_LD[None]
        else:
            tokens = self.patch_embed(patches_at(images_B3HW, self.config.patch, ids_keep))
            positions = positions_LD[ids_keep]
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(tokens), -1, -1)
        x_BTD = torch.cat([cls.to(tokens.dtype), (tokens + positions).to(tokens.dtype)], dim=1)
        scales = None if drop_noise is None else drop_path_scales(drop_noise, self.config.drop_path)
        prefix = self.prefix if attention else None
        out = run_blocks(self.blocks, x_BTD, scales, self.recompute_every, levels, (), prefix)
        return out._replace(tokens=self.norm(out.tokens) if apply_norm else out.tokens)
