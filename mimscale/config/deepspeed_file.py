"""What may stand in a DeepSpeed JSON file of ours, typed: DeepSpeed itself ignores or converts much that is wrong."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from mimscale.config.base import Strict


def _flag(value: Any) -> Any:
    if not isinstance(value, bool):
        hint = "; 'auto' means something to Hugging Face's Trainer only" if value == "auto" else ""
        raise ValueError(f"{value!r} is not true or false{hint}; write true or false, without quotes")
    return value


def _count(value: Any) -> Any:
    """A whole number; DeepSpeed's files also write 5e8."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{value!r} is not a whole number; write one, without quotes")
    return value


def _section(value: Any) -> Any:
    if not isinstance(value, (dict, Strict)):  # a default is a section already
        raise ValueError(f"{value!r} is not a section; write {{...}} with its keys")
    return value


Flag = Annotated[bool, BeforeValidator(_flag)]
Count = Annotated[int, BeforeValidator(_count), Field(ge=0, le=2**40)]
Positive = Annotated[int, BeforeValidator(_count), Field(ge=1, le=2**40)]
Number = Annotated[float, Field(strict=True, gt=0, le=2.0**40)]
Dtype = Literal["fp32", "float32", "float", "bf16", "bfloat16", "fp16", "float16", "half"]
Refused = Any
"""A key that DeepSpeed has and this package refuses, with a reason of its own (`mimscale.config.deepspeed`)."""


class ZeroSection(Strict):
    """The keys of `zero_optimization` in DeepSpeed 0.19."""

    stage: Annotated[Literal[0, 1, 2, 3], BeforeValidator(_count)] = 0
    contiguous_gradients: Flag = True
    reduce_scatter: Flag = True
    reduce_bucket_size: Positive = 500_000_000
    use_multi_rank_bucket_allreduce: Flag = True
    allgather_partitions: Flag = True
    allgather_bucket_size: Positive = 500_000_000
    overlap_comm: Flag | None = None
    sub_group_size: Positive = 1_000_000_000
    stage3_prefetch_bucket_size: Count = 50_000_000
    stage3_param_persistence_threshold: Count = 100_000
    stage3_model_persistence_threshold: Count = 0
    stage3_max_live_parameters: Count = 1_000_000_000
    stage3_max_reuse_distance: Count = 1_000_000_000
    stage3_module_granularity_threshold: Count = 0
    stage3_use_all_reduce_for_fetch_params: Flag = False
    stage3_allgather_sequential: Flag = False
    stage3_gather_16bit_weights_on_model_save: Flag = False
    zero_hpz_partition_size: Positive = 1
    zero_quantized_weights: Flag = False
    zero_quantized_gradients: Flag = False
    ignore_unused_parameters: Flag = True
    memory_efficient_linear: Flag = True
    log_trace_cache_warnings: Flag = False
    enable_sanity_checks: Flag = False
    round_robin_gradients: Refused = None
    compute_grad_norm: Refused = None
    offload_optimizer: Refused = None
    offload_param: Refused = None


class Fp16Section(Strict):
    enabled: Flag = False
    loss_scale: float = Field(0.0, strict=True, ge=0, le=2.0**32)
    initial_scale_power: Annotated[int, BeforeValidator(_count), Field(ge=0, le=32)] = 16
    loss_scale_window: Positive = 1000
    hysteresis: Positive = 2
    consecutive_hysteresis: Flag = False
    min_loss_scale: Positive = 1
    auto_cast: Flag = False


class Bf16Section(Strict):
    enabled: Flag = False
    immediate_grad_update: Flag = False
    check_grad_overflow: Refused = None
    bf16_master_weights_and_grads: Refused = None
    bf16_optimizer_states: Refused = None


class DataTypesSection(Strict):
    grad_accum_dtype: Dtype | None = None


class CommsLoggerSection(Strict):
    enabled: Flag = False
    verbose: Flag = False
    prof_all: Flag = True
    debug: Flag = False
    prof_ops: list[str] = Field(default_factory=list)


class FlopsProfilerSection(Strict):
    enabled: Flag = False
    recompute_fwd_factor: float = Field(0.0, strict=True, ge=0, le=1)
    profile_step: Positive = 1
    module_depth: Annotated[int, BeforeValidator(_count), Field(ge=-1)] = -1
    top_modules: Positive = 1
    detailed: Flag = True
    output_file: str | None = None


class DeepSpeedFile(Strict):
    """A whole file."""

    zero_optimization: Annotated[ZeroSection, BeforeValidator(_section)] = ZeroSection()
    fp16: Annotated[Fp16Section, BeforeValidator(_section)] = Fp16Section()
    bf16: Annotated[Bf16Section, BeforeValidator(_section)] = Bf16Section()
    data_types: Annotated[DataTypesSection, BeforeValidator(_section)] = DataTypesSection()
    communication_data_type: Dtype | None = None
    prescale_gradients: Flag = False
    gradient_predivide_factor: Number = 1.0
    wall_clock_breakdown: Flag = False
    dump_state: Flag = False
    comms_logger: Annotated[CommsLoggerSection, BeforeValidator(_section)] = CommsLoggerSection()
    flops_profiler: Annotated[FlopsProfilerSection, BeforeValidator(_section)] = FlopsProfilerSection()
