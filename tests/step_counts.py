"""Count what a training step of a recipe makes a device do, at full size and without computing anything.

    python -m tests.step_counts RECIPE MICRO_BATCH [key=value ...]

Prints, for the fast paths and for their plain twins: the FLOPs of the matrix products, the bytes that all other kernels
read and write, the number of kernels, and of operators that forward and backward dispatch. In bf16, eager, with fake
tensors on a CPU, so attention is the CPU's operator. Teachers are not run. Views move nothing and count as no kernel.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mimscale.config.recipes import load_recipe
from mimscale.config.run import RunConfig, method_class
from mimscale.teachers.ensemble import build_skeletons, describe
from mimscale.types import Batch, Targets
from tests.operators import Operators

VIEWS = ("view", "slice.", "select.", "t.", "transpose.", "permute.", "expand.", "unsqueeze.", "squeeze.", "detach.",
         "alias.", "split", "unbind.", "_unsafe_view.", "empty", "as_strided.")  # fmt: skip


class Counts(Operators):
    """flops: of matrix products. moved: bytes of all other kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.moved, self.kernels = 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "prim":  # a question of the fake tensors, not an operator
            return func(*args, **(kwargs or {}))
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if str(func).removeprefix("aten.").startswith(VIEWS):
            return result
        self.kernels += 1
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        else:
            touched = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
            self.moved += sum(x.numel() * x.element_size() for x in touched)
        return result


def count(run: RunConfig, micro_batch: int) -> Counts:
    """One forward and backward pass of the method."""
    infos = describe(build_skeletons(run.teachers, run.data.image_size))
    method = method_class(run.method.name)(run, infos)
    side = run.data.image_size
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for module in method.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    fake = mode.from_tensor(parameter.detach()).to(torch.bfloat16)
                    module._parameters[name] = nn.Parameter(fake, parameter.requires_grad)
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else mode.from_tensor(buffer)
        zeros = torch.zeros(micro_batch, dtype=torch.int64)
        noise = {name: torch.rand(micro_batch, *wanted.shape) for name, wanted in method.needs.noise.items()}
        images, boxes = torch.rand(micro_batch, 3, side, side), torch.zeros(micro_batch, 4)
        importance = torch.zeros(micro_batch, run.grid[0] * run.grid[1], dtype=torch.uint8)
        batch = Batch(images, zeros, zeros, noise, boxes, zeros.bool(), labels=zeros, importance=importance)
        targets = {}
        for name, info in infos.items():
            tokens = torch.rand(micro_batch, info.grid[0] * info.grid[1], info.dim, dtype=torch.bfloat16)
            levels = dict.fromkeys(range(info.depth), tokens)
            cls = dict.fromkeys(range(info.depth), tokens[:, 0])
            targets[name] = Targets(levels, cls, torch.rand(tokens.shape[:2]))
        with Counts() as counts:
            method(batch, targets)["loss"].backward()
    return counts


def main(words: list[str]) -> None:
    recipe, micro_batch, *changes = words
    for kind, plain in (("fast", ()), ("plain", ("engine.plain=all",))):
        counts = count(load_recipe(recipe, [*changes, *plain]), int(micro_batch))
        print(
            f"{recipe}, {micro_batch} images, {kind}: {counts.flops / 1e12:.2f} TFLOP, {counts.moved / 1e9:.1f} GB, "
            f"{counts.kernels} kernels, {counts.names.total()} operators"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
