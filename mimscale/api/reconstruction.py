"""`mimscale.reconstruct`: masked images, and what a pre-trained method predicts for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mimscale.api import arguments
from mimscale.api.images import Images, normalised_batch
from mimscale.api.overrides import as_words
from mimscale.config.recipes import load_recipe, validate
from mimscale.config.run import RunConfig, method_class
from mimscale.convert.networks import load, method_from
from mimscale.convert.read import read
from mimscale.errors import UserError
from mimscale.methods.base import MaskedConfig, MaskedMethod, masking_class
from mimscale.monitoring.panels import GREY
from mimscale.teachers.ensemble import build_skeleton
from mimscale.types import IMAGENET_MEAN, IMAGENET_STD, Batch, TeacherInfo

PIXEL_METHODS = "mae, mff, pixmim, convmae, simmim and mrmae"


class Reconstruction(NamedTuple):
    """B images in host memory, float32 [B, 3, H, W] in 0..1, and their masks.

    input: as the network got them.  masked: grey where a patch is masked.  reconstruction: every patch as predicted,
    though training asks for the masked ones only.  pasted: predicted where masked, true elsewhere.  mask: [B, L], 1 =
    masked, patches in raster order.
    """

    input: Tensor
    masked: Tensor
    reconstruction: Tensor
    pasted: Tensor
    mask: Tensor


def reconstruct(
    path: str | Path,
    images: Images,
    *,
    mask_ratio: float | None = None,
    seed: int = 0,
    recipe: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    ema: bool = False,
    device: str | torch.device | None = None,
) -> Reconstruction:
    """Mask images at random and predict their pixels: MAE, MFF, PixMIM, ConvMAE, SimMIM, and the pixel branch of
    MR-MAE.

    path: a run folder (its newest checkpoint), a checkpoint folder, a file of `mimscale convert --to mimscale`, or a
        whole official file, decoder included.
    images: a list of Pillow images; uint8 [B, 3, H, W]; or float [B, 3, image_size, image_size], ImageNet-normalised.
        Sizes as `mimscale.load_encoder` takes them.
    mask_ratio: share of the patches that is masked; None: so many are seen as in training. Masks are uniform, whatever
        the policy of the run was, so no teacher is needed.
    seed: of the masks; an image's mask depends on it and on the image's place in the batch.
    recipe: of an official file, which names neither its method nor its sizes, such as mae_vit_l16.
    overrides: "section.key" -> value for that recipe, as in `mimscale.train`.
    ema: the exponential moving average of the student. device: None is the CPU.

    With `norm_pix_loss` a patch is predicted up to its mean and contrast only, and these are taken from the image.
    Raises mimscale.UserError, also for a method without pixels.

    >>> import mimscale, torch
    >>> images = torch.randint(256, (2, 3, 48, 48), dtype=torch.uint8)
    >>> input, masked, predicted, pasted, mask = mimscale.reconstruct("runs/first", images, mask_ratio=0.5)
    >>> predicted.shape, mask.sum(dim=1).tolist()
    (torch.Size([2, 3, 48, 48]), [18.0, 18.0])
    """
    place, ema, target = arguments.path("path", path), arguments.flag("ema", ema), arguments.device(device)
    name = None if recipe is None else arguments.path("recipe", recipe)
    method, config = load_method(place, name, as_words(overrides or {}), mask_ratio, ema)
    return reconstruct_with(method, config, images, seed, target)


def reconstruct_with(
    method: MaskedMethod, config: RunConfig, images: Images, seed: int, device: torch.device
) -> Reconstruction:
    """What `reconstruct` returns, for a method of `load_method`. Raises UserError."""
    seed = arguments.whole_number("seed", seed, *arguments.SEEDS)
    pixels = normalised_batch(images, config.data.image_size, IMAGENET_MEAN, IMAGENET_STD, device)
    view = method.to(device).view(_batch(pixels, method, seed), {})
    assert view is not None and view.mask is not None and view.reconstruction is not None
    patch = config.student.patch
    hidden = F.interpolate(view.mask.float().view(-1, 1, *config.grid), scale_factor=patch, mode="nearest")
    seen = view.images * (1 - hidden)
    pasted = seen + view.reconstruction * hidden
    parts = (view.images, seen + GREY * hidden, view.reconstruction, pasted, view.mask)
    return Reconstruction(*(part.float().cpu() for part in parts))


def load_method(
    path: Path, recipe: str | Path | None, overrides: Sequence[str], mask_ratio: float | None, ema: bool
) -> tuple[MaskedMethod, RunConfig]:
    """The method with its weights, in eval mode and frozen, with uniform masks; and its configuration.

    overrides: section.key=value, of `recipe`. Raises UserError.
    """
    if mask_ratio is not None:
        mask_ratio = arguments.fraction("mask_ratio", mask_ratio, "0.75 is MAE's")
    if overrides and recipe is None:
        raise UserError(
            f"{overrides[0].partition('=')[0]} is a change to a recipe, and none is given; name the recipe of an "
            f"official file, or leave the change out: a checkpoint of ours is as it was trained"
        )
    loaded = read(path, ema)
    if loaded.run is not None and recipe is not None:
        raise UserError(f"{path} is a checkpoint of ours and knows its recipe; leave recipe out")
    if loaded.run is None and recipe is None:
        raise UserError(
            f"{path} does not say its method and sizes; give the recipe that it belongs to, such as mae_vit_l16"
        )
    config = loaded.run or load_recipe(str(recipe), overrides)
    kind = method_class(config.method.name)
    if not getattr(kind, "predicts_masked", False):
        raise UserError(f"{path}: {config.method.name} predicts no pixels; {PIXEL_METHODS} do")
    config, teachers = _with_uniform_masks(config, kind, str(path), mask_ratio)
    if loaded.run is None:
        method, _ = method_from(loaded, config)
    else:
        method = kind(config, teachers)
        load(method, loaded.weights, loaded.path)
    return cast(MaskedMethod, method.eval().requires_grad_(False)), config


def _with_uniform_masks(
    config: RunConfig, kind: type[MaskedMethod], source: str, mask_ratio: float | None
) -> tuple[RunConfig, dict[str, TeacherInfo]]:
    """The configuration with masking by `random`, and what is known of the teachers that its loss still reads."""
    section = cast(MaskedConfig, config.method).masking
    counts = masking_class(cast(MaskedConfig, config.method)).counts(section, config)
    ratio = mask_ratio or 1 - (counts.visible + 0.5) / counts.units  # half a unit: whichever way a policy rounds
    known = {name: build_skeleton(name, one, config.data.image_size).info for name, one in config.teachers.items()}
    read = kind.teacher_needs(config, known)
    values = config.dump()
    values["teachers"] = {name: one for name, one in values["teachers"].items() if name in read}
    values["method"]["masking"] = {"policy": "random", "ratio": ratio, "unit": section.unit}
    return validate(values, source), {name: info for name, info in known.items() if name in read}


def _batch(pixels_B3HW: Tensor, method: MaskedMethod, seed: int) -> Batch:
    """The images as the loader would hand them over; drawn is what the masks need, one row after the other."""
    count, device = len(pixels_B3HW), pixels_B3HW.device
    generator = torch.Generator().manual_seed(seed)
    wanted = method.masking.needs.noise
    drawn = {name: torch.rand(count, *noise.shape, generator=generator) for name, noise in wanted.items()}
    places = torch.arange(count)
    nothing = torch.zeros(count, dtype=torch.bool)
    whole_image = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(count, 4)
    return Batch(pixels_B3HW, places, places, drawn, whole_image, nothing).to(device)
