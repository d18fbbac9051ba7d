"""mimscale evaluate top1: the accuracy of fine-tuned classifiers, each at its own image size and crop."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimscale.data.loader import eval_batches
from mimscale.data.manifest import Manifest
from mimscale.distributed.coordination import Coordinator
from mimscale.distributed.same_ranks import refuse_different
from mimscale.evals.classifier import Classifier, load_classifier
from mimscale.evals.launch import MAX_IMAGE_SIZE, MAX_WORKERS, at_least, default_outs, publish, share
from mimscale.evals.overlap import check_apart_from_training
from mimscale.evals.parallel import all_sum
from mimscale.evals.report import table
from mimscale.evals.top1 import accuracy, count, labelled
from mimscale.files.command_line import add_json, end_with_example
from mimscale.files.progress import tracked

NAME = "top1"
PACKAGES = ("mimscale", "torch", "timm", "numpy", "pillow")
HELP = "accuracy of a fine-tuned classifier, at its own image size and crop"
DESCRIPTION = f"""{HELP}

RUN is a run of the method finetune (its newest checkpoint), a checkpoint folder, or a file of a fine-tuned classifier
under official names (MAE, ConvMAE, SimMIM, timm). The crop is that of the run's section data: crop_pct, by default
0.875 up to 224 pixels and 1 above.
"""


def add_parser(protocols: Any) -> None:
    own = protocols.add_parser(
        NAME,
        help=HELP,
        description=DESCRIPTION,
    )
    own.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, checkpoint folder or file")
    own.add_argument("--val", type=Path, required=True, metavar="SHARDS", help="labelled data set to be tested on")
    own.add_argument("--ema", action="store_true", help="the moving average of the weights, not the weights themselves")
    own.add_argument("--image-size", type=at_least(1, MAX_IMAGE_SIZE), metavar="PX", help="default: that of the run")
    own.add_argument("--crop-pct", type=share, metavar="X", help="share of the short side kept (default: the run's)")
    own.add_argument("--batch", type=at_least(1), default=256, metavar="N", help="images at a time (default 256)")
    own.add_argument(
        "--workers", type=at_least(0, MAX_WORKERS), default=8, metavar="N", help="processes that read (default 8)"
    )
    own.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    own.add_argument("--precision", choices=("fp32", "bf16"), help="number format (default bf16 on cuda)")
    own.add_argument("--out", type=Path, metavar="FILE.json", help="default: eval/ in the folder of each run")
    add_json(own)
    end_with_example(own, "mimscale evaluate top1 runs/finetuned --val shards/imagenet-val")


def run(args: argparse.Namespace, device: torch.device, ranks: Coordinator) -> int:
    report = measure(
        args.runs,
        args.val,
        ranks,
        device=device,
        precision=args.precision or ("bf16" if device.type == "cuda" else "fp32"),
        image_size=args.image_size,
        crop_pct=args.crop_pct,
        ema=args.ema,
        batch=args.batch,
        workers=args.workers,
    )
    outs = default_outs(args, [NAME], report["protocol"]["precision"], [report["val"]["fingerprint"]], crop_pct=None)
    ranks.on_rank0(publish, report, [table(report)], outs, args.json)
    return 0


def measure(
    runs: Sequence[Path],
    val_path: Path,
    ranks: Coordinator,
    *,
    device: torch.device,
    precision: str,
    image_size: int | None = None,
    crop_pct: float | None = None,
    ema: bool = False,
    batch: int = 256,
    workers: int = 8,
) -> dict[str, Any]:
    """The report: a row for each run, and what was measured on which data. Collective; all ranks have the same result.

    The options are those of the command. Raises UserError.
    """
    start, rows = time.monotonic(), []
    val = ranks.on_all_ranks(Manifest.load, val_path)

    def counted(path: Path) -> tuple[Classifier, float, Tensor]:
        found = load_classifier(path, image_size=image_size, device=device, precision=precision, ema=ema)
        found.check_labels(val, val_path)
        if ranks.rank == 0:
            check_apart_from_training(found.run.data.shards, f"--val {val_path}", val)
        crop = crop_pct or found.run.data.eval_crop_pct
        batches = eval_batches(
            val,
            found.run.data.image_size,
            batch=batch,
            workers=workers,
            crop_pct=crop,
            rank=ranks.rank,
            world=ranks.world,
        )
        if ranks.rank == 0:
            batches = tracked(batches, -(-val.samples // (batch * ranks.world)), "val", "batches")
        return found, crop, count(found.logits, labelled(batches), device)

    for path in dict.fromkeys(runs):
        found, crop, counts = ranks.on_all_ranks(counted, path)
        refuse_different({f"{path.name}: sha256": found.sha256, "val": val.fingerprint}, ranks)
        rows.append(
            {
                "network": path.name + (" (ema)" if ema else ""),
                "pool": found.method.config.pool,
                "source": str(found.path),
                "step": found.step,
                "sha256": found.sha256,
                "method": found.run.method.name,
                "image_size": found.run.data.image_size,
                "crop_pct": crop,
                **accuracy(all_sum(counts))._asdict(),
            }
        )
    return {
        "protocol": {
            "name": NAME,
            "precision": precision,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "ranks": ranks.world,
            "ema": ema,
        },
        "unit": "percent right",
        "metrics": {"top1": "top-1", "top5": "top-5"},
        "val": {"shards": str(val_path), "samples": val.samples, "fingerprint": val.fingerprint},
        "versions": {package: metadata.version(package) for package in PACKAGES},
        "seconds": round(time.monotonic() - start, 1),
        "rows": rows,
    }
