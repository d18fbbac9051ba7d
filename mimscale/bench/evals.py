"""Cost of evaluation while training: CPU time of an evaluation and of the steps between two at the default interval."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--recipe", default="mae_vit_b16", help="without teachers; its student, image size and batch count"
    )
    parser.add_argument("--images", type=int, default=8, help="of one training step and of one forward pass")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved measurements; the least of each counts")
    parser.add_argument("--classes", type=int, default=1000, help="of the features that the protocols get")
    parser.add_argument("--train-samples", type=int, default=10_000)
    parser.add_argument("--val-samples", type=int, default=2_000)


def run(args: argparse.Namespace) -> int:
    import time
    from collections.abc import Callable

    import torch

    from mimscale.bench._report import publish
    from mimscale.config.recipes import load_recipe
    from mimscale.config.run import method_class
    from mimscale.evals.config import EvalsConfig
    from mimscale.evals.features import frozen
    from mimscale.evals.frozen_student import StudentSkeleton, copied
    from mimscale.evals.protocols.base import Context, Features
    from mimscale.evals.runner import protocol_class
    from mimscale.evals.spectrum import rankme, spread
    from mimscale.types import Batch

    config = load_recipe(args.recipe)
    method = method_class(config.method.name)(config, {})
    optimizer = torch.optim.AdamW(method.parameters())
    side, count, random = config.data.image_size, args.images, torch.Generator().manual_seed(0)
    shapes = {name: (count, *wanted.shape) for name, wanted in method.needs.noise.items()}
    images = torch.randn(count, 3, side, side, generator=random)
    none = torch.zeros(count, dtype=torch.int64)
    batch = Batch(images, none, none, {n: torch.rand(s) for n, s in shapes.items()}, torch.zeros(count, 4), none.bool())
    skeleton = StudentSkeleton(method.student)
    named = [(name, p) for name, p in method.named_parameters() if name.startswith("student.")]

    def step() -> None:
        method(batch, {})["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    def copy_student() -> None:
        skeleton.filled([*copied(named, torch.float32), *method.student.named_buffers()])

    extract = frozen(skeleton.filled([*copied(named, torch.float32), *method.student.named_buffers()]), ("mean",))
    width = config.student.width
    sets = []
    for samples in (args.train_samples, args.val_samples):
        values = torch.randn(samples, int(width or 0), generator=random)
        sets.append(Features(values, torch.randint(args.classes, (samples,), generator=random)))
    context, evals = Context(args.classes, 0, torch.device("cpu")), EvalsConfig(val=Path("unused"))
    work: dict[str, Callable[[], object]] = {
        "training step": step,
        "copy of the student": copy_student,
        "forward pass": lambda: extract(images),
        "RankMe and spread": lambda: (rankme(sets[0].values), spread(sets[0].values)),
    }
    for name in evals.protocols:
        kind = protocol_class(name)
        work[name] = lambda kind=kind: kind(kind.Config(), context).run(*sets)  # type: ignore[misc]

    seconds: dict[str, float] = {}
    for _ in range(args.rounds):
        for name, measured in work.items():
            start_s = time.process_time()
            measured()
            spent_s = time.process_time() - start_s
            seconds[name] = min(spent_s, seconds.get(name, spent_s))

    evaluated = args.train_samples + args.val_samples
    batch_size = config.schedule.global_batch
    every = evals.interval(evaluated, batch_size)
    steps_s = seconds.pop("training step") / count * batch_size * every
    seconds["forward pass"] *= evaluated / count
    rows = [[f"{every} steps of {batch_size} images", f"{steps_s:.1f}", ""]]
    labels = {"forward pass": f"forward passes of {evaluated} images"}
    rows += [[labels.get(name, name), f"{s:.1f}", f"{s / steps_s:.3%}"] for name, s in seconds.items()]
    total_s = sum(seconds.values())
    rows.append(["one evaluation", f"{total_s:.1f}", f"{total_s / steps_s:.2%}"])
    publish(args, [([f"{args.recipe}, one process, fp32", "CPU s", "share"], rows)])
    return 0
