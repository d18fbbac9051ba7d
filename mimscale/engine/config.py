"""The section `engine` of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mimscale.config.base import Strict


class EngineConfig(Strict):
    """backend: deepspeed, or torch: plain DistributedDataParallel in fp32 or bf16, without ZeRO; needs no DeepSpeed.

    ds_config: a name in ds_configs/ (`zero2_fp16`) or a path to a JSON file of your own. With `backend: torch` only its
        precision is used.
    max_micro_batch: images per rank and forward pass at most; accumulation is solved from it and the world size.
    activation_checkpointing: 0 off, k = recompute every k-th block.
    teachers_ahead: experimental. The teachers run one micro-batch ahead of the student, on a GPU in their own stream,
        so that they compute while the student waits for other ranks; costs the memory of one more micro-batch and its
        targets. Targets are equal with and without it (tested on a GPU); its speed has not been measured.
    """

    backend: Literal["deepspeed", "torch"] = "deepspeed"
    ds_config: str = "zero2_bf16"
    max_micro_batch: int = Field(64, ge=1)
    activation_checkpointing: int = Field(0, ge=0)
    teachers_ahead: bool = False
    device: Literal["auto", "cuda", "cpu"] = "auto"
