"""What a step should cost on this device: FLOPs of an image, the peak, and the rate that a large product reaches."""

from __future__ import annotations

import torch

from mimscale.config.deepspeed import precision_of
from mimscale.cost import peak
from mimscale.cost.flops import Flops, arithmetic_of, flops_of
from mimscale.monitoring.metrics import StepCost
from mimscale.training.checked_run import CheckedRun


def step_cost(checked: CheckedRun) -> tuple[StepCost, tuple[str, ...]]:
    """(figures for the log, lines for the start of a run). On rank 0; nothing on the others, which log nothing.

    Takes some tenths of a second. A method whose FLOPs cannot be counted without memory trains all the same, without
    MFU in its log. Leaves the global generators as they are.
    """
    if checked.world.rank:
        return StepCost(), ()
    device, precision = checked.world.device, arithmetic_of(checked.config, precision_of(checked.ds_config))
    rate, known = peak.measured_flops(device, precision), peak.peak_flops(device, precision)
    sheet = "" if known is None else f"{known / 1e12:.4g} TFLOP/s in {precision} by the data sheet, "
    line = f"peak: {sheet}{rate / 1e12:.3g} TFLOP/s measured with a product of {peak.SIDES[device.type]} squared"
    try:
        with torch.random.fork_rng(devices=[]):
            flops = flops_of(checked.config)
    except Exception as error:  # of a method that reads values, say
        reason = " ".join(str(error).split())[:200]
        return StepCost(), (line, f"FLOPs per image: not counted ({type(error).__name__}: {reason}); no MFU in the log")
    cost = StepCost(flops.training, checked.world.size, known, rate)
    return cost, (line, describe(flops))


def describe(flops: Flops) -> str:
    """One line: FLOPs of training by part."""
    parts = ", ".join(f"{name} {value / 1e9:.3g}" for name, value in flops.by_part().items())
    return f"FLOPs per image: {flops.training / 1e9:.4g} G, forward and backward pass ({parts})"
