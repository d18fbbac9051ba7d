"""One training step without memory and without arithmetic: the real method and its real teachers on the meta device.

Every operator of forward and backward goes through a dispatch mode that counts floating-point operations (torch's own
formulas), bytes read and written, kernels, and the memory that is alive. So a method that a user adds is counted like
those of this package. Attention is counted as the fused kernel that the device runs.

FLOPs: multiply and add of matrix products, convolutions and attention, 2 per pair; nothing else. Bytes: of every
operator that is not a view, inputs and outputs once each.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mimscale.config.run import RunConfig, method_class
from mimscale.engine.base import method_groups
from mimscale.teachers.base import DTYPES, Teacher
from mimscale.teachers.ensemble import build_skeletons, describe
from mimscale.types import Batch, Needs, Targets, TeacherInfo, normalised

Phase = Literal["forward", "backward"]
META = torch.device("meta")


@dataclass
class Work:
    """flops: as above. product_bytes: of operators with FLOPs. other_bytes: of all others. kernels: their number."""

    flops: float = 0.0
    product_bytes: float = 0.0
    other_bytes: float = 0.0
    kernels: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops,
            self.product_bytes + other.product_bytes,
            self.other_bytes + other.other_bytes,
            self.kernels + other.kernels,
        )

    def __mul__(self, factor: float) -> Work:
        return Work(self.flops * factor, self.product_bytes * factor, self.other_bytes * factor, self.kernels * factor)


def total(works: Mapping[Any, Work]) -> Work:
    return sum(works.values(), Work())


class Counter(TorchDispatchMode):
    """Counts what is dispatched while it is active.

    work: (part, phase) -> Work; a part is the last of `parts` at that time. alive, peak: bytes of tensors that were
    allocated while it was active, now and at most since `gradient_done`. gradients: elements of the parameters whose
    gradients are done. timeline: (peak, gradients) at each of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.work: dict[tuple[str, Phase], Work] = {}
        self.parts: list[str] = ["other"]
        self.phase: Phase = "forward"
        self.alive = self.peak = self.gradients = 0
        self.timeline: list[tuple[int, int]] = []
        self._known: weakref.WeakKeyDictionary[Any, None] = weakref.WeakKeyDictionary()
        self._results: dict[Any, Result] = {}

    def exempt(self, tensors: Sequence[Tensor]) -> None:
        """Their memory is accounted for elsewhere."""
        for tensor in tensors:
            self._known[tensor.untyped_storage()] = None

    def gradient_done(self, parameter: Tensor) -> None:
        """As ZeRO does: a gradient leaves the parameter as soon as it is there. A hook of the parameter."""
        self.timeline.append((self.peak, self.gradients))
        self.gradients += parameter.numel()
        parameter.grad = None
        self.peak = self.alive

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        call = _call(func, args, kwargs)
        known = None if call is None else self._results.get(call)
        if known is not None:
            outputs = [_empty(*spec) for spec in known.outputs]
            work: Work | None = known.work
            out: Any = outputs[0] if known.single else tuple(outputs)
        else:
            out = func(*args, **kwargs)
            outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
            inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            work = _work(func, args, kwargs, inputs, out, outputs)
            if call is not None and work is not None and _is_new(out, inputs, outputs):
                specs = tuple((tuple(t.shape), t.stride(), t.dtype) for t in outputs)
                self._results[call] = Result(specs, isinstance(out, Tensor), work)
        for tensor in outputs:
            self._allocated(tensor)
        if work is not None:
            key = (self.parts[-1], self.phase)
            self.work[key] = self.work.get(key, Work()) + work
        return out

    def _allocated(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known[storage] = None
        size = storage.nbytes()
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._freed, size).atexit = False

    def _freed(self, size: int) -> None:
        self.alive -= size


class Result(NamedTuple):
    """What an operator gave for arguments of some shapes: (size, stride, dtype) of its new tensors, one tensor or a
    tuple of them, and its work. The blocks of a network repeat the same calls, and to make a tensor of known shape
    takes a hundredth of the time in which PyTorch finds the shape of a result on the meta device.
    """

    outputs: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...]
    single: bool
    work: Work


def _call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the result of an operator depends on: itself, shapes and values; None where it writes into an argument."""
    if func._schema.is_mutable:
        return None
    call = (func, *map(_described, args), *((name, _described(value)) for name, value in kwargs.items()))
    try:
        hash(call)
    except TypeError:
        return None
    return call


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (value.dtype, value.shape, value.stride())
    if isinstance(value, (list, tuple)):
        return tuple(map(_described, value))
    return (type(value), value)  # 1 and 1.0 are other arguments


def _empty(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device=META)


def _is_new(out: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
    """Whether an operator gave a tensor or a tuple of tensors, each in memory of its own and no larger than needed."""
    if not (isinstance(out, Tensor) or (isinstance(out, tuple) and len(out) == len(outputs))):
        return False
    storages = {id(tensor.untyped_storage()) for tensor in (*inputs, *outputs)}
    apart = len(storages) == len({id(tensor.untyped_storage()) for tensor in inputs}) + len(outputs)
    return apart and all(
        t.untyped_storage().nbytes() == _empty(tuple(t.shape), t.stride(), t.dtype).untyped_storage().nbytes()
        for t in outputs
    )


def _work(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: list[Tensor], out: Any, outputs: list[Tensor]
) -> Work | None:
    """What an operator costs; None for a view, and for what only allocates."""
    formula = flop_registry.get(func._overloadpacket)
    if formula is None and not func._schema.is_mutable:
        read = {id(tensor.untyped_storage()) for tensor in inputs}
        if all(id(tensor.untyped_storage()) in read for tensor in outputs) or _only_allocates(func):
            return None
    moved = float(sum(tensor.numel() * tensor.element_size() for tensor in (*inputs, *outputs)))
    if formula is None:
        return Work(0.0, 0.0, moved, 1.0)
    return Work(float(formula(*args, **kwargs, out_val=out)), moved, 0.0, 1.0)


def _only_allocates(func: Any) -> bool:
    return func._schema.name.split("::")[1].startswith(("empty", "new_empty", "lift_fresh"))


class FusedAttention(TorchFunctionMode):
    """scaled_dot_product_attention as the fused kernel of a device: on the meta device torch would take the plain one,
    with its [B, H, N, N] of scores.
    """

    def __init__(self, cuda: bool) -> None:
        super().__init__()
        self.cuda = cuda

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        return self._fused(*args, **kwargs)

    def _fused(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **other: Any,
    ) -> Tensor:
        ops = torch.ops.aten
        if not self.cuda:
            if attn_mask is not None and attn_mask.requires_grad:  # the CPU's kernel has no gradient of the bias
                return _plain_attention(query, key, value, attn_mask, scale)
            return ops._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
            )[0]
        if attn_mask is None and query.dtype in (torch.float16, torch.bfloat16):
            return ops._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[
                0
            ]
        if attn_mask is not None:
            attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
        return ops._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
        )[0]


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float | None) -> Tensor:
    scores = q @ k.transpose(-2, -1) * (scale or q.shape[-1] ** -0.5) + bias
    return scores.softmax(-1) @ v


@dataclass(frozen=True)
class Shapes:
    """A run as it is built, on the meta device. parts: name -> the method's direct children that hold parameters."""

    config: RunConfig
    method: Any
    teachers: Mapping[str, Teacher]

    @property
    def parameters(self) -> dict[str, int]:
        """Trained parameters by part; those that belong to no child are in `other`."""
        found: dict[str, int] = {}
        for name, parameter in self.method.named_parameters():
            part = name.split(".")[0] if "." in name else "other"
            found[part] = found.get(part, 0) + parameter.numel()
        return found

    @property
    def frozen(self) -> int:
        """Elements of the method's buffers: a frozen encoder's weights, fixed positions, a norm's statistics."""
        return sum(buffer.numel() for buffer in self.method.buffers())

    def averaged(self, whole_groups: bool) -> int:
        """Trained parameters whose moving average is kept (section `ema`). whole_groups: with all others of the
        optimiser's groups in which one of them lies, as an engine does that steps on one flat tensor per group.
        """
        if self.config.ema is None:
            return 0
        names = [name for name, _ in self.method.named_parameters() if name.startswith(self.method.averaged)]
        of = dict(self.method.named_parameters())
        if not whole_groups:
            return sum(of[name].numel() for name in names)
        groups = [group["names"] for group in method_groups(self.method, self.config.optim)]
        held = [group for group in groups if not set(names).isdisjoint(group)]
        return sum(of[name].numel() for group in held for name in group)


def build(config: RunConfig, teachers: Mapping[str, Teacher] | None = None) -> Shapes:
    """The method and its teachers without memory. teachers: from `build_skeletons`, if they are there; they are copied.

    Raises UserError.
    """
    skeletons = build_skeletons(config.teachers, config.data.image_size) if teachers is None else teachers
    infos: dict[str, TeacherInfo] = describe(skeletons)
    cls = method_class(config.method.name)
    cls.check(config, infos)
    with torch.device(META):
        method = cls(config, infos)
    return Shapes(config, method.to(META), {name: copy.deepcopy(skeletons[name]) for name in method.needs.teachers})


def make_batch(config: RunConfig, needs: Needs, count: int, *, learned_masks: bool = True) -> Batch:
    """A normalised batch of `count` images on the meta device. learned_masks: with the importance that AMT's policy has
    stored after its warm-up.
    """
    side, patches = config.data.image_size, math.prod(config.grid)
    noise = {
        purpose: torch.empty(count, *wanted.shape, dtype=torch.float32, device=META)
        for purpose, wanted in needs.noise.items()
    }
    learned = learned_masks and needs.uncropped_images
    return Batch(
        images=normalised(torch.empty(count, 3, side, side, dtype=torch.uint8, device=META)),
        ids=torch.empty(count, dtype=torch.int64, device=META),
        positions=torch.empty(count, dtype=torch.int64, device=META),
        noise=noise,
        boxes=torch.empty(count, 4, dtype=torch.float32, device=META),
        flips=torch.empty(count, dtype=torch.bool, device=META),
        labels=torch.empty(count, dtype=torch.int64, device=META) if needs.labels else None,
        importance=torch.empty(count, patches, dtype=torch.uint8, device=META) if learned else None,
    )


@dataclass(frozen=True)
class Trace:
    """What one micro-batch does on one device.

    student: (part of the method, phase) -> Work. teachers: name -> Work. uncropped: Work of one uncropped image that a
    masking policy passes through the student. activations: bytes that are alive after the forward pass, for the
    backward pass; forward_peak: at most during it. backward: (bytes alive at most, elements of the gradients that are
    already elsewhere) from each parameter's gradient to the next, during the backward pass. teacher_peak: the same
    while the teachers run. inputs, targets: bytes of the micro-batch and of what teachers give for it. frozen: parts
    that have nothing to train.
    """

    micro_batch: int
    student: Mapping[tuple[str, Phase], Work]
    teachers: Mapping[str, Work]
    uncropped: Work
    activations: int
    backward: tuple[tuple[int, int], ...]
    teacher_peak: int
    inputs: int
    targets: int
    frozen: frozenset[str] = frozenset()
    forward_peak: int = 0

    @property
    def parts(self) -> list[str]:
        return list(dict.fromkeys(part for part, _ in self.student))

    def phase(self, phase: Phase) -> Work:
        return total({key: work for key, work in self.student.items() if key[1] == phase})


def at(first: Trace, second: Trace, micro_batch: int) -> Trace:
    """The trace of another micro-batch: everything in it is linear in the number of images."""
    share = (micro_batch - first.micro_batch) / (second.micro_batch - first.micro_batch)

    def number(a: int, b: int) -> int:
        return max(0, round(a + share * (b - a)))

    def work(a: Work, b: Work) -> Work:
        return a * (1 - share) + b * share

    return Trace(
        micro_batch,
        {key: work(value, second.student[key]) for key, value in first.student.items()},
        {name: work(value, second.teachers[name]) for name, value in first.teachers.items()},
        first.uncropped,
        number(first.activations, second.activations),
        tuple((number(a, b), done) for (a, done), (b, _) in zip(first.backward, second.backward, strict=True)),
        number(first.teacher_peak, second.teacher_peak),
        number(first.inputs, second.inputs),
        number(first.targets, second.targets),
        first.frozen,
        number(first.forward_peak, second.forward_peak),
    )


def trace(
    shapes: Shapes,
    micro_batch: int,
    precision: Literal["fp32", "bf16", "fp16"],
    *,
    recompute_every: int = 0,
    cuda: bool = True,
    learned_masks: bool = True,
) -> Trace:
    """Count one micro-batch of `micro_batch` images. recompute_every: activation checkpointing, whatever the recipe
    says. Takes a second or two, and next to no memory, at any size.
    """
    config, method = shapes.config, shapes.method
    dtype = DTYPES[precision]
    method.to(dtype)
    for module in method.modules():
        if hasattr(module, "recompute_every"):
            module.recompute_every = recompute_every
    batch = make_batch(config, method.needs, micro_batch, learned_masks=learned_masks)
    targets, teacher_work, teacher_peak = _run_teachers(shapes, batch, cuda)
    kept = [*_tensors(batch), *(tensor for value in targets.values() for tensor in _tensors(value))]
    counter = Counter()
    counter.exempt([*method.parameters(), *method.buffers(), *kept])
    for parameter in method.parameters():
        parameter.grad = None
    with ExitStack() as stack:
        _Hooks(counter, cuda).attach(method, stack)
        for parameter in method.parameters():
            stack.callback(parameter.register_post_accumulate_grad_hook(counter.gradient_done).remove)
        stack.enter_context(counter)
        outputs = method(batch, targets)
        forward_peak, activations = counter.peak, counter.alive
        counter.phase, counter.peak = "backward", counter.alive
        outputs["loss"].backward()
    counter.timeline.append((counter.peak, counter.gradients))
    del outputs
    return Trace(
        micro_batch,
        counter.work,
        teacher_work,
        _uncropped(shapes, cuda) if method.needs.uncropped_images else Work(),
        activations,
        tuple(counter.timeline),
        teacher_peak,
        inputs=sum(tensor.untyped_storage().nbytes() for tensor in _tensors(batch)),
        targets=_distinct_bytes(tensor for value in targets.values() for tensor in _tensors(value)),
        frozen=frozenset(name for name, part in method.named_children() if not list(part.parameters())),
        forward_peak=forward_peak,
    )


class _Hooks:
    """Sets which part of the method runs in the counter, and has attention fused; also where a block is recomputed in
    the backward pass, in which a mode that was entered around `backward` is not active.
    """

    def __init__(self, counter: Counter, cuda: bool) -> None:
        self.counter, self.mode, self.depth = counter, FusedAttention(cuda), 0

    def attach(self, method: nn.Module, stack: ExitStack) -> None:
        for name, module in method.named_modules():
            enter, leave = partial(self._enter, name.split(".")[0] or "other"), self._leave
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)

    def _enter(self, part: str, *_: Any) -> None:
        self.counter.parts.append(part)
        if not self.depth:
            self.mode.__enter__()
        self.depth += 1

    def _leave(self, *_: Any) -> None:
        self.counter.parts.pop()
        self.depth -= 1
        if not self.depth:
            self.mode.__exit__(None, None, None)


def _run_teachers(shapes: Shapes, batch: Batch, cuda: bool) -> tuple[dict[str, Targets], dict[str, Work], int]:
    """(targets, Work by teacher, bytes alive at most, without the targets of teachers before)."""
    targets: dict[str, Targets] = {}
    works: dict[str, Work] = {}
    peak = 0
    for name, teacher in shapes.teachers.items():
        teacher.to(META).to(DTYPES[shapes.config.teachers[name].storage])
        counter = Counter()
        counter.exempt([*teacher.parameters(), *teacher.buffers(), batch.images])
        with FusedAttention(cuda), counter:
            pixels = teacher.preprocess(batch.images)
            targets[name] = teacher(pixels, shapes.method.needs.teachers[name])
        works[name] = total(counter.work)
        peak = max(peak, counter.peak)
    return targets, works, peak


@torch.no_grad()
def _uncropped(shapes: Shapes, cuda: bool) -> Work:
    """Work of one uncropped image, from a pass of eight."""
    counter, side = Counter(), shapes.config.data.image_size
    with FusedAttention(cuda), counter:
        shapes.method.student(torch.empty(8, 3, side, side, device=META), attention=True)
    return total(counter.work) * (1 / 8)


def _tensors(record: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(list(vars(record).values())) if isinstance(leaf, Tensor)]


def _distinct_bytes(tensors: Iterator[Tensor]) -> int:
    return sum({id(t.untyped_storage()): t.untyped_storage().nbytes() for t in tensors}.values())
