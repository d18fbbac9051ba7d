"""The section `engine` of a recipe."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import Field, field_validator

from mimscale.config.base import Strict

FastPath = Literal[
    "flat_parameters",
    "norm_check",
    "fused_update",
    "one_rank",
    "masked_decoder",
    "fused_residual",
    "teacher_kernels",
]
"""Parts of a step that are computed in another way than the plain one to be fast; see docs/engine.md.

flat_parameters: DeepSpeed holds one parameter per Block and parameter group. Plain: one per natural parameter.
norm_check: inf and NaN are found in the gradient norm. Plain: in every gradient.
fused_update: the optimiser's step is one kernel per tensor on a CPU too. Plain: PyTorch's default there.
one_rank: on one rank, ZeRO-1 and 2 put gradients straight where the optimiser reads them. Plain: DeepSpeed's buckets.
masked_decoder: the last block, head, target and loss compute only the patches that the loss reads. Plain: all patches,
    and a loss that multiplies the others by zero.
fused_residual: drop path and the residual sum are one kernel. Plain: two.
teacher_kernels: a teacher's QuickGELU is one kernel, open_clip's attention calls SDPA. Plain: the library's modules.
"""


class EngineConfig(Strict):
    """backend: deepspeed, or torch: plain DistributedDataParallel in fp32 or bf16, without ZeRO; needs no DeepSpeed.

    ds_config: a name in ds_configs/ (`zero2_fp16`) or a path to a JSON file of your own. With `backend: torch` only its
        precision is used.
    max_micro_batch: images per rank and forward pass at most; accumulation is solved from it and the world size. auto:
        at the start of a run, the most whose predicted memory fits the GPU with the least memory, as `mimscale plan`
        prints it; on a CPU 64. What was found is written into the run's config.yaml, where a resume takes it from.
    activation_checkpointing: 0 off, k = recompute every k-th block.
    teachers_ahead: experimental. The teachers run one micro-batch ahead of the student, on a GPU in their own stream,
        so that they compute while the student waits for other ranks; costs the memory of one more micro-batch and its
        targets. Targets are equal with and without it (tested on a GPU); its speed has not been measured.
    compile: of the student. off; blocks: a few consecutive blocks per graph; whole: the forward pass in one graph;
        auto: off on a CPU and under ZeRO-3, else the faster of off and blocks. Equal within rounding.
    cuda_graphs: experimental. The student's blocks and the teachers as CUDA graphs: off; auto: where they can be; on:
        refused where the student cannot. Equal to the bit; costs memory for the graphs' own inputs and gradients.
        Neither run nor measured on a GPU yet.
    student_fp8: experimental. The linear layers of the student's and the decoder's blocks multiply in fp8; needs a bf16
        ds_config without ZeRO-3 and the extra [fp8]. Not equal to bf16 within its rounding; see docs/engine.md.
    device: cuda, cpu, or auto: a GPU where there is one.
    plain: fast paths whose plain twin is computed instead, or `all`; each gives the same numbers within rounding.
    """

    backend: Literal["deepspeed", "torch"] = "deepspeed"
    ds_config: str = "zero2_bf16"
    max_micro_batch: int | Literal["auto"] = 64
    activation_checkpointing: int = Field(0, ge=0, le=1024)
    teachers_ahead: bool = False
    compile: Literal["auto", "off", "blocks", "whole"] = "auto"
    cuda_graphs: Literal["off", "auto", "on"] = "off"
    student_fp8: bool = False
    plain: tuple[FastPath, ...] | Literal["all"] = ()
    device: Literal["auto", "cuda", "cpu"] = "auto"

    @field_validator("compile", "cuda_graphs", mode="before")
    @classmethod
    def _off_is_no_boolean(cls, value: Any) -> Any:
        return ("on" if value else "off") if isinstance(value, bool) else value  # as YAML reads on and off

    @field_validator("max_micro_batch", mode="before")
    @classmethod
    def _images_or_auto(cls, value: Any) -> Any:
        whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if value != "auto" and not whole:
            raise ValueError(f"engine.max_micro_batch = {value!r}: must be a number of images, at least 1, or auto")
        return value

    @field_validator("plain", mode="before")
    @classmethod
    def _a_list_or_all(cls, value: Any) -> Any:
        if isinstance(value, str) and value != "all":
            raise ValueError(f"engine.plain = {value!r}: must be a list or all; write engine.plain=[{value}]")
        return value

    def uses(self, path: FastPath) -> bool:
        """Whether the recipe admits this fast path; the engine may still leave it, with a printed reason."""
        return path not in (get_args(FastPath) if self.plain == "all" else self.plain)
