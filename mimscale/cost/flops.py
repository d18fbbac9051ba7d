"""FLOPs of one image, by part, for any method: of the model itself, so that MFU does not depend on how it is computed.

Counted on the real modules without memory (`mimscale.cost.trace`): products, convolutions and attention, a multiply and
an add as 2; no softmax, norm or activation. Trained parts count three times their forward pass (forward, gradient of
the input, gradient of the weights), frozen parts and teachers once; recomputation (activation checkpointing) stands
apart and does not count for MFU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mimscale.config.run import RunConfig
from mimscale.cost.trace import Shapes, Trace, build, total, trace
from mimscale.teachers.base import Teacher

Precision = Literal["fp32", "bf16", "fp16"]
COUNTED_IMAGES = 4
"""FLOPs are proportional to the images, so that a few are enough to count."""


@dataclass(frozen=True)
class Flops:
    """FLOPs per image.

    forward: forward pass of the method by part: `student`, `decoder`, heads and what else the method has as children;
    `other` is what happens in none of them. teachers: forward pass by teacher. uncropped: what a masking policy that
    learns (AMT) passes through the student besides, averaged over all images. recompute: forward passes that
    activation checkpointing repeats. frozen: the parts of `forward` that have nothing to train.
    """

    forward: Mapping[str, float]
    teachers: Mapping[str, float]
    uncropped: float
    recompute: float
    frozen: frozenset[str] = frozenset()

    @property
    def trained(self) -> float:
        """The method's training: 3 x forward, but for what is frozen."""
        return sum(self._of(part) for part in self.forward)

    def _of(self, part: str) -> float:
        return (1 if part in self.frozen else 3) * self.forward[part]

    @property
    def teacher(self) -> float:
        """All teachers' forward passes."""
        return sum(self.teachers.values())

    @property
    def training(self) -> float:
        """What one image of training costs: the numerator of MFU."""
        return self.trained + self.teacher + self.uncropped

    @property
    def executed(self) -> float:
        """With what is recomputed."""
        return self.training + self.recompute

    @property
    def teacher_share(self) -> float:
        return (self.teacher + self.uncropped) / self.training

    def by_part(self) -> dict[str, float]:
        """FLOPs of training by part, without recomputation; they sum to `training`."""
        parts = {name: self._of(name) for name, flops in self.forward.items() if flops}
        parts |= {f"teacher {name}": flops for name, flops in self.teachers.items()}
        return parts | ({"uncropped images": self.uncropped} if self.uncropped else {})


def flops_of(config: RunConfig, teachers: Mapping[str, Teacher] | None = None) -> Flops:
    """FLOPs per image of a recipe, averaged over its epochs. teachers: skeletons on the meta device, if they are there.

    Takes about a second and no memory. Raises UserError where the recipe cannot work.
    """
    return flops_of_shapes(build(config, teachers))


def flops_of_shapes(shapes: Shapes) -> Flops:
    """The same for what `trace.build` has built. Counted on the plain twins of the fast paths: what these leave out is
    work of the model all the same.
    """
    engine = shapes.config.engine
    if engine.plain != "all":
        plain = shapes.config.model_copy(update={"engine": engine.model_copy(update={"plain": "all"})})
        shapes = build(plain, shapes.teachers)
    learned = _count(shapes, learned_masks=True)
    warm_up = warm_up_share(shapes)
    if not warm_up:
        return learned
    uniform = _count(shapes, learned_masks=False)
    forward = {
        part: warm_up * uniform.forward.get(part, 0.0) + (1 - warm_up) * learned.forward.get(part, 0.0)
        for part in dict.fromkeys([*uniform.forward, *learned.forward])
    }
    recompute = warm_up * uniform.recompute + (1 - warm_up) * learned.recompute
    return Flops(forward, learned.teachers, learned.uncropped, recompute, learned.frozen)


def arithmetic_of(config: RunConfig, precision: Precision) -> Precision:
    """The precision of nearly all FLOPs. precision: of the parameters; a frozen encoder may compute in another."""
    found: Precision = getattr(config.method, "encoder_precision", precision)
    return found


def warm_up_share(shapes: Shapes) -> float:
    """Share of the run during which a masking policy that learns (AMT) still draws uniform masks."""
    epochs = getattr(getattr(shapes.config.method, "masking", None), "warmup_epochs", 0.0)
    length = shapes.config.schedule.epochs
    return min(1.0, epochs / length) if epochs and length else 0.0


def uncropped_share(shapes: Shapes) -> float:
    """Uncropped images that pass through the student, for each image of training."""
    return float(shapes.method.needs.uncropped_images) / shapes.config.schedule.global_batch


def _count(shapes: Shapes, learned_masks: bool) -> Flops:
    every = shapes.config.engine.activation_checkpointing
    traced = trace(shapes, COUNTED_IMAGES, "bf16", recompute_every=every, learned_masks=learned_masks)
    return flops_of_trace(traced, uncropped_share(shapes))


def flops_of_trace(traced: Trace, uncropped_per_image: float) -> Flops:
    """What a trace has counted, per image."""
    images = traced.micro_batch
    forward = {part: work.flops / images for (part, phase), work in traced.student.items() if phase == "forward"}
    recomputed = {key: work for key, work in traced.student.items() if key[0] != "other" and key[1] == "backward"}
    return Flops(
        forward,
        {name: work.flops / images for name, work in traced.teachers.items()},
        traced.uncropped.flops * uncropped_per_image,
        total(recomputed).flops / images,
        traced.frozen,
    )
