"""`mimscale convert SOURCE OUT --to WHAT`: official checkpoints <-> ours <-> timm, transformers; compared first."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mimscale.config.recipes import load_recipe
from mimscale.convert import check, difference, full_state, hub_folder, hub_timm, hub_transformers, push
from mimscale.convert.difference import Differences
from mimscale.convert.formats.base import encoder_of, formats, official_format
from mimscale.convert.hub_transformers import LIBRARY
from mimscale.convert.names import State, same
from mimscale.convert.networks import Student, is_whole_model, method_from, student_of
from mimscale.convert.read import Loaded, read
from mimscale.convert.write import Check, report_path, write
from mimscale.errors import UserError
from mimscale.files.atomic import remove_leftovers
from mimscale.files.command_line import end_with_example
from mimscale.files.progress import working

TO = """what --to makes:
  timm, huggingface
             a folder that timm or transformers loads, with a model card
  student    the student, our names
  mimscale   everything, decoder and heads too, under our names
  official   everything under the names of the method's official code; or name
             a format: %s
  state      a folder with weights, optimiser moments, step and recipe
  run        a run folder made of such a folder

"""


HUB = ("timm", "huggingface")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", type=Path, metavar="SOURCE", help="run folder, checkpoint folder, .pth or .safetensors"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="file or folder to write; it must not exist")
    names = [name for name in formats() if name not in (*TARGETS, LIBRARY)]  # that one goes by folders
    kinds = (*TARGETS, *full_state.TARGETS, "official", *names)
    parser.add_argument("--to", required=True, choices=kinds, metavar="WHAT", help="see below")
    parser.add_argument("--recipe", metavar="RECIPE", help="with --to mimscale: that of a whole official file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a value of --recipe")
    parser.add_argument("--heads", type=int, metavar="N", help="attention heads of an official file of an unusual size")
    parser.add_argument("--ema", action="store_true", help="the exponential moving average of the student's weights")
    hub = parser.add_argument_group("with --to timm or huggingface")
    hub.add_argument(
        "--with-head", action="store_true", help="a classifier's head, or MAE's decoder (huggingface), too"
    )
    hub.add_argument("--dtype", choices=tuple(hub_folder.FLOATS), default="float32", help="of the weights (float32)")
    hub.add_argument("--push", metavar="ORG/NAME", help="upload the folder to this repository of the Hugging Face Hub")
    hub.add_argument("--private", action="store_true", help="with --push: make the repository private")
    end_with_example(
        parser,
        "mimscale convert runs/l16 vit_l16-timm --to timm",
        "mimscale convert runs/l16 vit_l16 --to huggingface --push ORG/vit_l16 --private",
        "mimscale convert official_vit_l16.pth ours.safetensors --to mimscale --recipe mae_vit_l16",
        before=TO % ", ".join(names),
    )


def run(args: argparse.Namespace) -> int:
    _refuse_hub_options(args)
    for path in (args.out,) if args.to in HUB else (args.out, report_path(args.out)):
        if path.exists():
            raise UserError(f"{path} exists; choose another name")
    if args.to in full_state.TARGETS and args.ema:
        raise UserError(f"--ema: --to {args.to} keeps trained weights and moving average; leave --ema out")
    try:
        if args.out.parent.is_dir():
            remove_leftovers(args.out.parent)
        with working("converting"):
            if args.to in full_state.TARGETS:
                lines = full_state.TARGETS[args.to](args.source, args.out)
            else:
                loaded = read(args.source, args.ema)
                lines = [*loaded.notes, *TARGETS.get(args.to, _to_official)(args, loaded)]
    except OSError as error:
        raise UserError(
            f"{error.filename or args.out} cannot be used: {error.strerror or error}; make room, or check both paths"
        ) from error
    print(*lines, f"wrote {args.out}", sep="\n")
    if args.push:
        print(f"pushed to {push.push(args.out, args.push, args.private)}")
    return 0


def _refuse_hub_options(args: argparse.Namespace) -> None:
    """Options that --to does not know, and a --push that cannot be."""
    given = {"--with-head": args.with_head, "--dtype": args.dtype != "float32", "--push": args.push}
    for option, set_ in given.items():
        if set_ and args.to not in HUB:
            raise UserError(f"{option}: --to {args.to} does not have it; {' and '.join(HUB)} do")
    if args.private and not args.push:
        raise UserError("--private says how --push creates a repository; give --push ORG/NAME, or leave it out")
    if args.push:
        push.check(args.push)


def _to_hub(args: argparse.Namespace, loaded: Loaded) -> list[str]:
    """A folder of timm or transformers."""
    loaded, notes = hub_folder.rounded(loaded, args.dtype)
    vit, info = student_of(loaded, heads=args.heads)
    module = hub_timm if args.to == "timm" else hub_transformers
    model = module.model_of(loaded, vit, info, args.with_head)
    return [*notes, *hub_folder.write_folder(args.out, loaded, vit, args.to, model, args.dtype)]


def _to_student(args: argparse.Namespace, loaded: Loaded) -> list[str]:
    vit, _ = student_of(loaded, heads=args.heads)
    return difference.lines(write(args.out, loaded, args.to, vit.state_dict(), _sizes(vit), _encoder_check(vit)))


def _to_ours(args: argparse.Namespace, loaded: Loaded) -> list[str]:
    if loaded.run is None and args.recipe:
        return _whole_to_ours(args, loaded)
    if args.recipe:
        raise UserError(f"{args.source} is a checkpoint of ours and knows its recipe; leave out --recipe")
    vit, _ = student_of(loaded, heads=args.heads)
    if loaded.run is not None:
        carried = {"run": loaded.run.dump()}
        return difference.lines(write(args.out, loaded, args.to, loaded.weights, carried, _encoder_check(vit)))
    if is_whole_model(loaded.weights):
        raise UserError(
            f"--recipe is missing: {args.source} is a whole model and --to mimscale has to know its method and sizes, "
            "e.g. mae_vit_l16; its encoder alone goes --to student"
        )
    weights = {f"student.{name}": tensor for name, tensor in vit.state_dict().items()}
    return difference.lines(write(args.out, loaded, args.to, weights, _sizes(vit), _encoder_check(vit)))


def _whole_to_ours(args: argparse.Namespace, loaded: Loaded) -> list[str]:
    recipe = load_recipe(args.recipe, args.set)
    method, notes = method_from(loaded, recipe)

    def compare(part: Path, back: State) -> Differences:
        return check.method_differences(method, back)

    carried = {"run": recipe.dump()}
    return [*notes, *difference.lines(write(args.out, loaded, args.to, method.state_dict(), carried, compare, notes))]


def _to_official(args: argparse.Namespace, loaded: Loaded) -> list[str]:
    recipe = loaded.run
    if recipe is None:
        raise UserError(f"{args.source} is not a checkpoint of ours; --to {args.to} reads run folders and our files")
    name = official_format(recipe, loaded.weights) if args.to == "official" else args.to
    names = formats()[name]
    if not names.fits(loaded.weights):
        raise UserError(f"method.name = {recipe.method.name} has parts that {name} has no names for; choose --to timm")
    mapped = names.to_official(loaded.weights, recipe)

    def compare(part: Path, back: State) -> Differences:
        method, _ = method_from(Loaded(part, back), recipe)
        again = method.state_dict()
        if not same(again, loaded.weights):
            raise RuntimeError(f"the names of the format {name} do not map back to the same weights")
        return check.method_differences(method, loaded.weights)

    found = write(args.out, loaded, name, mapped.weights, {}, compare, mapped.notes)
    return [*mapped.notes, *difference.lines(found), "checked: mapped back, every tensor is the same"]


def _encoder_check(vit: Student) -> Check:
    return lambda part, back: {"encoder": check.encoder_difference(vit, encoder_of(back))}


def _sizes(vit: Student) -> dict[str, Any]:
    """Metadata for a file of a student alone: its tensors determine neither the heads nor the drop path."""
    return {"student": vit.config.model_dump(mode="json"), "image_size": vit.grid[0] * vit.config.patch}


TARGETS = {"timm": _to_hub, "huggingface": _to_hub, "student": _to_student, "mimscale": _to_ours}
