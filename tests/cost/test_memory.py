"""Memory: predictions beside what torch's profiler counts on a CPU, and beside what was measured on a GPU."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from mimscale.config.deepspeed import load_ds_config
from mimscale.config.recipes import load_recipe
from mimscale.cost import measured
from mimscale.cost.memory import Zero, memory
from mimscale.cost.trace import at, build, trace
from tests import forked, ranks
from tests.cost import probe

CONFIGS = ("cpu_zero0_fp32", "cpu_zero1_fp32", "cpu_zero2_fp32", "cpu_zero3_fp32", "cpu_zero2_bf16", "cpu_zero3_bf16")


IMAGES = 48  # so that activations are more than what the update needs, without recomputation


def counted(
    words: list[str], count: int = 1, environment: Mapping[str, str] = MappingProxyType({})
) -> list[dict[str, dict[str, Any]]]:
    """What tests/cost/probe.py printed, by rank."""
    done: subprocess.CompletedProcess[str] = forked.run(
        count, ["tests.cost.probe", *words], {**ranks.environment(), **environment}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"rank"')]
    return sorted(lines, key=lambda line: line["rank"])


@pytest.mark.parametrize(("recompute_every", "configs"), [(0, CONFIGS), (1, ("cpu_zero2_bf16",))])
def test_memory_is_that_of_counted_allocations(recompute_every: int, configs: tuple[str, ...], tmp_path: Path) -> None:
    """Within 10 %."""
    files = with_small_buckets(tmp_path, configs)
    overrides = [f"engine.activation_checkpointing={recompute_every}"]
    for file, predicted, peak in compared(files, IMAGES, overrides, recompute_every=recompute_every):
        assert predicted == pytest.approx(peak, rel=0.10), file


def with_small_buckets(folder: Path, configs: Sequence[str]) -> list[str]:
    """Buckets are smaller than in ds_configs/, which has them larger than this whole model."""
    files = []
    for name in configs:
        values = load_ds_config(name)
        if values["zero_optimization"]["stage"]:
            values["zero_optimization"]["reduce_bucket_size"] = 300_000
        files.append(folder / f"{name}.json")
        files[-1].write_text(json.dumps(values))
    return list(map(str, files))


def compared(
    files: Sequence[str],
    images: int,
    overrides: Sequence[str] = (),
    recipe: str = "",
    recompute_every: int = 0,
    accumulation: int = 1,
) -> Iterator[tuple[str, float, float]]:
    """(DeepSpeed config, bytes that were predicted, bytes that were counted). The probe holds one micro-batch, where a
    run has the next one ready too.
    """
    changes = list(overrides)
    [found] = counted([*([recipe] if recipe else []), str(images), str(accumulation), *files, "--", *changes])
    for file in files:
        zero = Zero.of(load_ds_config(file))
        shapes = build(probe.configuration(file, images, 1, 1, changes, recipe))
        traced = trace(shapes, images, zero.precision, recompute_every=recompute_every, cuda=False)
        fused = bool(found[file]["fused"])
        predicted = memory(shapes, zero, traced, 1, accumulation=accumulation, fused_update=fused)
        yield file, predicted.total - traced.inputs, found[file]["peak"]


SMALL = "student: {size: null, width: 192, depth: 6, heads: 3}\ninit: null\ndata: {image_size: 96}\n"


def test_a_frozen_encoder_has_weights_and_a_forward_pass(tmp_path: Path) -> None:
    """No gradients, no state and no activations of it. 27.7 MB were counted, of them 11.3 its weights and 9.3 what its
    forward pass in bf16 needs for a moment.
    """
    recipe = tmp_path / "probe.yaml"
    recipe.write_text(f"extends: mae_vit_b16_linear\n{SMALL}")
    [(_, predicted, peak)] = compared(["cpu_zero0_fp32"], IMAGES, recipe=str(recipe))
    assert predicted == pytest.approx(peak, rel=0.03)


AVERAGE = "ema={decay: 0.99}"


def test_the_sums_of_a_first_micro_batch_are_there_in_the_second(tmp_path: Path) -> None:
    files = with_small_buckets(tmp_path, ("cpu_zero0_fp32", "cpu_zero2_bf16"))
    for file, predicted, peak in compared(files, IMAGES, accumulation=2):
        assert predicted == pytest.approx(peak, rel=0.03), file


def test_a_moving_average_is_counted(tmp_path: Path) -> None:
    """A tenth of the memory. With flat groups (ZeRO-2) it is kept of the decoder too."""
    files = with_small_buckets(tmp_path, ("cpu_zero0_fp32", "cpu_zero2_bf16"))
    for file, predicted, peak in compared(files, IMAGES, [AVERAGE]):
        assert predicted == pytest.approx(peak, rel=0.03), file


def test_a_classifier_with_layer_decay_and_an_average_of_its_head(tmp_path: Path) -> None:
    recipe = tmp_path / "finetune.yaml"
    recipe.write_text(f"extends: finetune_mae_vit_b16\n{SMALL}")
    files = with_small_buckets(tmp_path, ("cpu_zero2_bf16", "cpu_zero3_bf16"))
    plain = ["student.drop_path=0", "data.rand_augment=null", "data.random_erasing=0", "method.mixup=0"]
    overrides = [*plain, "method.cutmix=0", AVERAGE]
    for file, predicted, peak in compared(files, IMAGES // 2, overrides, str(recipe)):
        # the peak of stage 3 moves between calls: 105.9 MB are predicted, 109.4 and 110.2 were measured
        assert predicted == pytest.approx(peak, rel=0.06 if "zero3" in file else 0.03), file
    averaged = build(probe.configuration(files[0], IMAGES, 1, 1, overrides, str(recipe)))
    assert averaged.averaged(whole_groups=False) == sum(averaged.parameters.values())  # encoder, fc_norm and head


@pytest.mark.parametrize("row", measured.ROWS, ids=lambda row: f"{row.recipe}-{row.ds_config}-{row.recompute_every}")
def test_memory_and_time_are_those_of_measured_steps(row: measured.Measured) -> None:
    """Within 10 % and 15 %; the host's cost was fitted to these times, the memory was not fitted."""
    compared = measured.compare(row)
    assert abs(compared.time_error) < 0.15
    assert abs(compared.memory_error) < 0.10 or row.note


def test_a_trace_is_linear_in_the_images() -> None:
    """But for moments of a small batch at which a gradient is larger than an activation."""
    shapes = build(load_recipe("mae_tiny"))
    first, second, large = (trace(shapes, images, "bf16") for images in (8, 16, 40))
    found = at(first, second, 40)
    assert (found.activations, found.inputs) == (large.activations, large.inputs)
    assert max(found.backward)[0] == pytest.approx(max(large.backward)[0], rel=0.02)
    assert found.phase("forward").flops == pytest.approx(large.phase("forward").flops)


def test_zero_splits_what_it_says() -> None:
    """P parameters on N ranks in bf16: 2P of weights stay whole up to stage 2, 12P of the optimiser are split."""
    shapes = build(load_recipe("mae_vit_b16"))
    traced, count = trace(shapes, 8, "bf16"), sum(shapes.parameters.values())
    for stage in (1, 2, 3):
        values = load_ds_config("zero2_bf16")
        values["zero_optimization"]["stage"] = stage
        parts = memory(shapes, Zero.of(values), traced, 8).parts
        assert parts["optimiser"] == pytest.approx(12 * count / 8)
        assert parts["parameters"] == pytest.approx(2 * count / (8 if stage == 3 else 1))
