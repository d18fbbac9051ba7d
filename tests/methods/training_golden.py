"""Whole training runs of the official programs, to be repeated by our engine.

The teacher of the MaskAlign file is not stored as outputs but as weights, so it is computed here, by a few lines that
are themselves checked against stored teacher outputs (test_training_golden.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mimscale.config.run import RunConfig, method_class
from mimscale.convert.formats import convmae as convmae_names
from mimscale.convert.formats import finetune as finetune_names
from mimscale.convert.formats import mae as mae_names
from mimscale.convert.formats import maskalign as maskalign_names
from mimscale.convert.formats import openmmlab as openmmlab_names
from mimscale.convert.formats import simmim as simmim_names
from mimscale.convert.names import Mapped
from mimscale.convert.networks import levels_of
from mimscale.masking._amt_importance import importance_from_attention
from mimscale.masking.amt import AMT, UNKNOWN
from mimscale.methods.base import Method
from mimscale.methods.mae import MAE
from mimscale.models import pos_embed
from mimscale.types import IMAGENET_MEAN, IMAGENET_STD, Batch, Targets
from tests import golden
from tests.golden import Golden, batch_of
from tests.methods.test_convmae import sections

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MOVE = 1e-4  # largest error of a tensor, of the norm of its move


@dataclass(frozen=True)
class TrainingGolden:
    """Names are ours.

    decayed: names with weight decay, undecayed: names without. scales: learning-rate factor of each name, empty: 1.
    losses: per micro-batch. lrs, norms: per optimiser step; norms of gradients before clipping, empty where not stored.
    steps_per_epoch, first_step and the run's `schedule` section give the learning rates. accumulation: micro-batches
    per optimiser step. before_step: called before each optimiser step with its index from 0.
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
    scales: dict[str, float] = field(default_factory=dict)
    first_step: int = 0
    accumulation: int = 1
    before_step: Callable[[int], None] = lambda step: None

    def check_weights(self, weights: Mapping[str, Tensor]) -> None:
        """The error is small against the move of each tensor, and what did not move is the same to the bit.

        Key biases are left out: softmax does not see them, so their true gradient is zero, and Adam turns the rounding
        noise in its place into full steps. Raises AssertionError. weights: fp32, by our names, buffers may be there.
        """
        assert self.end.keys() <= weights.keys()
        wrong, largest = [], 0.0
        for name, end in self.end.items():
            move, error = (_without_key_bias(name, x) for x in (end - self.start[name], weights[name] - end))
            small = error.norm() < MOVE * move.norm() if move.any() else not error.any()
            largest = max(largest, float(error.norm() / move.norm())) if move.any() else largest
            if not small:
                wrong.append(f"{name}: an error of {error.norm():.1e} in a move of {move.norm():.1e}")
        assert not wrong, "; ".join(wrong)
        golden.report("move", largest, MOVE)


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


def _official_run(
    g: Golden,
    run: RunConfig,
    method: Method,
    batches: Sequence[Batch],
    from_official: Callable[[Mapping[str, Tensor]], Mapped],
    **more: Any,
) -> TrainingGolden:
    """The fields that all files of one format share. The method gets the weights of the start."""
    c = g.config
    start, end = (dict(from_official(g.part(part)).weights) for part in ("state0", "state_end"))
    end = {name: end.get(name, tensor) for name, tensor in start.items()}
    method.load_state_dict(start)

    def ours(names: Sequence[str]) -> set[str]:
        return set(from_official({name: g[f"state0/{name}"] for name in names}).weights)

    groups = c.get("param_groups") or [
        {"params": c["decay"], "weight_decay": 1, "lr_scale": 1.0},
        {"params": c["no_decay"], "weight_decay": 0, "lr_scale": 1.0},
    ]
    return TrainingGolden(
        run=run,
        method=method,
        batches=list(batches),
        targets=[{} for _ in batches],
        steps_per_epoch=c["optsteps_per_epoch"],
        decayed=set().union(*(ours(group["params"]) for group in groups if group["weight_decay"])),
        undecayed=set().union(*(ours(group["params"]) for group in groups if not group["weight_decay"])),
        losses=g["loss_per_microstep"].tolist(),
        lrs=g["lr_per_optstep"].tolist(),
        start=start,
        end=end,
        norms=g["gradnorm_per_optstep"].tolist(),
        scales={name: group["lr_scale"] for group in groups for name in ours(group["params"])},
        accumulation=c["accum"],
        **more,
    )


def _sections(c: Mapping[str, Any], optim: Mapping[str, Any] | None = None, **schedule: Any) -> dict[str, Any]:
    """The sections `optim` and `schedule` of a file's run."""
    batch = c["batch"] * c["accum"]
    return {
        "optim": {"betas": c["betas"], "eps": c["eps"], "weight_decay": c["weight_decay"], **(optim or {})},
        "schedule": {
            "global_batch": batch,
            "lr_batch": batch,
            "base_lr": c["peak_lr"],
            "epochs": c["epochs"],
            "warmup_epochs": c["warmup_epochs"],
            "min_lr": c.get("min_lr", 0.0),
            **schedule,
        },
    }


def _micro_batches(g: Golden, **noise: Tensor) -> list[Batch]:
    """noise: purpose -> [micro-steps, batch, ...]."""
    size, pool = g.config["batch"], g["images"]
    rows = [torch.arange(size * k, size * (k + 1)) % len(pool) for k in range(g.config["micro_steps"])]
    batches = [batch_of(pool[row], **{name: values[k] for name, values in noise.items()}) for k, row in enumerate(rows)]
    labels, soft = g.tensors.get("labels"), g.tensors.get("soft_targets")
    if labels is not None:
        batches = [replace(batch, labels=labels[row]) for batch, row in zip(batches, rows, strict=True)]
    if soft is not None:
        batches = [replace(batch, soft_labels=soft[row]) for batch, row in zip(batches, rows, strict=True)]
    return batches


def simmim() -> TrainingGolden:
    """Multi-step rates, clipping."""
    g = golden.load("simmim_train_dev")
    c = g.config
    section = {
        "name": "simmim",
        "masking": {"ratio": c["mask_ratio"], "unit": c["mask_patch_size"]},
        "positions": {"shared": "relative"}[c["position"]],
        "layer_scale": c["layer_scale_init"],
    }
    student = {"width": c["embed"], "depth": c["depth"], "heads": c["heads"], "patch": c["patch"]}
    schedule = {"kind": c["schedule"], "milestones": c["milestone_epochs"], "warmup_lr": c["warmup_lr"]}
    run = golden.run_config(section, student, c["img"], **_sections(c, {"clip": c["clip_grad"]}, **schedule))
    factor = c["mask_patch_size"] // c["patch"]
    units = g["mask"][:, :, ::factor, ::factor].flatten(2).bool()
    noise = torch.where(units, 0.25, 0.75)  # an order in which the masked units come first
    method = method_class("simmim")(run, {})
    return _official_run(g, run, method, _micro_batches(g, mask=noise), simmim_names.from_official)


def convmae() -> TrainingGolden:
    g = golden.load("convmae_train_dev")
    c = g.config
    student, stages = sections(c)
    section = {
        "name": "convmae",
        "masking": {"ratio": c["mask_ratio"]},
        "norm_pix_loss": c["norm_pix"],
        "decoder_width": c["dec_dim"],
        "decoder_depth": c["dec_depth"],
        "decoder_heads": c["dec_heads"],
        "stages": stages,
    }
    run = golden.run_config(section, student, c["img"], **_sections(c))
    method = method_class("convmae")(run, {})
    return _official_run(g, run, method, _micro_batches(g, mask=g["noise"]), convmae_names.from_official)


def mff() -> TrainingGolden:
    g = golden.load("mff_train_dev")
    return _openmmlab(g, {"name": "mff", "fusion": {"levels": g.config["out_indices"]}})


def pixmim() -> TrainingGolden:
    g = golden.load("pixmim_train_dev")
    return _openmmlab(g, {"name": "pixmim", "low_pass_radius": g.config["radius"]})


def _openmmlab(g: Golden, changes: dict[str, Any]) -> TrainingGolden:
    c = g.config
    schedule = {"kind": "openmmlab_cosine", "warmup_start_factor": c["start_factor"]}
    run = golden.mae_run(c, changes, **_sections(c, **schedule))
    method = method_class(run.method.name)(run, {})
    return _official_run(g, run, method, _micro_batches(g, mask=g["noise"]), openmmlab_names.from_official)


def finetune() -> TrainingGolden:
    """Layer decay, accumulation, clipping, label smoothing."""
    return _finetune("mae_finetune_cls_train_dev")


def finetune_soft() -> TrainingGolden:
    """Layer decay, soft labels, drop path, mean pooling, a position table of another grid."""
    return _finetune("mae_finetune_train_dev")


def _finetune(name: str) -> TrainingGolden:
    g = golden.load(name)
    c = g.config
    section = {
        "name": "finetune",
        "classes": c["classes"],
        "pool": "mean" if c["global_pool"] else "cls",
        "label_smoothing": c["smoothing"],
    }
    student = {"width": c["embed"], "depth": c["depth"], "heads": c["heads"], "patch": c["patch"]}
    student["drop_path"] = c["drop_path"]
    optim = {"layer_decay": c["layer_decay"], "clip": c["clip_grad"] or 0.0}
    run = golden.run_config(section, student, c["img"], **_sections(c, optim))
    method = method_class("finetune")(run, {})
    prefix, table = method.student.prefix, g["checkpoint_pos_embed"]
    before, after = (round((tokens - prefix) ** 0.5) for tokens in (table.shape[1], method.student.pos_embed.shape[1]))
    resized = pos_embed.resize(table, (before, before), (after, after), prefix)
    golden.close(resized, g["state0/pos_embed"], 1e-7, "table")
    noise = {"drop_path": g["droppath_uniform"].permute(0, 3, 1, 2)} if "droppath_uniform" in g.tensors else {}
    return _official_run(g, run, method, _micro_batches(g, **noise), finetune_names.from_official)


def linear_probe(accumulation: int = 1) -> TrainingGolden:
    """LARS; BatchNorm's statistics of each micro-batch, whose count is left to tests/engine/test_lars.py.

    accumulation: above 1 the steps are others than the stored ones, and only start and batches hold.
    """
    g = golden.load("mae_linprobe_train_dev")
    c = {**g.config, "accum": accumulation}
    section = {"name": "linear_probe", "classes": c["classes"], "pool": "mean" if c["global_pool"] else "cls"}
    section["norm_batch"] = c["batch"]
    student = {"width": c["embed"], "depth": c["depth"], "heads": c["heads"], "patch": c["patch"]}
    schedule = _sections({**c, "betas": None, "eps": None})["schedule"]
    optim = {"name": "lars", "momentum": 0.9, "trust_coefficient": 1e-3, "weight_decay": c["weight_decay"]}
    engine = {"ds_config": "cpu_zero0_fp32"}
    run = golden.run_config(section, student, c["img"], optim=optim, schedule=schedule, engine=engine)
    groups = {"decay": [], "no_decay": c["trainable"]}
    if c["weight_decay"]:
        groups = {key: [n for n in c["trainable"] if n.endswith(".weight") == (key == "decay")] for key in groups}
    method = method_class("linear_probe")(run, {})
    g = Golden(g.tensors, {**c, **groups})
    t = _official_run(g, run, method, _micro_batches(g), finetune_names.from_official)
    for state in (t.start, t.end):
        del state["head.0.num_batches_tracked"]
    return t


def amt() -> TrainingGolden:
    """MAE with uniform masks, the update of the importance after epoch 40, then masks drawn by importance.

    The importance that the student gives after the fourth step is compared with the stored one; the masks are drawn
    from the stored weights of the patches and compared; then the loss sees just these masks, because our importance is
    kept in bytes and would swap a few patches: importance is equal everywhere and the noise rises in the drawn order.
    """
    g = golden.load("amt_mae_train_dev")
    c = g.config
    masking = {"policy": "amt", "ratio": c["mask_ratio"], "drop_ratio": c["throw_ratio"]}
    run = golden.mae_run(c, {"masking": masking}, **_sections(c))
    method = MAE(run, {})
    policy = method.masking
    assert isinstance(policy, AMT)
    batches = [
        batch_of(g["images"][g["sample_ids"][step]], mask=g["uniform_noise"][row])
        for row, step in enumerate(c["random_microsteps"])
    ]
    for row, step in enumerate(c["amt_microsteps"]):
        drawn = policy.draw(g["patch_weights"][row], g["exponential_noise"][row])
        for ours, theirs in ((drawn.visible, g["ids_visible"][row]), (drawn.masked, g["ids_masked"][row])):
            assert torch.equal(ours.sort(dim=1).values, theirs.sort(dim=1).values)
        rank = g["ids_shuffle"][step].argsort(dim=1) + 1.0
        batch = batch_of(g["images"][g["sample_ids"][step]], mask=rank)
        batches.append(replace(batch, importance=torch.full_like(rank, UNKNOWN, dtype=torch.uint8)))

    @torch.no_grad()
    def importance_is_theirs(step: int) -> None:
        if step == c["amt_microsteps"][0]:
            attention = method.student(g["images"], attention=True).attention
            golden.close(importance_from_attention(attention), g["table/1"].flatten(1))

    return _official_run(
        g,
        run,
        method,
        batches,
        mae_names.from_official,
        first_step=c["start_epoch"] * c["optsteps_per_epoch"],
        before_step=importance_is_theirs,
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
