"""`mimscale reconstruct SOURCE IMAGE... OUT.png`: masked images and their reconstructions in one image."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mimscale.api.reconstruction import Reconstruction, load_method, reconstruct_with
from mimscale.data.decode import BadImage, decode
from mimscale.errors import UserError
from mimscale.files.atomic import atomic_path
from mimscale.files.command_line import end_with_example
from mimscale.files.progress import working

COLUMNS = ("input", "masked", "reconstruction", "visible patches true")
SMALLEST, GAP, TITLE = 160, 4, 18  # pixels: smaller images are enlarged; between images; height of the column titles


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", type=Path, metavar="SOURCE", help="run or checkpoint folder or file, with its decoder"
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files")
    parser.add_argument("out", type=Path, metavar="OUT.png", help="image to write; it must not exist")
    parser.add_argument("--mask-ratio", type=float, metavar="R", help="share of patches masked (default: as trained)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed of the masks (default 0)")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="masks, and so rows, per image (default 1)")
    parser.add_argument("--recipe", metavar="RECIPE", help="of an official file, such as mae_vit_l16")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a value of --recipe")
    parser.add_argument("--ema", action="store_true", help="the exponential moving average of the student's weights")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    end_with_example(
        parser,
        "mimscale reconstruct runs/l16 cat.jpg dog.jpg rows.png",
        "mimscale reconstruct mae_visualize_vit_large.pth cat.jpg rows.png --recipe mae_vit_l16",
    )


def run(args: argparse.Namespace) -> int:
    if args.out.suffix != ".png":
        raise UserError(f"{args.out} must end in .png: the last name is the image to write")
    if args.out.exists():
        raise UserError(f"{args.out} exists; choose another name")
    if args.samples < 1:
        raise UserError(f"--samples {args.samples} must be 1 or more")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu")
    images = [image for path in args.images for image in [_opened(path)] * args.samples]
    with working("reconstructing"):
        method, config = load_method(args.source, args.recipe, args.set, args.mask_ratio, args.ema)
        found = reconstruct_with(method, config, images, args.seed, torch.device(args.device))
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(args.out) as part:
            rows_of(found).save(part)
    except OSError as error:
        raise UserError(f"{args.out} cannot be written: {error.strerror or error}; name another file") from None
    masked = int(found.mask[0].sum())
    print(
        f"{masked} of {found.mask.shape[1]} patches masked, uniformly, seed {args.seed}", f"wrote {args.out}", sep="\n"
    )
    return 0


def rows_of(found: Reconstruction) -> Image.Image:
    """One row per image: the columns of COLUMNS, each under its title, on white."""
    parts = (found.input, found.masked, found.reconstruction, found.pasted)
    tiles = torch.stack(parts, dim=1)
    rows, columns, side = tiles.shape[0], tiles.shape[1], tiles.shape[-1]
    scale = max(1, math.ceil(SMALLEST / side))
    step = side * scale + GAP
    canvas = Image.new("RGB", (columns * step - GAP, TITLE + rows * step - GAP), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default()
    for column, title in enumerate(COLUMNS):
        pen.text((column * step, 2), title, fill="black", font=font)
        for row in range(rows):
            tile = Image.fromarray(_array(tiles[row, column])).resize((side * scale,) * 2, Image.Resampling.NEAREST)
            canvas.paste(tile, (column * step, TITLE + row * step))
    return canvas


def _array(image_3HW: Tensor) -> NDArray[np.uint8]:
    return (image_3HW.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def _opened(path: Path) -> Image.Image:
    try:
        return decode(path.read_bytes())
    except (OSError, BadImage) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"image {path} cannot be read ({reason})") from None
