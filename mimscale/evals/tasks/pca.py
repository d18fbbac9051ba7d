"""Patch features as colours: the same images under several checkpoints, one PNG."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mimscale.data.loader import listed_batches
from mimscale.data.manifest import Manifest
from mimscale.distributed.coordination import Coordinator
from mimscale.errors import UserError, printable
from mimscale.evals.feature_colours import colours
from mimscale.evals.launch import add_shared, on_ranks
from mimscale.evals.networks import Network
from mimscale.evals.runner import Settings, networks_of
from mimscale.files.atomic import atomic_path
from mimscale.files.command_line import end_with_example, print_json
from mimscale.types import imagenet_statistics

SUMMARY = "patch features as colours, several checkpoints side by side"
TILE, GAP, TITLE = 168, 4, 18  # pixels: side of a panel at least, between panels, height of the column titles


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shared(parser, pooled=False)
    parser.add_argument(
        "--images", type=Path, required=True, metavar="SHARDS", help="data set; its labels do not count"
    )
    parser.add_argument(
        "--samples", type=int, nargs="+", metavar="ID", help="ids of the images (default the first six)"
    )
    end_with_example(parser, "mimscale evaluate pca runs/l16 runs/h14 --images shards/val --out patches.png")


def run(args: argparse.Namespace) -> int:
    if args.out is None or args.out.suffix != ".png":
        raise UserError(f"--out {args.out or ''} must name the image to write, FILE.png")
    image = on_ranks(args, lambda settings, ranks: draw(args.runs, args.images, args.samples, settings, ranks))
    if image is None:
        return 0
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(args.out) as part:
            image.save(part, "PNG")
    except OSError as error:
        raise UserError(f"{args.out} cannot be written: {error.strerror or error}; name another with --out") from None
    if args.json:
        print_json({"out": args.out})
    else:
        print(printable(f"wrote {args.out}"))
    return 0


def draw(
    runs: Sequence[Path], shards: Path, samples: Sequence[int] | None, settings: Settings, ranks: Coordinator
) -> Image.Image:
    """A row per image: the image, then its colours under each network. One rank computes. Raises UserError."""
    return ranks.on_rank0(_draw, runs, shards, samples, settings)


def _draw(runs: Sequence[Path], shards: Path, samples: Sequence[int] | None, settings: Settings) -> Image.Image:
    manifest = Manifest.load(shards)
    chosen = range(min(6, manifest.samples)) if samples is None else samples
    outside = [number for number in chosen if not 0 <= number < manifest.samples]
    if outside or not chosen:
        raise UserError(f"--samples {outside[0] if outside else ''}: ids are 0 to {manifest.samples - 1} in {shards}")
    ids = np.array(chosen, dtype=np.int64)
    networks = networks_of(runs, ("tokens",), settings)
    networks = [network for network in networks if not network.name.startswith("raw pixels")]
    inputs = {n.image_size: _images(manifest, ids, n.image_size, settings) for n in networks}
    panels = colours([_tokens(network, inputs[network.image_size]) for network in networks])
    return grid([_pixels(inputs[networks[0].image_size]), *(panel.numpy() for panel in panels)], networks)


def _images(manifest: Manifest, ids: NDArray[np.int64], side: int, settings: Settings) -> Tensor:
    """float32 [N, 3, side, side], normalised, on the device."""
    batches = [(ids, np.ones(len(ids), dtype=np.float32))]
    (batch,) = listed_batches(manifest, side, batches, workers=0, crop_pct=settings.crop_pct)
    return batch.to(settings.device).normalised().images


def _tokens(network: Network, images: Tensor) -> Tensor:
    """float32 [N, T, D] in host memory."""
    return torch.cat([network.extract(image[None])["tokens"].cpu() for image in images])


def _pixels(images: Tensor) -> NDArray[np.float32]:
    """[N, side, side, 3] in 0 to 1."""
    mean, std = imagenet_statistics(images.device)
    return (images * std + mean).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()


def grid(columns: Sequence[NDArray[np.float32]], networks: Sequence[Network]) -> Image.Image:
    """columns: float32 [N, h, w, 3] in 0 to 1: of the images, then of each network. Patches stay squares."""
    side = max(TILE, *(column.shape[1] for column in columns))
    canvas = Image.new(
        "RGB", (len(columns) * (side + GAP) - GAP, TITLE + len(columns[0]) * (side + GAP) - GAP), "white"
    )
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default()
    for number, (column, name) in enumerate(zip(columns, ["image", *(n.name for n in networks)], strict=True)):
        pen.text((number * (side + GAP), 2), _fitting(name, pen, font, side), fill="black", font=font)
        for row, panel in enumerate(column):
            tile = Image.fromarray((panel * 255).round().astype(np.uint8))
            scale = math.ceil(side / tile.width)
            tile = tile.resize((tile.width * scale,) * 2, Image.Resampling.NEAREST).resize((side, side))
            canvas.paste(tile, (number * (side + GAP), TITLE + row * (side + GAP)))
    return canvas


def _fitting(
    text: str, pen: ImageDraw.ImageDraw, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int
) -> str:
    """The end of the text that fits: runs differ in their last words."""
    text = printable(text)
    while pen.textlength(text, font=font) > width:
        text = text[1:]
    return text
