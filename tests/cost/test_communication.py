"""Collectives and partitions of the model, beside what real ranks do on gloo."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from mimscale.config.deepspeed import ds_config_names, load_ds_config
from mimscale.cost.communication import Collective, buckets, collectives, crossing, seconds
from mimscale.cost.devices import DEVICES, INTERCONNECTS
from mimscale.cost.memory import Zero
from mimscale.cost.partition import kept, pieces
from mimscale.cost.step_time import held
from mimscale.cost.trace import build
from mimscale.distributed.world import EMULATE_FP16
from mimscale.engine.base import method_groups
from tests.cost import probe
from tests.cost.test_memory import counted

OPERATORS = {"all-reduce": "allreduce_", "all-gather": "_allgather_base_", "reduce-scatter": "_reduce_scatter_base_"}
TWO = ("cpu_zero0_fp32", "cpu_zero1_fp32", "cpu_zero2_bf16", "cpu_zero3_bf16")
SHALLOW = ("student.depth=2", "method.decoder_depth=1")
SMALL = 10_000  # bytes; flags, norms and parameters that ZeRO-3 keeps whole


def files_with_small_buckets(folder: Path, names: Sequence[str]) -> list[Path]:
    found = []
    for name in names:
        values = load_ds_config(name)
        zero = values["zero_optimization"]
        if zero["stage"]:
            zero["reduce_bucket_size"] = 600_000
        if zero["stage"] == 3:
            zero["stage3_prefetch_bucket_size"] = 600_000
        found.append(folder / f"{name}.json")
        found[-1].write_text(json.dumps(values))
    return found


@pytest.mark.parametrize(
    ("ranks", "accumulation", "names"), [(2, 1, TWO), (4, 2, ("cpu_zero2_fp32", "cpu_zero3_fp32"))]
)
def test_collectives_and_partitions_are_those_of_real_ranks(
    ranks: int, accumulation: int, names: tuple[str, ...], tmp_path: Path
) -> None:
    """Bytes of each kind exactly, but for what is small; messages to a third, because hooks decide their order."""
    files = files_with_small_buckets(tmp_path, names)
    found = counted(["4", str(accumulation), *map(str, files)], ranks)
    assert len(found) == ranks
    for file in map(str, files):
        zero = Zero.of(load_ds_config(file))
        shapes = build(probe.configuration(file, 4, accumulation, ranks, []))
        predicted = collectives(zero, held(shapes, 0).sizes, ranks, accumulation)
        sizes: Counter[str] = Counter()
        messages: Counter[str] = Counter()
        for operator, size, _ in found[0][file]["collectives"]:
            if size > SMALL:
                sizes[operator] += size
                messages[operator] += 1
        wanted: Counter[str] = Counter()
        for one in predicted:
            wanted[OPERATORS[one.kind]] += round(one.size)
        assert set(sizes) == set(wanted), file
        for operator, size in wanted.items():
            assert sizes[operator] == pytest.approx(size, rel=0.02), (file, operator)
        reduced = next(one for one in predicted if one.phase == "backward")
        if zero.stage:
            assert messages[OPERATORS[reduced.kind]] == pytest.approx(reduced.messages, rel=0.35), file

        groups = [[p.numel() for p in group["params"]] for group in method_groups(shapes.method, shapes.config.optim)]
        if not zero.stage:  # in the order of the method
            groups = [[p.numel() for p in shapes.method.parameters()]]
        for rank, line in enumerate(found):
            fragments = {key: n for key, n in line[file]["fragments"].items() if key.startswith("fp32|")}
            assert sum(fragments.values()) == kept(groups, zero.stage, ranks)[rank], (file, rank)


def test_every_file_for_gpus_trains_the_same_on_gloo(tmp_path: Path) -> None:
    """Those for slow links too; a node has two GPUs here. Their stage 2 reduces to the owner: half the bytes."""
    files = {}
    for name in (name for name in ds_config_names() if not name.startswith("cpu_")):
        values = load_ds_config(name)
        if "zero_hpz_partition_size" in values["zero_optimization"]:
            values["zero_optimization"]["zero_hpz_partition_size"] = 2
        values["zero_optimization"]["reduce_bucket_size"] = 300_000
        if "fp16" in values:
            values["fp16"]["initial_scale_power"] = 8  # the second step is not to be skipped
        files[name] = tmp_path / f"{name}.json"
        files[name].write_text(json.dumps(values))
    found = counted(["4", "1", *map(str, files.values()), "--", *SHALLOW], 2, {EMULATE_FP16: "1"})[0]
    for name, file in files.items():
        usual = found[str(files[name.removesuffix("_slow_links")])]
        own = found[str(file)]
        assert own["losses"] == pytest.approx(usual["losses"], rel=1e-3), name
        assert own["losses"][1] < own["losses"][0], name
        if name.startswith("zero2"):
            kinds = Counter(operator for operator, size, _ in own["collectives"] if size > SMALL)
            assert ("reduce_" in kinds) == name.endswith("_slow_links")
            assert ("allreduce_" in kinds) != name.endswith("_slow_links")


def test_every_element_is_kept_once() -> None:
    groups = [[7, 100, 1, 33], [5, 2]]
    for ranks in (1, 3, 4, 64):
        for stage in range(4):
            seen: Counter[tuple[int, int]] = Counter()
            for rank in range(ranks):
                own = pieces(groups, stage, rank, ranks)
                assert sum(piece.length for piece in own) == kept(groups, stage, ranks)[rank]
                seen.update((p.parameter, at) for p in own for at in range(p.start, p.start + p.length))
            assert len(seen) == sum(map(sum, groups)) and set(seen.values()) == {1}


def test_buckets_are_filled_in_order() -> None:
    assert buckets([5, 5, 5], 10) == 2
    assert buckets([50, 5, 5], 10) == 2
    assert buckets([], 10) == 0


def test_bytes_and_time_by_hand() -> None:
    """8 GB all-reduced by 16 ranks on 2 nodes: each sends 2 x 15/16 x 8 GB over 400 GB/s at 80 %."""
    gpu, link = DEVICES["h100"], INTERCONNECTS["ib8x400"]
    one = Collective("all-reduce", 8e9, 10, "backward")
    assert one.wire(16) == 15e9
    hops = 1 * link.latency + 14 * 1e-6
    assert seconds(one, gpu, link, 16, 8) == pytest.approx(15e9 / (400e9 * 0.8) + 10 * 2 * hops)
    assert crossing([one], 16, 8) == 15e9
    assert crossing([one], 8, 8) == 0
    assert seconds(one, gpu, link, 1, 8) == 0
