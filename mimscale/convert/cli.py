"""`mimscale convert SOURCE OUT --to WHAT`: official checkpoints <-> ours <-> timm, each with an equality check."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mimscale.config.recipes import load_recipe
from mimscale.convert import check, full_state, timm_export
from mimscale.convert.names import State, same
from mimscale.convert.registry import encoder_of, families, of_run, of_state
from mimscale.convert.source import Loaded, read
from mimscale.convert.student import Student, student_of
from mimscale.convert.whole import method_from
from mimscale.convert.write import report_path, write
from mimscale.errors import UserError
from mimscale.models.convvit import ConvViT

TO = """timm: the student, as timm.create_model(..., checkpoint_path=OUT) loads it; student: the student as it is;
mimscale: everything, decoder and heads too, under our names; official: under the names of the method's own code, or of
the family named (%s); state: a folder with weights, moments, step and recipe, to keep or to share; run: such a folder
back into a run folder"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="run folder, checkpoint folder, or a file (.pth, .safetensors)")
    parser.add_argument("out", type=Path, help="file or folder to write; it must not exist")
    kinds = (*TARGETS, *full_state.TARGETS, "official", *families())
    parser.add_argument("--to", required=True, choices=kinds, metavar="WHAT", help=TO % ", ".join(families()))
    parser.add_argument("--recipe", help="with --to mimscale: the recipe that a whole official file belongs to")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a value of --recipe")
    parser.add_argument("--heads", type=int, help="attention heads of an official file of an unusual size")
    parser.add_argument("--ema", action="store_true", help="the exponential moving average of the student's weights")
    parser.add_argument("--with-head", action="store_true", help="with --to timm: a classifier's head too")


def run(args: argparse.Namespace) -> int:
    for path in (args.out, report_path(args.out)):
        if path.exists():
            raise UserError(f"{path} exists; choose another name")
    if args.to in full_state.TARGETS:
        if args.ema:
            raise UserError(f"--ema: --to {args.to} keeps trained weights and moving average; leave --ema out")
        lines = full_state.TARGETS[args.to](args.source, args.out)
    else:
        lines = TARGETS.get(args.to, _to_official)(args, read(args.source, args.ema))
    print(*lines, f"wrote {args.out}", sep="\n")
    return 0


def _to_timm(args: argparse.Namespace, loaded: Loaded) -> list[str]:
    vit, info = student_of(loaded, heads=args.heads)
    if isinstance(vit, ConvViT):
        raise UserError(f"{args.source} holds ConvMAE's encoder, which timm does not have; choose --to student")
    notes = []
    if args.with_head:
        if "head.weight" not in loaded.weights or "student.mask_token" in loaded.weights:
            raise UserError(f"--with-head: {args.source} holds no classifier; leave it out")
        weights = timm_export.with_head(vit.state_dict(), loaded.weights)
    else:
        weights = timm_export.to_timm(vit.state_dict())
        if not info.final_norm:
            notes.append("filled in: a last norm of weight 1 and bias 0; the method trains none")
    weights = timm_export.for_this_timm(vit, weights)
    name, options = timm_export.call(vit, weights)

    def compare(part: Path, back: State) -> check.Differences:
        return check.timm_differences(vit, back, part)

    found = write(
        args.out, loaded, args.to, weights, _about(vit), compare, notes, timm={"model": name, "options": options}
    )
    given = "".join(f", {key}={value!r}" for key, value in options.items())
    return [*notes, f"timm.create_model('{name}'{given}, checkpoint_path='{args.out}')", *_lines(found)]


def _to_student(args: argparse.Namespace, loaded: Loaded) -> list[str]:
    vit, _ = student_of(loaded, heads=args.heads)
    return _lines(write(args.out, loaded, args.to, vit.state_dict(), _about(vit), _encoder_check(vit)))


def _to_ours(args: argparse.Namespace, loaded: Loaded) -> list[str]:
    if loaded.run is None and args.recipe:
        return _whole_to_ours(args, loaded)
    if args.recipe:
        raise UserError(f"{args.source} is a checkpoint of ours and knows its recipe; leave out --recipe")
    vit, _ = student_of(loaded, heads=args.heads)
    if loaded.run is not None:
        carried = {"run": loaded.run.dump()}
        return _lines(write(args.out, loaded, args.to, loaded.weights, carried, _encoder_check(vit)))
    family = of_state(loaded.weights)
    if family and any(name.startswith(families()[family].WHOLE) for name in loaded.weights):
        raise UserError(
            f"--recipe is missing: {args.source} is a whole model and --to mimscale has to know its method and sizes, "
            "e.g. mae_vit_l16; its encoder alone goes --to student"
        )
    weights = {f"student.{name}": tensor for name, tensor in vit.state_dict().items()}
    return _lines(write(args.out, loaded, args.to, weights, _about(vit), _encoder_check(vit)))


def _whole_to_ours(args: argparse.Namespace, loaded: Loaded) -> list[str]:
    recipe = load_recipe(args.recipe, args.set)
    method, notes = method_from(loaded, recipe)

    def compare(part: Path, back: State) -> check.Differences:
        return check.method_differences(method, back)

    carried = {"run": recipe.dump()}
    return [*notes, *_lines(write(args.out, loaded, args.to, method.state_dict(), carried, compare, notes))]


def _to_official(args: argparse.Namespace, loaded: Loaded) -> list[str]:
    recipe = loaded.run
    if recipe is None:
        raise UserError(f"{args.source} is not a checkpoint of ours; --to {args.to} reads run folders and our files")
    name = of_run(recipe, loaded.weights) if args.to == "official" else args.to
    family = families()[name]
    if not family.fits(loaded.weights):
        raise UserError(f"method.name = {recipe.method.name} has parts that {name} has no names for; choose --to timm")
    mapped = family.to_official(loaded.weights, recipe)

    def compare(part: Path, back: State) -> check.Differences:
        method, _ = method_from(Loaded(part, back), recipe)
        again = method.state_dict()
        if not same(again, loaded.weights):
            raise RuntimeError(f"the names of {name} do not map back to the same weights")
        return check.method_differences(method, loaded.weights)

    found = write(args.out, loaded, name, mapped.weights, {}, compare, mapped.notes)
    return [*mapped.notes, *_lines(found), "checked: mapped back, every tensor is the same"]


def _encoder_check(vit: Student) -> Any:
    return lambda part, back: {"encoder": check.encoder_difference(vit, encoder_of(back))}


def _about(vit: Student) -> dict[str, Any]:
    """What a file of a student alone says of itself: weights tell neither the heads nor the drop path."""
    return {"student": vit.config.model_dump(mode="json"), "image_size": vit.grid[0] * vit.config.patch}


def _lines(found: check.Differences) -> list[str]:
    return [
        f"checked on random input: {name} differs by {value:.1e} of the largest output (limit {check.LIMIT:.0e})"
        for name, value in found.items()
    ]


TARGETS = {"timm": _to_timm, "student": _to_student, "mimscale": _to_ours}
