"""What the packages hand to each other: noise, batches, targets, and what a method asks for.

Nothing here computes. Data fills a `Batch`, a teacher fills `Targets`, a masking policy fills `Masks`, a method states
its `Needs`; none of them imports the others.

Shape letters: B images of a micro-batch, L patches of the grid, K of them visible, M masked, D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@lru_cache
def imagenet_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation, float32 [1, 3, 1, 1]. Kept per device, because making them there waits for the device."""
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return mean, std


ALIGNMENT = 64  # bytes; of tensors that share a piece of memory


@dataclass(frozen=True)
class Noise:
    """Random numbers that a method wants for each sample; drawn by the loader, keyed by the sample's position.

    uniform: float32 in [0, 1).  exponential: float32, unit rate, > 0.
    """

    kind: Literal["uniform", "exponential"]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class TeacherNeeds:
    """What a loss reads of one teacher. levels: 0-based block indices, ascending."""

    levels: tuple[int, ...] = ()
    cls_attention: bool = False

    def __or__(self, other: TeacherNeeds) -> TeacherNeeds:
        """What both read."""
        levels = tuple(sorted({*self.levels, *other.levels}))
        return TeacherNeeds(levels, self.cls_attention or other.cls_attention)


@dataclass(frozen=True)
class Mixing:
    """Mixup and CutMix of pairs of images and of their labels; the pairs are the positions 2n and 2n + 1.

    mixup, cutmix: alpha of the Beta distribution that a pair's share is drawn from; 0: never.  prob: that a pair is
    mixed.  switch: the share of CutMix where both are on.  classes, smoothing: of the soft labels.
    """

    mixup: float
    cutmix: float
    prob: float
    switch: float
    classes: int
    smoothing: float


@dataclass(frozen=True)
class Needs:
    """Everything that a method wants to find in a batch and in the targets.

    uncropped_images: at how many positions of each global batch, its first ones, the uncut image is wanted as well.
    mixing: None: images are not mixed.
    """

    noise: Mapping[str, Noise] = field(default_factory=dict)
    teachers: Mapping[str, TeacherNeeds] = field(default_factory=dict)
    labels: bool = False
    uncropped_images: int = 0
    mixing: Mixing | None = None

    def __or__(self, other: Needs) -> Needs:
        """What both want; each draws its own noise."""
        names = [*self.teachers, *(name for name in other.teachers if name not in self.teachers)]
        nothing = TeacherNeeds()
        teachers = {name: self.teachers.get(name, nothing) | other.teachers.get(name, nothing) for name in names}
        uncropped_images = max(self.uncropped_images, other.uncropped_images)
        labels, mixing = self.labels or other.labels, self.mixing or other.mixing
        return Needs({**self.noise, **other.noise}, teachers, labels, uncropped_images, mixing)


class Masks(NamedTuple):
    """Which patches a student sees and which are predicted; places in the grid, in raster order, from 0.

    visible: int64 [B, K], in the order in which the student sees them.  masked: int64 [B, M].  A patch in neither is
    dropped: it is neither seen nor predicted.
    """

    visible: Tensor
    masked: Tensor


@dataclass(frozen=True)
class TeacherInfo:
    """A teacher as far as it is known without its weights. grid: (rows, columns) of its patch tokens at image_size.

    norm_attention: the norms of its patch tokens take the place of the CLS attention. resizes: its configuration may
    ask for another grid (a feature map).
    """

    name: str
    dim: int
    depth: int
    grid: tuple[int, int]
    image_size: int
    has_cls: bool
    norm_attention: bool = False
    resizes: bool = False

    @property
    def has_attention(self) -> bool:
        """Whether masks can follow it."""
        return self.has_cls or self.norm_attention


@dataclass(frozen=True)
class Targets:
    """What one teacher saw in the whole image. All without gradient, in the teacher's own precision.

    levels: block index -> patch tokens [B, L, D], the raw residual stream after that block (no final norm).
    cls: block index -> class token [B, D]; empty where the teacher has none.
    cls_attention: [B, L] float32, last block, softmax over all keys, mean over heads, the patch columns only; or, where
        the recipe says so, each patch's share of the norms of all patches.
    """

    levels: Mapping[int, Tensor]
    cls: Mapping[int, Tensor]
    cls_attention: Tensor | None = None

    def first(self, count: int) -> Targets:
        """Those of the first samples."""
        return Targets(
            {level: tokens[:count] for level, tokens in self.levels.items()},
            {level: token[:count] for level, token in self.cls.items()},
            None if self.cls_attention is None else self.cls_attention[:count],
        )


@dataclass(frozen=True)
class View:
    """What a method can show of a micro-batch to whoever watches a run; absent parts are None.

    images, reconstruction: float32 [B, 3, H, W] in 0..1.  mask: [B, L], 1 = masked.  attention: [B, L], any scale.
    dropped: [B, L], 1 = neither seen nor predicted.  features: [B, L, D], the student's tokens of the whole images;
    student_attention: [B, L], of its last block.  attention: what the masks were drawn by.
    """

    images: Tensor
    mask: Tensor | None = None
    reconstruction: Tensor | None = None
    attention: Tensor | None = None
    dropped: Tensor | None = None
    features: Tensor | None = None
    student_attention: Tensor | None = None


@dataclass(frozen=True)
class Damage:
    """A sample that could not be used: its id, the name of its shard, its key in there, and why."""

    sample: int
    shard: str
    key: str
    reason: str


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank.

    images: uint8 [B, 3, H, W] out of the loader, where colours are next to each other in memory (channels_last);
        float32, contiguous, ImageNet-normalised, after `normalised()`.
    ids: int64 [B], row of the sample in the manifest (in a stream: 63 bits of a hash of shard and key).
    positions: int64 [B], place in the endless training sequence (or in the evaluation order).
    noise: purpose -> float32 [B, *shape], as `Needs.noise` asked; and what the augmentations draw (mimscale/data).
    boxes: float32 [B, 4], crop (top, left, height, width) as fractions of the stored image; a padded crop may reach a
        little outside of it.
    flips: bool [B], mirrored left-right after the crop.
    labels: int64 [B] where asked, else None.
    soft_labels: float32 [B, classes], class probabilities of images that were mixed on the device; else None.
    partners: int64 [B], out of the loader where images are mixed: the row of the image that each is mixed with. Rows
        behind those of the micro-batch are there as partners only; None on the device.
    uncropped: uint8 [F, 3, H, W], the whole images of the rows `uncropped_rows`, int64 [F], resized to the same size,
        neither cropped nor mirrored nor normalised. None where not asked; F may be 0.
    importance: uint8 [B, L], what a masking policy that learns has stored of these samples' patches; None else.
    weights: float32 [B] in evaluation, 1, or 0 for what fills a batch up and must not count; None in training.
    damage: what could not be used when this batch was made; `ids` has what was taken instead.
    """

    images: Tensor
    ids: Tensor
    positions: Tensor
    noise: Mapping[str, Tensor]
    boxes: Tensor
    flips: Tensor
    labels: Tensor | None = None
    soft_labels: Tensor | None = None
    partners: Tensor | None = None
    uncropped: Tensor | None = None
    uncropped_rows: Tensor | None = None
    importance: Tensor | None = None
    weights: Tensor | None = None
    damage: tuple[Damage, ...] = ()

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device; copies do not block the host where the memory is pinned."""
        return self._in_pieces(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same batch in pinned memory; nothing is copied that is there already."""
        return self._in_pieces(Tensor.pin_memory)

    def first(self, count: int) -> Batch:
        """The first samples, without the whole images."""
        return replace(self, uncropped=None, uncropped_rows=None)._each(lambda tensor: tensor[:count])

    def _in_pieces(self, move: Callable[[Tensor], Tensor]) -> Batch:
        """The batch, moved. Tensors in one piece of memory, as in a slot of the loader, are moved by one copy."""
        spans: dict[int, tuple[int, int]] = {}  # address of a piece -> its bytes that are used
        pieces: dict[int, tuple[Tensor, int]] = {}  # address of a piece -> where these are now, and their first

        def note(tensor: Tensor) -> Tensor:
            if tensor.numel() and not tensor.is_meta:
                address, (start, end) = tensor.untyped_storage().data_ptr(), bytes_of(tensor)
                low, high = spans.get(address, (start, end))
                spans[address] = min(low, start), max(high, end)
            return tensor

        def moved(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            address = 0 if tensor.is_meta else storage.data_ptr()
            if address not in spans or (tensor.numel() and spans[address] == bytes_of(tensor)):
                return move(tensor)
            if address not in pieces:
                start, end = spans[address]
                start -= start % ALIGNMENT
                used = torch.empty(0, dtype=torch.uint8, device=tensor.device)
                pieces[address] = move(used.set_(storage, start, (end - start,), (1,))), start
            piece, start = pieces[address]
            there = piece.untyped_storage()
            if there.data_ptr() == address:  # it was there already
                return tensor
            offset = tensor.storage_offset() - start // tensor.element_size() if tensor.numel() else 0
            view = torch.empty(0, dtype=tensor.dtype, device=piece.device)
            return view.set_(there, offset, tensor.size(), tensor.stride())

        return self._each(note)._each(moved)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        values: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **values, noise={purpose: change(tensor) for purpose, tensor in self.noise.items()})

    def normalised(self) -> Batch:
        """uint8 -> float32 with ImageNet's mean and deviation, on the device where the batch is."""
        return replace(self, images=normalised(self.images))


def bytes_of(tensor: Tensor) -> tuple[int, int]:
    """First byte of its storage that a tensor uses, and the one after the last; the tensor must not be empty."""
    first = int(tensor.storage_offset())
    last = first + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return first * tensor.element_size(), (last + 1) * tensor.element_size()


def normalised(images_B3HW: Tensor) -> Tensor:
    """uint8, in any memory format -> float32, contiguous, with ImageNet's mean and deviation."""
    mean, std = imagenet_statistics(images_B3HW.device)
    return (in_float(images_B3HW) / 255 - mean) / std


def in_float(images_B3HW: Tensor) -> Tensor:
    """uint8, in any memory format -> float32, contiguous: later sums have one order, whatever the loader's was."""
    return images_B3HW.to(torch.float32, memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class StepInfo:
    """One optimiser step, as hooks are told of it.

    step: how many were taken or skipped, with this one.  total: of the run.
    skipped: whether the weights were left alone, because the loss or a gradient was not finite, or the loss spiked.
    scalars: what the method returned for each micro-batch of this rank, fp32 0-dim tensors on the device.
    batch, targets: the last micro-batch of this rank, on the device.
    parameters: name prefix -> (name, whole value) of the method's parameters as the next forward pass will use them;
        every rank must take all of them, see `mimscale.engine.base.Engine.parameters`.
    """

    step: int
    total: int
    skipped: bool
    scalars: tuple[Mapping[str, Tensor], ...]
    batch: Batch
    targets: Mapping[str, Targets]
    parameters: Callable[[str], Iterator[tuple[str, Tensor]]]

    @property
    def loss(self) -> Tensor:
        """Mean over this rank's micro-batches, fp32 scalar on the device."""
        return torch.stack([scalars["loss"] for scalars in self.scalars]).mean()


@dataclass(frozen=True)
class PrefetchedBatch:
    """A batch as the loader made it, and its copy on the device, normalised.

    ready: when the copy is whole; None where nothing runs beside the host.
    """

    raw: Batch
    copy: Batch
    ready: torch.cuda.Event | None = None

    def take(self) -> Batch:
        """The copy, for work in the current stream."""
        if self.ready is not None:
            stream = torch.cuda.current_stream(self.copy.images.device)
            stream.wait_event(self.ready)
            keep_for(stream, self.copy)
        return self.copy


def keep_for(stream: torch.cuda.Stream, *records: Batch | Targets) -> None:
    """Whoever drops these tensors, their memory is not given away while the stream may still read them."""
    for value in (value for record in records for value in vars(record).values()):
        for tensor in value.values() if isinstance(value, Mapping) else [value]:
            if isinstance(tensor, Tensor) and tensor.is_cuda:
                tensor.record_stream(stream)
