"""Whole training runs of the official programs, to be repeated by our engine.

The teacher of the MaskAlign file is not stored as outputs but as weights, so it is computed here, by a few lines that
are themselves checked against stored teacher outputs (test_training_golden.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from mimscale.config.run import RunConfig
from mimscale.convert.formats import mae as mae_names
from mimscale.convert.formats import maskalign as maskalign_names
from mimscale.convert.networks import levels_of
from mimscale.methods.base import Method
from mimscale.types import IMAGENET_MEAN, IMAGENET_STD, Batch, Targets
from tests import golden
from tests.golden import batch_of

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class TrainingGolden:
    """One micro-batch per optimiser step, no accumulation. Names are ours.

    decayed: names with weight decay, undecayed: names without. norms: gradient norms, empty where not stored.
    steps_per_epoch and the run's `schedule` section give the learning rates.
    """

    run: RunConfig
    method: Method
    batches: list[Batch]
    targets: Sequence[Mapping[str, Targets]]
    steps_per_epoch: int
    decayed: set[str]
    undecayed: set[str]
    losses: list[float]
    lrs: list[float]
    start: dict[str, Tensor]
    end: dict[str, Tensor]
    norms: list[float] = field(default_factory=list)

    def check_weights(self, weights: Mapping[str, Tensor]) -> None:
        """The error is small against the move of each tensor, and what did not move is the same to the bit.

        Key biases are left out: softmax does not see them, so their true gradient is zero, and Adam turns the rounding
        noise in its place into full steps. Raises AssertionError. weights: fp32, by our names, buffers may be there.
        """
        assert self.end.keys() <= weights.keys()
        for name, end in self.end.items():
            move, error = (_without_key_bias(name, x) for x in (end - self.start[name], weights[name] - end))
            small = error.norm() < 1e-2 * move.norm() if move.any() else not error.any()
            assert small, f"{name}: an error of {error.norm():.1e} in a move of {move.norm():.1e}"


def _without_key_bias(name: str, tensor: Tensor) -> Tensor:
    return tensor.view(3, -1)[[0, 2]] if name.endswith("qkv.bias") else tensor


def mae() -> TrainingGolden:
    g = golden.load("mae_train_dev")
    c = g.config
    steps = len(g["noise"])
    run = golden.mae_run(
        c,
        optim={"betas": [0.9, 0.95], "weight_decay": 0.05},
        schedule={
            "global_batch": 2,
            "epochs": c["epochs"],
            "warmup_epochs": c["warmup_epochs"],
            "base_lr": c["peak_lr"] * 128,
            "min_lr": c["min_lr"],
        },
    )
    start, end = (mae_names.from_official(g.part(part)).weights for part in ("state0", "state_end"))
    pool = g["images"]
    return TrainingGolden(
        run=run,
        method=golden.mae_method(run, start),
        batches=[batch_of(pool[2 * k % 8 : 2 * k % 8 + 2], mask=g["noise"][k]) for k in range(steps)],
        targets=[{} for _ in range(steps)],
        steps_per_epoch=c["optsteps_per_epoch"],
        decayed=set(mae_names.from_official(dict.fromkeys(c["decay"], torch.empty(0))).weights),
        undecayed=set(mae_names.from_official(dict.fromkeys(c["no_decay"], torch.empty(0))).weights),
        losses=g["loss_per_microstep"].tolist(),
        lrs=g["lr_per_optstep"].tolist(),
        start=start,
        end=end,
        norms=g["gradnorm_per_optstep"].tolist(),
    )


def maskalign() -> TrainingGolden:
    g = golden.load("maskalign_train_dev")
    c = g.config
    run = golden.maskalign_run(
        c,
        optim={"betas": c["betas"], "weight_decay": c["weight_decay"], "eps": c["eps"]},
        schedule={
            "global_batch": 2,
            "epochs": c["total_epochs"],
            "warmup_epochs": c["warmup_epochs"],
            "base_lr": c["peak_lr"] * 128,
            "min_lr": c["min_lr"],
        },
    )
    official = g.part("state0")
    method = golden.maskalign_method(run, c, official)
    levels = levels_of(method)
    batches, targets = [], []
    for step in range(c["steps"]):
        images = g[f"step{step}/images"]
        hidden, attention = clip_teacher(official, c["teacher_heads"], images)
        batches.append(batch_of(images, mask=g[f"step{step}/exponential_noise"]))
        targets.append({"teacher": golden.targets_of(hidden, attention)})

    def ours(names: list[str]) -> set[str]:
        stand_ins = {n: official[n] for n in names}
        return set(maskalign_names.from_official(stand_ins, levels).weights) & {n for n, _ in method.named_parameters()}

    (undecayed, decayed) = (group["params"] for group in c["param_groups"])
    return TrainingGolden(
        run=run,
        method=method,
        batches=batches,
        targets=targets,
        steps_per_epoch=2,
        decayed=ours(decayed),
        undecayed=ours(undecayed),
        losses=g["loss/per_step"].tolist(),
        lrs=g["lr/per_step"].tolist(),
        start=maskalign_names.from_official(official, levels).weights,
        end=maskalign_names.from_official(g.part("state_end"), levels).weights,
    )


def clip_teacher(official: Mapping[str, Tensor], heads: int, images: Tensor) -> tuple[Tensor, Tensor]:
    """A CLIP image encoder from the weights inside an official MaskAlign state.

    images: ImageNet-normalised [B, 3, H, W]. Returns hidden states [1 + depth, B, 1 + L, C], the embeddings first, and
    the last block's CLS attention to the patches, mean over heads [B, L].
    """
    prefix = "clip_model.vision_model."
    w = {name.removeprefix(prefix): tensor for name, tensor in official.items() if name.startswith(prefix)}

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-5)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    mean, std, clip_mean, clip_std = (
        torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD, CLIP_MEAN, CLIP_STD)
    )
    kernel = w["embeddings.patch_embedding.weight"]
    patches = F.conv2d((images * std + mean - clip_mean) / clip_std, kernel, stride=kernel.shape[-1])
    cls = w["embeddings.class_embedding"].expand(len(images), 1, -1)
    x = torch.cat([cls, patches.flatten(2).transpose(1, 2)], dim=1)
    x = norm(x + w["embeddings.position_embedding.weight"], "pre_layrnorm")
    hidden, attention = [x], torch.empty(0)
    for index in range(sum(name.endswith("layer_norm1.weight") for name in w)):
        layer = f"encoder.layers.{index}"
        y = norm(x, f"{layer}.layer_norm1")
        q, k, v = (split(linear(y, f"{layer}.self_attn.{part}_proj")) for part in "qkv")
        attention = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        x = x + linear((attention @ v).transpose(1, 2).flatten(2), f"{layer}.self_attn.out_proj")
        y = linear(norm(x, f"{layer}.layer_norm2"), f"{layer}.mlp.fc1")
        x = x + linear(y * torch.sigmoid(1.702 * y), f"{layer}.mlp.fc2")
        hidden.append(x)
    return torch.stack(hidden), attention[:, :, 0, 1:].mean(1)
