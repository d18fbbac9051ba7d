"""`mimscale evaluate linear_mae`: MAE's linear probe of a run, trained by the trainer in a run folder of its own.

It stands above `evals`, because the probe is a training run: its images are cropped anew in every epoch, so features
cannot be cached, and it takes as long as 90 forward epochs. The same command goes on where the last one was stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mimscale.api.overrides import as_words
from mimscale.checkpoint import format as checkpoint
from mimscale.config.recipes import load_recipe
from mimscale.config.run import RunConfig
from mimscale.convert.networks import Student, StudentInfo, student_from
from mimscale.convert.read import resolve
from mimscale.data.manifest import Manifest
from mimscale.errors import UserError, warn
from mimscale.evals.launch import MAX_WORKERS, at_least, publish
from mimscale.evals.networks import eval_folder
from mimscale.evals.overlap import check_apart
from mimscale.evals.report import table
from mimscale.evals.runner import identity, open_data
from mimscale.files.command_line import add_json, end_with_example
from mimscale.optim.config import ScheduleConfig

NAME = "linear_mae"
HELP = "MAE's linear probe: LARS on random crops for 90 epochs, trained as a run of its own"
DESCRIPTION = f"""{HELP}

Trains the recipe {{recipe}} on the frozen encoder of each RUN, in RUN/eval, and measures top-1 and top-5 on the
centre crops of --val. The same command goes on where a run was stopped. Starts alone, or under torchrun or srun.
Source: He et al., CVPR 2022 (arXiv 2111.06377), app. A.1, and main_linprobe.py of facebookresearch/mae.
"""
RECIPE = "mae_vit_b16_linear"
TRUST, MOMENTUM = 1e-3, 0.9
LEAST_NORMS = 10
CROP_PCT = 0.875  # 224 of 256 pixels
PUBLISHED = {"global_batch": 16384, "epochs": 90.0, "warmup_epochs": 10.0, "base_lr": 0.1, "pool": "cls"}
PLACES = ("data.shards", "init.weights")  # which do not say what a probe is
LEAST_STEPS = 16
"""Per epoch: a data set on which the published batch makes fewer of them gets a smaller one by default."""


def add_parser(protocols: Any) -> None:
    own = protocols.add_parser(
        NAME,
        help=HELP,
        description=DESCRIPTION.format(recipe=RECIPE),
    )
    own.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, checkpoint folder or file")
    own.add_argument("--train", type=Path, required=True, metavar="SHARDS", help="labelled data set to learn from")
    own.add_argument("--val", type=Path, required=True, metavar="SHARDS", help="labelled data set to be tested on")
    own.add_argument("--pool", choices=("cls", "mean"), default="cls", help="class token, patch mean (default cls)")
    own.add_argument("--epochs", type=_positive, default=90.0, metavar="X", help="passes over --train (default 90)")
    own.add_argument(
        "--warmup-epochs", type=_positive, metavar="X", help="of them with a rising rate (default a ninth)"
    )
    own.add_argument(
        "--global-batch",
        type=_whole,
        metavar="N",
        help=f"images per step (default 16384, or less where that makes fewer than {LEAST_STEPS} steps per epoch)",
    )
    own.add_argument("--base-lr", type=_positive, default=0.1, metavar="X", help="rate per 256 images (default 0.1)")
    own.add_argument("--image-size", type=_whole, metavar="PX", help="default: as the run was trained")
    own.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="of head and crops (default 0)")
    own.add_argument("--workers", type=at_least(0, MAX_WORKERS), metavar="N", help="processes that read (default 8)")
    own.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    own.add_argument("--precision", choices=("fp32", "bf16"), help="of the encoder (default bf16 on cuda)")
    own.add_argument(
        "--override", nargs="+", default=[], metavar="section.key=value", help="further changes to the recipe"
    )
    own.add_argument("--out", type=Path, metavar="FILE.json", help="default: eval/ in the folder of each run")
    add_json(own)
    end_with_example(own, f"mimscale evaluate {NAME} runs/l16 --train shards/imagenet-train --val shards/imagenet-val")


def run(args: argparse.Namespace) -> int:
    # here, because help needs no trainer
    from mimscale.api.training import train
    from mimscale.distributed.world import close_process_group, from_environment

    if args.out is not None and args.out.suffix != ".json":
        raise UserError(f"--out {args.out} must end in .json")
    if len(args.runs) > 1 and args.json:
        raise UserError(f"--json prints one report and {len(args.runs)} runs make as many; give one run")
    if len(args.runs) > 1 and args.out is not None:
        raise UserError(f"--out {args.out} names one file for {len(args.runs)} runs; leave it out, or give one run")
    world = from_environment(args.device)
    device, rank = world.device, world.rank
    precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    manifest, val = open_data(args.train, args.val, labelled=True)
    check_apart(args.train, manifest, args.val, val)
    runs = [(path, *recipe_of(path, args, manifest, precision)) for path in dict.fromkeys(args.runs)]
    for path, values, config in runs:  # all of them were checked before the first is trained
        slow = too_slow(manifest.samples, config.schedule)
        if slow and rank == 0:
            warn(f"mimscale evaluate {NAME}: warning: {slow}")
        folder = eval_folder(path) / folder_name(args, config, manifest.fingerprint)
        done = train(RECIPE, values, run_dir=folder, words=args.override)
        if not done.finished:
            if rank == 0:
                warn(f"mimscale evaluate {NAME}: {folder} stopped at step {done.step}; the same command goes on there")
            return 128 + signal.SIGTERM  # there is no result
        out = args.out or eval_folder(path) / f"{folder.name}-{val.fingerprint[:8]}.json"
        _measure(path, folder, out, args, device, [slow] if slow else [])
    close_process_group()
    return 0


def recipe_of(
    path: Path, args: argparse.Namespace, train: Manifest, precision: str
) -> tuple[dict[str, Any], RunConfig]:
    """The values that make the recipe that of this run, data and command line, and the recipe with them and with those
    of --override. Raises UserError.
    """
    values = overrides_of(path, args, train, precision)
    return values, load_recipe(RECIPE, [*as_words(values), *args.override])


def overrides_of(path: Path, args: argparse.Namespace, train: Manifest, precision: str) -> dict[str, Any]:
    """What makes the recipe that of this run, data and command line. Raises UserError."""
    student, info = student_from(path, image_size=args.image_size)
    if args.pool == "cls" and not student.prefix:
        raise UserError(f"--pool cls: {path} has no class token; choose --pool mean")
    assert train.labels is not None
    batch = args.global_batch or fitting_batch(train.samples)
    warmup = args.epochs / 9 if args.warmup_epochs is None else args.warmup_epochs
    return {
        "seed": args.seed,
        "data.shards": str(args.train),
        "data.image_size": info.image_size,
        "student": {**info.config.model_dump(mode="json"), "drop_path": 0.0},
        "init.weights": str(resolve(path)),
        "method.classes": len(train.classes) if train.classes is not None else int(train.labels.max()) + 1,
        "method.pool": args.pool,
        "method.encoder_precision": precision,
        **_encoder(student, info),
        "schedule.global_batch": batch,
        "schedule.epochs": args.epochs,
        "schedule.warmup_epochs": warmup,
        "schedule.base_lr": args.base_lr,
        "engine.device": args.device,
        **({} if args.workers is None else {"data.workers": args.workers}),
    }


def _encoder(student: Student, info: StudentInfo) -> dict[str, Any]:
    """The section `method` as far as it says what kind of encoder there is."""
    from mimscale.models.beit import LAYER_SCALE, Beit

    if isinstance(student, Beit):
        scaled = "blocks.0.gamma_1" in student.state_dict()
        positions = {"positions": student.positions, "layer_scale": LAYER_SCALE if scaled else None}
        return {"method.beit": positions}
    return {} if info.stages is None else {"method.stages": info.stages.model_dump(mode="json")}


def fitting_batch(samples: int) -> int:
    """The published batch, or the largest power of two that makes at least LEAST_STEPS steps of an epoch."""
    batch = int(PUBLISHED["global_batch"])  # type: ignore[call-overload]
    while batch > 2 and samples // batch < LEAST_STEPS:
        batch //= 2
    return batch


def too_slow(samples: int, schedule: ScheduleConfig) -> str:
    """A warning where LARS hardly moves the layer; empty where it does. samples: of the training set.

    Each step moves the weights by at most rate x trust coefficient / (1 - momentum) of their norm; over the published
    run on ImageNet-1K these add up to 225 norms.
    """
    steps = schedule.steps or (schedule.epochs or 0) * (samples // schedule.global_batch)
    norms = 0.5 * schedule.peak_lr * steps * TRUST / (1 - MOMENTUM)
    if norms >= LEAST_NORMS:
        return ""
    published = 6.4 * schedule.lr_batch / schedule.global_batch
    slower = schedule.base_lr < 0.99 * published
    raise_lr = f"raise --base-lr, {published:.3g} gives the published peak; " if slower else ""
    return (
        f"{steps:.0f} steps at a peak rate of {schedule.peak_lr:.3g} move the layer by {norms:.2g} of its norm at most "
        f"(published: 225), so it stays near its start; {raise_lr}more --epochs take more steps"
    )


def differences(values: Mapping[str, Any], args: argparse.Namespace) -> list[str]:
    """In what a probe differs from the published one, a line each."""
    found = {
        "global_batch": values["schedule.global_batch"],
        "epochs": values["schedule.epochs"],
        "warmup_epochs": values["schedule.warmup_epochs"],
        "base_lr": values["schedule.base_lr"],
        "pool": values["method.pool"],
    }
    lines = [
        f"{key} = {_short(found[key])}, not {_short(PUBLISHED[key])}" for key in found if found[key] != PUBLISHED[key]
    ]
    return lines + [f"{word}, set by --override" for word in args.override]


def _short(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def folder_name(args: argparse.Namespace, config: RunConfig, train_fingerprint: str) -> str:
    """linear_mae-POOL-OPTIONS-CHECKPOINT-HASH: another choice is another run.

    HASH: of all that shapes the probe; of the training set it takes the fingerprint, wherever the set lies.
    """
    shaping = {key: value for key, value in config.shaping().items() if key not in PLACES}
    text = json.dumps([shaping, train_fingerprint], sort_keys=True, default=str)
    words = [NAME, args.pool]
    words += [f"epochs{args.epochs:g}"] if args.epochs != 90 else []
    words += [f"lr{args.base_lr:g}"] if args.base_lr != 0.1 else []
    words += [f"batch{args.global_batch}"] if args.global_batch else []
    words += [f"size{args.image_size}"] if args.image_size else []
    words += [f"seed{args.seed}"] if args.seed else []
    of = Path(str(config.flat()["init.weights"])).stem
    return "-".join([*words, of, hashlib.sha256(text.encode()).hexdigest()[:8]])


def _measure(path: Path, folder: Path, out: Path, args: argparse.Namespace, device: Any, warnings: list[str]) -> None:
    """Accuracy of the trained probe on all ranks, a table, and a file. Collective."""
    from mimscale.distributed.world import from_environment
    from mimscale.evals.parallel import join
    from mimscale.evals.top1_cli import measure

    ranks = join(from_environment(args.device))
    config = load_recipe(str(folder / "config.yaml")).flat()
    report = measure(
        [folder],
        args.val,
        ranks,
        device=device,
        precision="fp32",  # of the head; the encoder's is in the run
        crop_pct=CROP_PCT,
        batch=256,
        workers=int(config["data.workers"]),
    )
    report = finished_report(report, path, folder, config, args)
    report["rows"][0]["warnings"] = warnings
    lines = [f"differs from the published probe: {line}" for line in report["protocol"]["differs_from_paper"]]
    ranks.on_rank0(lambda: publish(report, [table(report)], [out], args.json, lines))


def finished_report(
    report: dict[str, Any], path: Path, folder: Path, config: Mapping[str, Any], args: argparse.Namespace
) -> dict[str, Any]:
    """The report of `top1` as that of this protocol. config: of the probe's run, flat."""
    (row,) = report["rows"]
    source = resolve(path)
    of = {
        "network": path.name,
        "source": str(source),
        "step": checkpoint.step_of(source) if source.is_dir() else None,
        "sha256": config["init.sha256"],
        "probe": {key: row[key] for key in ("source", "step", "sha256")},
        NAME: row["top1"],
        f"{NAME}_top5": row["top5"],
    }
    keys = ("method.", "optim.", "schedule.", "data.crop", "data.image_size", "data.interpolation", "data.flip", "seed")
    return {
        **report,
        "protocol": {
            **report["protocol"],
            "name": NAME,
            "pool": [config["method.pool"]],
            "crop_pct": CROP_PCT,
            "precision": config["method.encoder_precision"],
            "recipe": {key: value for key, value in config.items() if key.startswith(keys)},
            "differs_from_paper": differences(config, args),
        },
        "unit": "percent right",
        "metrics": {NAME: "MAE's linear probe", f"{NAME}_top5": "top-5"},
        "train": identity(args.train, Manifest.load(args.train)),
        "rows": [{**row, **of}],
    }


def _number(text: str, kind: Callable[[str], float], rule: str) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = 0
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"'{text}' must be {rule}")
    return value


def _positive(text: str) -> float:
    return _number(text, float, "a number above 0 and below 1e9")


def _whole(text: str) -> int:
    return int(_number(text, int, "a whole number, 1 or more"))
