"""`mimscale doctor [RECIPE] --teacher NAME`: describe a teacher and measure the error of its targets in low precision.

NAME is a teacher of the recipe, or without a recipe a model of timm or open_clip. Works offline: if the weights are not
on this machine, random weights are used and the output says so.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from rich.table import Table
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from mimscale.config.recipes import load_recipe
from mimscale.config.run import RunConfig, method_class
from mimscale.data.decode import BadImage, decode
from mimscale.errors import UserError
from mimscale.files.command_line import print_json, stdout_kept, tables_json
from mimscale.files.console import plain_console
from mimscale.files.progress import working
from mimscale.teachers import quantise, weights
from mimscale.teachers.config import TeacherConfig
from mimscale.teachers.ensemble import TeacherEnsemble, adapter, build_skeleton, build_skeletons, describe
from mimscale.teachers.fidelity import cosine, relative_error, top_overlap
from mimscale.types import Targets, TeacherInfo, TeacherNeeds, imagenet_statistics

LIBRARIES: tuple[Literal["timm", "open_clip"], ...] = ("timm", "open_clip")
PRECISIONS = get_args(TeacherConfig.model_fields["precision"].annotation)
SHARE = 0.3  # of the patches: those that are visible in MaskAlign
CROPS = 2  # per image
STUDENT_PATCHES = (14, 16)
STUDENT_SIZES = (192, 196, 224, 256)
KEY = "teacher"  # name of a teacher without a recipe
ERROR = "error: L2 norm of the difference divided by that of the fp32 output, over the patch tokens of a block's output"
Rows = tuple[str, list[str], list[list[str]]]  # title, columns, rows of cells


def add_arguments(group: Any) -> None:
    """group: of a parser."""
    group.add_argument("--teacher", metavar="NAME", help="its name in the recipe, or a model")
    group.add_argument("--weights", type=Path, metavar="FILE", help="of a model, without a recipe")
    group.add_argument("--image-size", type=int, metavar="PX", help="of a model, without a recipe (default 224)")
    levels = "blocks to compare, from 0, as in 5,11 (default: those of the method)"
    group.add_argument("--levels", metavar="N,N", help=levels)
    group.add_argument("--images", type=Path, nargs="+", metavar="FILE", help="(default: two photographs)")


def run(args: argparse.Namespace) -> int:
    """Print the description and the tables. Raises UserError."""
    with stdout_kept(args.json), working("measuring"):
        lines, tables, notes = measure(args)
    if args.json:
        print_json({"teacher": lines, "tables": tables_json(tables), "notes": notes})
        return 0
    print(*lines, sep="\n")
    for number, (title, columns, rows) in enumerate(tables):
        table = Table(*columns, title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        plain_console(width=None if sys.stdout.isatty() else 160).print(table)
        if number == 0:
            print(*notes, sep="\n")
    return 0


def measure(args: argparse.Namespace) -> tuple[list[str], list[Rows], list[str]]:
    """(lines that describe the teacher; the tables of precisions and of sizes; what is to be said of the first)."""
    if args.recipe is None:
        name, config, size = KEY, config_of_model(args.teacher, args.weights), args.image_size or 224
        info, needs = build_skeleton(name, config, size).info, TeacherNeeds()
    else:
        if args.weights or args.image_size:
            raise UserError("--weights and --image-size are for a teacher without a recipe; override the recipe's keys")
        run = load_recipe(args.recipe, args.overrides)
        name, size = args.teacher, run.data.image_size
        config, info, needs = teacher_of_recipe(run, name)
    config, origin = with_weights_or_random(name, config)
    levels = needs.levels or (info.depth - 1,)
    if args.levels is not None:
        levels = parse_levels(args.levels, info)
    needs = TeacherNeeds(levels, info.has_attention)
    images, shown = load_images(args.images, size)
    grid = f"{info.grid[0]}x{info.grid[1]} patches at {info.image_size} px"
    cls = "with class token" if info.has_cls else "no class token, so no attention masking"
    cls = "masks follow the norm of its features" if info.norm_attention else cls
    lines = [
        f"{config.library} {config.model}: {info.dim} wide, {info.depth} blocks, {grid}, {cls}",
        f"weights: {origin}",
        f"images: {shown}",
    ]
    precisions, refused = compare_precisions(name, config, needs, size, images)
    # a convolutional teacher's map is resized to any student's grid
    return lines, [precisions, *([] if config.grid is not None else [grids(info)])], [ERROR, *refused]


def config_of_model(model: str, file: Path | None) -> TeacherConfig:
    """The configuration of a model of timm or open_clip: MODEL or MODEL.TAG. Raises UserError."""
    base, _, tag = model.partition(".")
    for library in LIBRARIES:
        if base in adapter(library).models():
            pretrained = tag or None
            return TeacherConfig(library=library, model=base, pretrained=pretrained, weights=file)
    known = [name for library in LIBRARIES for name in adapter(library).models()]
    near = ", ".join(difflib.get_close_matches(base, known, n=3))
    fix = f"did you mean {near}?" if near else "give MODEL or MODEL.TAG, or a recipe and its name of the teacher"
    raise UserError(f"--teacher {model}: neither timm nor open_clip has it; {fix}")


def teacher_of_recipe(run: RunConfig, name: str) -> tuple[TeacherConfig, TeacherInfo, TeacherNeeds]:
    """A teacher of a run, and the targets that the run's method uses. Raises UserError."""
    if name not in run.teachers:
        have = ", ".join(run.teachers) or "none"
        raise UserError(f"--teacher {name}: the recipe's teachers are {have}; choose one, or leave the recipe out")
    infos = describe(build_skeletons(run.teachers, run.data.image_size))
    with torch.device("meta"):
        method: Any = method_class(run.method.name)(run, infos)
    return run.teachers[name], infos[name], method.needs.teachers.get(name, TeacherNeeds())


def with_weights_or_random(name: str, config: TeacherConfig) -> tuple[TeacherConfig, str]:
    """(a configuration that can be loaded on this machine, origin of its weights). Raises UserError."""
    if config.random:
        return config, "random initialisation, as the recipe says"
    hub = partial(adapter(config.library).hub_file, name, config)
    try:
        path = weights.locate(name, config, hub, may_download=False)
        return config.model_copy(update={"weights": path}), str(path)
    except UserError as error:
        if config.weights is not None:
            raise
        random = config.model_copy(update={"random": True, "sha256": None})
        return random, f"RANDOM INITIALISATION, so these errors are not those of the trained teacher ({error})"


def parse_levels(text: str, info: TeacherInfo) -> tuple[int, ...]:
    """ "5,11" -> (5, 11), ascending. Raises UserError."""
    try:
        levels = tuple(sorted({int(word) for word in text.split(",")}))
    except ValueError:
        raise UserError(f"--levels {text}: give numbers from 0 to {info.depth - 1}, as in 5,{info.depth - 1}") from None
    if not 0 <= levels[0] <= levels[-1] < info.depth:
        raise UserError(f"--levels {text}: {info.name} has blocks 0 to {info.depth - 1}")
    return levels


# ------------------------------------------------------------------------------------------------ images


def load_images(paths: Sequence[Path] | None, size: int) -> tuple[Tensor, str]:
    """(square crops at both ends of each image, float32 ImageNet-normalised [B, 3, S, S]; a description). paths: None:
    two photographs of scikit-learn. Raises UserError.
    """
    if paths is None:
        from sklearn.datasets import load_sample_images

        uncropped = [torch.from_numpy(image.copy()).permute(2, 0, 1) for image in load_sample_images().images]
        what = "two photographs of scikit-learn"
    else:
        uncropped = [_read(path) for path in paths]
        what = f"{len(paths)} given by --images"
    crops = [tvf.resize(crop, [size, size], antialias=True) for image in uncropped for crop in _squares(image)]
    mean, std = imagenet_statistics(torch.device("cpu"))
    return (torch.stack(crops).float() / 255 - mean) / std, f"{what}, {CROPS} crops of each"


def _read(path: Path) -> Tensor:
    try:
        return tvf.pil_to_tensor(decode(path.read_bytes()))
    except (OSError, BadImage) as error:
        raise UserError(f"--images {path}: {error}; give image files") from None


def _squares(image: Tensor) -> list[Tensor]:
    """The squares at both ends of the longer side, uint8 [3, s, s]."""
    side = min(image.shape[-2:])
    return [image[:, :side, :side], image[:, -side:, -side:]]


# ------------------------------------------------------------------------------------------------ tables


def compare_precisions(
    name: str, config: TeacherConfig, needs: TeacherNeeds, size: int, images: Tensor
) -> tuple[Rows, list[str]]:
    """Each precision against fp32: error and cosine of each level, top-30 % overlap of the CLS attention; and a line
    for each precision that this machine refuses.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def targets(precision: str) -> Targets:
        quantise.check(name, precision, device)
        configs = {name: config.model_copy(update={"precision": precision, "compile": False})}
        ensemble = TeacherEnsemble(configs, build_skeletons(configs, size), {name: needs}, size, device)
        return ensemble(images.to(device))[name]

    reference = targets("fp32")
    label = "random initialisation" if config.random else "trained weights"
    overlap = (f"top-{SHARE:.0%} overlap",) if needs.cls_attention else ()
    columns = ["precision", "level", "error", "mean cosine", "min cosine", *overlap]
    rows, refused = [], []
    for precision in PRECISIONS:
        if precision == "fp32":
            continue
        try:
            ours = targets(precision)
        except UserError as error:
            refused.append(str(error))
            continue
        for number, level in enumerate(needs.levels):
            rows.append([precision if number == 0 else "", *_row(ours, reference, level, first=number == 0)])
    title = f"compared with fp32, {len(images)} images, {label}, on {device.type}"
    return (title, columns, rows), refused


def _row(ours: Targets, reference: Targets, level: int, first: bool) -> list[str]:
    theirs = reference.levels[level]
    mean, low = cosine(ours.levels[level], theirs)
    row = [str(level), f"{relative_error(ours.levels[level], theirs):.2g}", f"{mean:.6f}", f"{low:.6f}"]
    if first and ours.cls_attention is not None and reference.cls_attention is not None:
        row.append(f"{top_overlap(ours.cls_attention, reference.cls_attention, SHARE):.3f}")
    return row


def grids(info: TeacherInfo) -> Rows:
    """The image_size of the teacher that gives the grid of a student."""
    patch, rows = info.image_size // info.grid[0], []
    for student in STUDENT_PATCHES:
        sizes = (f"{size // student * patch} ({size // student}x{size // student})" if size % student == 0 else "-"
                 for size in STUDENT_SIZES)  # fmt: skip
        rows.append([f"patch {student}", *sizes])
    columns = ["student", *(f"{size} px" for size in STUDENT_SIZES)]
    return f"image_size of this patch-{patch} teacher, by student", columns, rows
