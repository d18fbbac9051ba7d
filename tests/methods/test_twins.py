"""Each method against a second one that is written from the papers' formulas, sample by sample, in float64.

The goldens fix a few shapes; here patch, grid, ratio, widths and every option vary. Loss and every gradient must agree.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mimscale.config.run import method_class
from mimscale.methods.base import MaskedMethod
from mimscale.types import IMAGENET_MEAN, IMAGENET_STD, Targets, TeacherInfo
from tests.golden import GRADIENT, batch_of, run_config

Weights = dict[str, Tensor]
LOSS = 2e-6  # relative, float32 against float64
BATCH = 2
WHITEN_EPS, LN_EPS = 1e-5, 1e-6


def built(section: dict[str, Any], student: dict[str, Any], side: int, info: TeacherInfo | None = None) -> MaskedMethod:
    """A method at weights where no bias is zero, no gain one and no table flat."""
    torch.manual_seed(11)
    teachers = {} if info is None else {info.name: info}
    method = method_class(section["name"])(run_config(section, student, side), teachers)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return method


def doubles(method: MaskedMethod) -> Weights:
    """Float64 copies; those of parameters collect gradients."""
    trained = {name for name, _ in method.named_parameters()}
    state = method.state_dict()
    return {name: t.detach().double().requires_grad_(name in trained) for name, t in state.items()}


def agree(method: MaskedMethod, weights: Weights, ours: Tensor, theirs: Tensor) -> None:
    assert float(ours) == pytest.approx(float(theirs), rel=LOSS)
    ours.backward()
    theirs.backward()
    for name, parameter in method.named_parameters():
        expected = weights[name].grad
        assert parameter.grad is not None and expected is not None and expected.abs().max() > 0, name
        limit = GRADIENT * float(expected.abs().max())
        torch.testing.assert_close(parameter.grad.double(), expected, atol=limit, rtol=0, msg=lambda m: f"{name}: {m}")  # noqa: B023


# ------------------------------------------------------------------------------------------------ the formulas


def norm(w: Weights, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + LN_EPS).sqrt()
    return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].flatten(1).T + w[f"{name}.bias"]


def block(w: Weights, name: str, x: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """x: [T, D]. bias: [heads, T, T]."""
    y, width = norm(w, f"{name}.norm1", x), x.shape[1]
    if f"{name}.attn.q_bias" in w:
        shift = torch.cat([w[f"{name}.attn.q_bias"], torch.zeros(width), w[f"{name}.attn.v_bias"]])
    else:
        shift = w[f"{name}.attn.qkv.bias"]
    q, k, v = (y @ w[f"{name}.attn.qkv.weight"].T + shift).split(width, dim=1)
    mixed = []
    for head in range(heads):
        part = slice(head * width // heads, (head + 1) * width // heads)
        scores = q[:, part] @ k[:, part].T / math.sqrt(width // heads)
        scores = scores if bias is None else scores + bias[head]
        share = (scores - scores.max()).exp()
        mixed.append(share / share.sum(1, keepdim=True) @ v[:, part])
    x = x + w.get(f"{name}.gamma_1", 1) * linear(w, f"{name}.attn.proj", torch.cat(mixed, dim=1))
    hidden = linear(w, f"{name}.mlp.fc1", norm(w, f"{name}.norm2", x))
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return x + w.get(f"{name}.gamma_2", 1) * linear(w, f"{name}.mlp.fc2", hidden)


def patch_of(image: Tensor, place: int, patch: int) -> Tensor:
    """[3, p, p]."""
    row, column = divmod(place, image.shape[2] // patch)
    return image[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]


def levels_of(w: Weights, image: Tensor, visible: list[int], depth: int, heads: int, patch: int) -> list[Tensor]:
    """Raw outputs of a plain ViT's blocks for one image, [1+K, D] each."""
    positions = w["student.pos_embed"][0]
    tokens = [w["student.cls_token"][0, 0] + positions[0]]
    for place in visible:
        pixels = patch_of(image, place, patch).flatten()
        tokens.append(linear(w, "student.patch_embed.proj", pixels) + positions[1 + place])
    x, outputs = torch.stack(tokens), []
    for index in range(depth):
        x = block(w, f"student.blocks.{index}", x, heads)
        outputs.append(x)
    return outputs


def low_pass(image: Tensor, radius: float) -> Tensor:
    """By numpy, with the shifts of the release."""
    mean, std = (np.array(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    side = image.shape[1]
    i, j = np.mgrid[:side, :side] - (side - 1) / 2
    spectrum = np.fft.fftshift(np.fft.fft2(image.double().numpy() * std + mean), axes=(1, 2))
    return torch.from_numpy((np.abs(np.fft.ifft2(spectrum * (i**2 + j**2 <= radius**2))) - mean) / std)


# ------------------------------------------------------------------------------------------------ the methods

PIXELS = [  # patch, grid, ratio, normalised, student's and decoder's MLP ratio, fused levels, radius of the filter
    (16, 3, 0.75, True, 4.0, 4.0, (), None),
    (8, 5, 0.5, False, 2.0, 2.0, (), None),
    (7, 3, 0.8, True, 3.0, 4.0, (0, 2), None),
    (14, 2, 0.3, False, 4.0, 1.5, (2,), 5.5),
    (5, 7, 0.61, True, 4.0, 4.0, (0, 1, 2), 9.0),
]


@pytest.mark.parametrize(("patch", "grid", "ratio", "normalised", "mlp", "decoder_mlp", "fused", "radius"), PIXELS)
def test_mae_mff_and_pixmim(
    patch: int,
    grid: int,
    ratio: float,
    normalised: bool,
    mlp: float,
    decoder_mlp: float,
    fused: tuple[int, ...],
    radius: float | None,
) -> None:
    section = {
        "name": "mae",
        "masking": {"policy": "random", "ratio": ratio},
        "norm_pix_loss": normalised,
        "low_pass_radius": radius,
        "fusion": {"kind": "mff" if fused else "none", "levels": list(fused)},
        "decoder_width": 24,
        "decoder_depth": 2,
        "decoder_heads": 3,
        "decoder_mlp_ratio": decoder_mlp,
    }
    side, patches = patch * grid, grid * grid
    method = built(section, {"width": 20, "depth": 3, "heads": 5, "patch": patch, "mlp_ratio": mlp}, side)
    generator = torch.Generator().manual_seed(12)
    images = torch.randn(BATCH, 3, side, side, generator=generator)
    noise = torch.rand(BATCH, patches, generator=generator)
    w, total, count = doubles(method), torch.zeros((), dtype=torch.float64), 0
    for image, numbers in zip(images.double(), noise, strict=True):
        order = sorted(range(patches), key=lambda place: float(numbers[place]))
        keep = int(patches * (1 - ratio))
        visible, masked = order[:keep], order[keep:]
        outputs = levels_of(w, image, visible, 3, 5, patch)
        x = outputs[-1]
        if len(fused) > 1:
            share = w["fusion.logits"].flatten().softmax(0)
            x = share[-1] * outputs[fused[-1]]
            for place, level in enumerate(fused[:-1]):
                x = x + share[place] * linear(w, f"fusion.projections.{place}", outputs[level])
        latent = linear(w, "decoder.embed", norm(w, "student.norm", x))
        at = {place: latent[1 + n] for n, place in enumerate(visible)}
        tokens = [latent[0]] + [at.get(place, w["decoder.mask_token"][0, 0]) for place in range(patches)]
        y = torch.stack(tokens) + w["decoder.pos_embed"][0]
        for index in range(2):
            y = block(w, f"decoder.blocks.{index}", y, 3)
        pred = linear(w, "decoder.pred", norm(w, "decoder.norm", y))[1:]
        seen = image if radius is None else low_pass(image, radius)
        for place in masked:
            target = patch_of(seen, place, patch).permute(1, 2, 0).flatten()
            if normalised:
                target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
            total, count = total + (pred[place] - target).square().mean(), count + 1
    agree(method, w, method(batch_of(images, mask=noise), {})["loss"], total / count)


SIMMIM = [  # patch, grid, patches per side of a unit, ratio, positions, layer scale
    (16, 4, 2, 0.6, "relative", 0.1),
    (8, 6, 3, 0.3, "relative", None),
    (4, 6, 1, 0.55, "per_block", 0.3),
    (7, 4, 2, 0.5, "absolute", 0.2),
]


@pytest.mark.parametrize(("patch", "grid", "factor", "ratio", "positions", "scale"), SIMMIM)
def test_simmim(patch: int, grid: int, factor: int, ratio: float, positions: str, scale: float | None) -> None:
    masking = {"policy": "random", "ratio": ratio, "unit": factor * patch}
    section = {"name": "simmim", "masking": masking, "positions": positions, "layer_scale": scale}
    side, units = patch * grid, (grid // factor) ** 2
    method = built(section, {"width": 12, "depth": 2, "heads": 3, "patch": patch, "mlp_ratio": 2.5}, side)
    generator = torch.Generator().manual_seed(13)
    images = torch.randn(BATCH, 3, side, side, generator=generator)
    noise = torch.rand(BATCH, units, generator=generator)
    w, total, hidden_patches = doubles(method), torch.zeros((), dtype=torch.float64), 0

    def bias_of(table: Tensor) -> Tensor:
        rows = len(table)
        bias = []
        for a, b in product(range(1 + grid * grid), repeat=2):
            if a and b:
                down, right = (p - q + grid - 1 for p, q in zip(divmod(a - 1, grid), divmod(b - 1, grid), strict=True))
                row = down * (2 * grid - 1) + right
            else:
                row = rows - 1 if a == b else rows - 3 if a == 0 else rows - 2
            bias.append(table[row])
        return torch.stack(bias, dim=1).unflatten(1, (1 + grid * grid, -1))

    for image, numbers in zip(images.double(), noise, strict=True):
        masked_units = sorted(range(units), key=lambda unit: float(numbers[unit]))[: math.ceil(units * ratio)]
        hidden = [
            (row // factor) * (grid // factor) + column // factor in masked_units
            for row, column in product(range(grid), repeat=2)
        ]
        tokens = [w["student.cls_token"][0, 0]]
        for place, gone in enumerate(hidden):
            seen = linear(w, "student.patch_embed.proj", patch_of(image, place, patch).flatten())
            tokens.append(w["student.mask_token"][0, 0] if gone else seen)
        x = torch.stack(tokens)
        if positions == "absolute":
            x = x + w["student.pos_embed"][0]
        for index in range(2):
            name = {"relative": "rel_pos_bias", "per_block": f"blocks.{index}.attn"}.get(positions)
            bias = None if name is None else bias_of(w[f"student.{name}.relative_position_bias_table"])
            x = block(w, f"student.blocks.{index}", x, 3, bias)
        pred = linear(w, "head", norm(w, "student.norm", x)[1:])
        for place in (place for place, gone in enumerate(hidden) if gone):
            total = total + (pred[place] - patch_of(image, place, patch).flatten()).abs().sum()
            hidden_patches += 1
    loss = total / (hidden_patches * patch**2 + 1e-5) / 3
    agree(method, w, method(batch_of(images, mask=noise), {})["loss"], loss)


MASKALIGN = [  # patch, grid, ratio, fusion, adaptor, position, norm, loss, levels, student's and teacher's depth
    (16, 4, 0.7, "linear", "linear", "after", "whiten", "smoothl1", "top2", 3, 3),
    (8, 5, 0.5, "sum", "mlp", "after", "l2", "l2", "linear_decay", 2, 5),
    (7, 3, 0.35, "sum", "mlp_norm", "before", "none", "l1", "mean", 4, 2),
    (14, 3, 0.66, "simple", "norm_linear", "after", "whiten", "cosine", "out", 3, 3),
    (4, 6, 0.8, "linear", "norm_linear", "before", "none", "smoothl1", [0, 2], 3, 3),
]


@pytest.mark.parametrize(
    ("patch", "grid", "ratio", "fusion", "adaptor", "position", "kind", "loss", "levels", "depth", "teacher_depth"),
    MASKALIGN,
)
def test_maskalign(
    patch: int,
    grid: int,
    ratio: float,
    fusion: str,
    adaptor: str,
    position: str,
    kind: str,
    loss: str,
    levels: Any,
    depth: int,
    teacher_depth: int,
) -> None:
    section = {
        "name": "maskalign",
        "masking": {"policy": "attention", "ratio": ratio},
        "fusion": fusion,
        "adaptor": adaptor,
        "adaptor_position": position,
        "target_norm": kind,
        "loss": loss,
        "levels": levels,
    }
    side, patches, width = patch * grid, grid * grid, 16
    info = TeacherInfo("t", dim=10, depth=teacher_depth, grid=(grid, grid), image_size=side, has_cls=True)
    student = {"width": width, "depth": depth, "heads": 4, "patch": patch, "mlp_ratio": 3.0}
    method = built(section, student, side, info)
    generator = torch.Generator().manual_seed(14)
    images = torch.randn(BATCH, 3, side, side, generator=generator)
    noise = -torch.rand(BATCH, patches, generator=generator).log()
    attention = torch.rand(BATCH, patches, generator=generator)
    features = [torch.randn(BATCH, 1 + patches, 10, generator=generator) * 2 for _ in range(teacher_depth)]
    n, last = teacher_depth, teacher_depth - 1
    shares = {
        "top2": {n - 2: 0.5, last: 0.5},
        "mean": dict.fromkeys(range(n), 1 / n),
        "out": {last: 1.0},
        "linear_decay": {level: level / (n * last / 2) for level in range(1, n)},
    }.get(str(levels), dict.fromkeys(levels, 1 / len(levels)))

    w, total = doubles(method), torch.zeros((), dtype=torch.float64)

    def adapt(name: str, x: Tensor) -> Tensor:
        name = f"alignment.t.adaptors.{name}"
        if adaptor == "linear":
            return linear(w, name, x)
        if adaptor == "norm_linear":
            return linear(w, f"{name}.1", norm(w, f"{name}.0", x))
        hidden = linear(w, f"{name}.0", x)
        if adaptor == "mlp":
            return linear(w, f"{name}.2", hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))))
        return linear(w, f"{name}.2", norm(w, f"{name}.1", hidden))

    for b in range(BATCH):
        score = (attention[b] / noise[b]).tolist()
        visible = sorted(range(patches), key=lambda place: -score[place])[: int(patches * (1 - ratio))]
        outputs = levels_of(w, images[b].double(), visible, depth, 4, patch)
        for row, (level, share) in enumerate(shares.items()):
            if fusion == "simple":
                pred = adapt(str(level), outputs[level])
            else:
                mixing = w["alignment.t.mixing"][row]
                if position == "before":
                    outs = [adapt(str(i), x) for i, x in enumerate(outputs)]
                    pred = torch.stack([weight * x for weight, x in zip(mixing, outs, strict=True)]).sum(0)
                else:
                    mixed = torch.stack([weight * x for weight, x in zip(mixing, outputs, strict=True)]).sum(0)
                    pred = adapt(str(level), mixed)
            target = features[level][b].double()[[0, *(1 + place for place in visible)]]
            if kind == "whiten":
                target = target - target.mean(1, keepdim=True)
                target = target / (target.square().mean(1, keepdim=True) + WHITEN_EPS).sqrt()
            elif kind == "l2":
                target = target / target.square().sum(1, keepdim=True).sqrt()
            difference = (pred - target).abs()
            if loss == "cosine":
                lengths = pred.square().sum(1).sqrt() * target.square().sum(1).sqrt()
                value = (1 - (pred * target).sum(1) / lengths).mean()
            elif loss == "smoothl1":
                value = torch.where(difference < 1, difference.square(), 2 * difference - 1).mean()
            else:
                value = (difference if loss == "l1" else difference.square()).mean()
            total = total + share * value / BATCH
    cls = {level: x[:, 0] for level, x in enumerate(features)}
    seen = Targets({level: x[:, 1:] for level, x in enumerate(features)}, cls, attention)
    agree(method, w, method(batch_of(images, mask=noise), {"t": seen})["loss"], total)
