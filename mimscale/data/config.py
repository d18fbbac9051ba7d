"""The section `data` of a recipe: where the images are, and how they are decoded and cropped."""

from __future__ import annotations

import math
import re
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from mimscale.config.base import NonNegative, Strict
from mimscale.errors import without_secrets

RAND_AUGMENT = {"m": (0, 30), "n": (1, 16), "p": (0, 1), "mstd": (0, 10), "mmax": (1, 30), "inc": (0, 1)}
"""Parts of `rand_augment` and their bounds."""


def rand_augment_parts(text: str) -> list[tuple[str, float]]:
    """`rand-m9-inc1` -> [("m", 9), ("inc", 1)]. Raises ValueError."""
    first, *words = text.split("-")
    found = [re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", word) for word in words]
    parts = [(match[1], float(match[2])) for match in found if match is not None and match[1] in RAND_AUGMENT]
    whole = all(name in ("p", "mstd") or number == int(number) for name, number in parts)
    if first != "rand" or len(parts) != len(words) or len(dict(parts)) != len(parts) or not whole:
        raise ValueError(
            f"'{text}' is not understood; give rand and, once each, -m9, -n2, -p0.5, -mstd0.5, -mmax10 or -inc1, such "
            f"as rand-m9-mstd0.5-inc1"
        )
    return parts


def default_decoder() -> Literal["simplejpeg", "pillow"]:
    return "simplejpeg" if find_spec("simplejpeg") else "pillow"


class StreamConfig(Strict):
    """samples: approximate number of images in the shards; the length of an epoch, since a stream has none.

    buffer: number of encoded images in the shuffle buffer of each worker, in host memory.
    """

    samples: int = Field(ge=1)
    buffer: int = Field(1000, ge=1, le=10**8)


class DataConfig(Strict):
    """Where the images are, and how they are decoded and cropped.

    shards: a folder that holds manifest.json, or its URL: http(s)://, s3://, gs://. Or `wds:` and WebDataset shards
    that have no index (wds:/data/part-{000..127}.tar, several joined by ::), which are streamed; this is not exact, see
    docs/data.md. `stream` is required with wds: and refused otherwise. Or several data sets with weights,
    {/data/a: 0.7, /data/b: 0.3}, which are shares of the images that a run sees (see data/mixture.py).
    cache: a folder on the local disk of each node, for copies of the shards that are read next, at most cache_gib GiB.
    Required for a URL; useful for a slow shared file system. cache_gib: size of that folder at most, in GiB.
    stream: of wds: only, what shards without an index do not say.

    image_size: pixels per side of what the student gets. crop: random_resized takes a part of random area (crop_scale)
    and aspect ratio (crop_ratio). padded, the conservative crop of PixMIM and MFF, resizes the short side to
    image_size, pads crop_padding pixels by reflection on each edge and takes a random square. center: the centre crop
    of evaluation, of which crop_pct is the share of the short side; the default is that of MAE's release, 0.875 up to
    224 pixels and 1 above. crop_scale: least and largest share of the image's area. crop_ratio: least and largest width
    / height. crop_padding: pixels, of padded. crop_pct: of center; null: the default. interpolation: of the resize to
    image_size. flip: probability of a horizontal flip.

    colour_jitter: maximum change of brightness, contrast and saturation (0.3: factors from 0.7 to 1.3), applied in
    random order on the device; no published recipe in this project uses it. rand_augment: timm's RandAugment of the
    crop, such as rand-m9-mstd0.5-inc1 (m: magnitude, n: operations, p: probability of each, mstd: deviation of the
    magnitude, mmax: its limit, inc: stronger with the magnitude). random_erasing: share of images in which a rectangle
    becomes noise (docs/finetuning.md).

    decoder: decides the pixel values, so a resumed run must use the one that it was started with (see data/decode.py).
    Default: simplejpeg if it is installed. decode_short_side: larger JPEGs are decoded at a fraction of their size,
    down to a short side of this many pixels; 0 = off. reduced_decode: a JPEG whose crop is at least twice, 4 or 8 times
    as large as image_size is decoded at 1/2, 1/4 or 1/8 of its size. crops (experimental): each image is decoded once
    for this many consecutive steps, each with another crop; every crop counts as a sample.

    workers: processes of each rank that read and decode; 0: the rank itself. prefetch: batches that each worker has
    ready. streams: sequences of samples that are read side
    by side. block: samples of a sequence that are shuffled together (both: see data/order.py).
    max_damaged: a run stops when more samples than this cannot be used; default: one in 10,000, at least 10.
    """

    shards: (
        Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)]
        | dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]]
    )
    cache: Path | None = None
    cache_gib: float = Field(200.0, gt=0, le=1e9)
    image_size: int = Field(224, ge=8, le=8192)
    crop: Literal["random_resized", "padded", "center"] = "random_resized"
    crop_scale: tuple[float, float] = (0.2, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    crop_padding: int = Field(4, ge=0)
    crop_pct: float | None = Field(None, ge=0.05, le=1)
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    flip: float = Field(0.5, ge=0, le=1)
    colour_jitter: tuple[NonNegative, NonNegative, NonNegative] = (0.0, 0.0, 0.0)
    rand_augment: str | None = None
    random_erasing: float = Field(0.0, ge=0, le=1)
    workers: int = Field(8, ge=0, le=1024)
    prefetch: int = Field(2, ge=1, le=1024)
    streams: int = Field(256, ge=1, le=2**20)
    block: int = Field(8192, ge=1, le=2**31)
    decoder: Literal["simplejpeg", "pillow"] = Field(default_factory=default_decoder)
    decode_short_side: int = Field(0, ge=0, le=2**16)
    reduced_decode: bool = False
    crops: int = Field(1, ge=1, le=1024)
    max_damaged: int | None = Field(None, ge=0)
    stream: StreamConfig | None = None

    @field_validator("shards", mode="before")
    @classmethod
    def _check_weights(cls, value: Any) -> Any:
        """Here, since of a union pydantic would name the kind that was not meant."""
        if isinstance(value, list):
            raise ValueError("several data sets need weights; write {/data/a: 0.7, /data/b: 0.3}")
        for path, weight in value.items() if isinstance(value, dict) else ():
            number = math.nan
            with suppress(TypeError, ValueError):  # YAML has 1e-3 as text
                number = math.nan if isinstance(weight, bool) else float(weight)
            if not 0 < number < math.inf:
                raise ValueError(f"the weight {weight} of '{without_secrets(str(path))}' must be a number above 0")
        return value

    @field_validator("shards")
    @classmethod
    def _runs_no_shell(cls, value: str | dict[str, float]) -> str | dict[str, float]:
        places = [value] if isinstance(value, str) else list(value)
        addresses = [address for place in places for address in place.removeprefix("wds:").split("::")]
        if any(address.startswith("pipe:") for address in addresses):
            raise ValueError("pipe: no shell is run for data; give a path or an http(s), s3 or gs URL")
        return value

    @field_validator("cache", mode="before")
    @classmethod
    def _check_cache(cls, value: Any) -> Any:
        if isinstance(value, str) and not value.strip():  # a Path would be the working directory
            raise ValueError("an empty path; name a folder on the node's own disk, or set cache=null")
        return value

    @field_validator("rand_augment")
    @classmethod
    def _check_rand_augment(cls, value: str | None) -> str | None:
        for part in [] if value is None else rand_augment_parts(value):
            name, number = part
            low, high = RAND_AUGMENT[name]
            if not low <= number <= high:
                raise ValueError(f"'{value}': {name} = {number:g} must be from {low} to {high}")
        return value

    @field_validator("decoder")
    @classmethod
    def _check_installed(cls, value: str) -> str:
        if value == "simplejpeg" and default_decoder() != value:
            raise ValueError("the package is not installed; pip install simplejpeg, or start a run with pillow")
        return value

    @model_validator(mode="after")
    def _check_crop(self) -> DataConfig:
        for name, (low, high) in (("crop_scale", self.crop_scale), ("crop_ratio", self.crop_ratio)):
            if not 0 < low <= high or (name == "crop_scale" and high > 1):
                raise ValueError(f"{name} = [{low}, {high}]: must be ascending, above 0 and, for crop_scale, at most 1")
        if self.crop_padding >= self.image_size:
            raise ValueError(f"crop_padding = {self.crop_padding}: must be below image_size = {self.image_size}")
        return self

    @property
    def eval_crop_pct(self) -> float:
        """Share of the short side that the centre crop keeps."""
        return self.crop_pct or (0.875 if self.image_size <= 224 else 1.0)

    @model_validator(mode="after")
    def _check_fractions(self) -> DataConfig:
        if self.reduced_decode and (self.decode_short_side or self.decoder != "simplejpeg"):
            raise ValueError(
                "reduced_decode = true: only with decoder=simplejpeg, and with decode_short_side=0, which chooses by "
                "another rule; change these, or set reduced_decode=false"
            )
        return self

    @model_validator(mode="after")
    def _check_stream(self) -> DataConfig:
        paths = [self.shards] if isinstance(self.shards, str) else list(self.shards)
        if not paths or (isinstance(self.shards, dict) and any(path.startswith("wds:") for path in paths)):
            raise ValueError(f"shards = {self.shards}: weights need data sets with an index; see data_prep index")
        if (self.stream is not None) != paths[0].startswith("wds:"):
            fix = "set data.stream.samples to the number of images" if self.stream is None else "set stream=null"
            raise ValueError(f"shards = {self.shards}: stream is required with wds: and refused otherwise; {fix}")
        if self.stream is not None and self.cache is not None:
            raise ValueError(f"cache = {self.cache} with {self.shards}: a stream is not cached; set cache=null")
        return self
