"""What machines can do: ONE table of the numbers that a prediction needs, each with its source, all replaceable.

`mimscale plan --measured FILE` overrides them with what `mimscale bench` measured on a machine (`with_measured`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from mimscale.errors import UserError, nearest
from mimscale.files.plain_numbers import number

GIB = 2**30
PRECISIONS = ("fp32", "bf16", "fp16", "fp8", "int8")
"""That a table of peaks may have."""


@dataclass(frozen=True)
class HostCost:
    """What a step costs the host of a GPU at least, whatever the batch, in seconds.

    The GPU waits where that is more than its own time. An optimiser step is: a forward and a backward pass per
    micro-batch, and an update.

    kernel_s: to launch one operator of the forward or backward pass in eager PyTorch.
    parameter_s, update_parameter_s: what DeepSpeed adds per parameter tensor that it holds, in a backward pass (hook,
        copy into the bucket) and in an update (slice of the partition, norm, and in 16 bit a check).
    zero3_parameter_s: what gathering and releasing under ZeRO-3 adds per parameter tensor and micro-batch.
    recompute_block_s: what activation checkpointing adds per block that is recomputed.
    step_s: per optimiser step, whatever the model.
    """

    kernel_s: float = 15e-6
    parameter_s: float = 200e-6
    update_parameter_s: float = 150e-6
    zero3_parameter_s: float = 700e-6
    recompute_block_s: float = 2.6e-3
    step_s: float = 80e-3


@dataclass(frozen=True)
class Device:
    """One accelerator. Rates are per second.

    peak: dense matrix products, FLOP/s by precision. matmul: share of it that large products reach. efficiency: share
    of that which the products of a ViT reach, which are smaller. memory: bytes, as the
    driver reports them. reserved: bytes that CUDA's context, NCCL and fragmentation take. bandwidth: bytes/s of memory
    that elementwise kernels reach. link: bytes/s of NVLink (or PCIe) per GPU and direction inside a node. host: see
    `HostCost`. source: where the numbers are from.
    """

    name: str
    peak: Mapping[str, float]
    matmul: float
    efficiency: float
    memory: float
    reserved: float
    bandwidth: float
    link: float
    cores: int
    host: HostCost
    source: str

    def products(self, precision: str) -> float:
        """FLOP/s that the products of a training step reach."""
        return self.peak[precision] * self.matmul * self.efficiency


@dataclass(frozen=True)
class Interconnect:
    """Network of a node. bandwidth: bytes/s per node and direction, all adapters together. efficiency: share that
    collectives reach. latency: seconds per collective and hop of its ring or tree.
    """

    name: str
    bandwidth: float
    efficiency: float
    latency: float
    source: str


NVIDIA = "NVIDIA's data sheet"
DEVICES = {
    "h100": Device(
        "h100",
        {"bf16": 989e12, "fp16": 989e12, "fp32": 494e12, "fp8": 1979e12, "int8": 1979e12},
        matmul=0.80,
        efficiency=0.75,
        memory=78 * GIB,
        reserved=5 * GIB,
        bandwidth=2.6e12,
        link=450e9,
        cores=16,
        host=HostCost(),
        source=f"{NVIDIA} (H100 SXM; fp32 is TF32); 8192^3 bf16 product measured 798 TFLOP/s, a step's products 600; "
        f"2.6 of 3.35 TB/s measured; host cost measured, see docs/plan.md",
    ),
    "h200": Device(
        "h200",
        {"bf16": 989e12, "fp16": 989e12, "fp32": 494e12, "fp8": 1979e12, "int8": 1979e12},
        matmul=0.79,
        efficiency=0.75,
        memory=139 * GIB,
        reserved=7 * GIB,
        bandwidth=3.8e12,
        link=450e9,
        cores=16,
        host=HostCost(),
        source=f"{NVIDIA} (H200 SXM; fp32 is TF32); 8192^3 bf16 product measured 769 to 798 TFLOP/s, copy 4.3 TB/s; "
        f"the rest as for h100",
    ),
    "a100": Device(
        "a100",
        {"bf16": 312e12, "fp16": 312e12, "fp32": 156e12, "int8": 624e12},
        matmul=0.85,
        efficiency=0.80,
        memory=79 * GIB,
        reserved=5 * GIB,
        bandwidth=1.6e12,
        link=300e9,
        cores=16,
        host=HostCost(),
        source=f"{NVIDIA} (A100 SXM 80 GB; fp32 is TF32); efficiencies and host cost assumed, not measured",
    ),
    "a100-40": Device(
        "a100-40",
        {"bf16": 312e12, "fp16": 312e12, "fp32": 156e12, "int8": 624e12},
        matmul=0.85,
        efficiency=0.80,
        memory=39 * GIB,
        reserved=3 * GIB,
        bandwidth=1.25e12,
        link=300e9,
        cores=16,
        host=HostCost(),
        source=f"{NVIDIA} (A100 SXM 40 GB; fp32 is TF32); efficiencies and host cost assumed, not measured",
    ),
    "v100": Device(
        "v100",
        {"fp16": 125e12, "fp32": 15.7e12},
        matmul=0.75,
        efficiency=0.75,
        memory=31.7 * GIB,
        reserved=2.5 * GIB,
        bandwidth=0.75e12,
        link=150e9,
        cores=10,
        host=HostCost(),
        source=f"{NVIDIA} (V100 SXM2 32 GB); efficiencies and host cost assumed, not measured",
    ),
    "cpu": Device(
        "cpu",
        {"fp32": 90e9, "bf16": 90e9, "fp16": 90e9},
        matmul=1.0,
        efficiency=0.95,
        memory=16 * GIB,
        reserved=0.5 * GIB,
        bandwidth=10e9,
        link=10e9,
        cores=1,
        host=HostCost(),
        source="one core of the machine of docs/benchmarks.md: bare fp32 products reach 80 to 89 GFLOP/s",
    ),
}
ALIASES = {"a100-80": "a100"}


def _infiniband(count: int, gigabits: int) -> Interconnect:
    name = f"ib{count}x{gigabits}"
    return Interconnect(name, count * gigabits / 8 * 1e9, 0.8, 5e-6, f"{count} InfiniBand adapters of {gigabits} Gb/s")


INTERCONNECTS = {
    link.name: link
    for link in (
        _infiniband(8, 400),
        _infiniband(8, 200),
        _infiniband(4, 200),
        _infiniband(1, 200),
        Interconnect("eth4x100", 50e9, 0.7, 15e-6, "4 Ethernet adapters of 100 Gb/s with RDMA"),
        Interconnect("eth1x100", 12.5e9, 0.7, 20e-6, "1 Ethernet adapter of 100 Gb/s"),
        Interconnect("eth1x25", 3.125e9, 0.7, 30e-6, "1 Ethernet adapter of 25 Gb/s"),
    )
}
USUAL = {"h100": "ib8x400", "h200": "ib8x400", "a100": "ib8x200", "a100-40": "ib8x200", "v100": "eth1x100"}
"""The network that a node of such GPUs usually has."""


def device(name: str, measured: Path | None = None) -> Device:
    """The row of a GPU, with what was measured on it in its place. Raises UserError."""
    key = ALIASES.get(name.lower(), name.lower())
    if key not in DEVICES:
        raise UserError(f"--gpu {name} is unknown{nearest(name, list(DEVICES))}")
    return DEVICES[key] if measured is None else with_measured(DEVICES[key], measured)


def interconnect(name: str | None, gpu: Device) -> Interconnect:
    """The row of a network; None: the usual one of nodes with this GPU. Raises UserError."""
    key = USUAL.get(gpu.name, "eth1x100") if name is None else name.lower()
    if key not in INTERCONNECTS:
        raise UserError(f"--interconnect {name} is unknown{nearest(str(name), list(INTERCONNECTS))}")
    return INTERCONNECTS[key]


def with_measured(row: Device, path: Path) -> Device:
    """A row whose values a JSON file replaces: `{"device": {...}, "host": {...}}`, fields of `Device` and `HostCost`.

    `mimscale bench train --out` writes the section `device`, `bench host --out` the section `host`. The former names
    the device that it was measured on, `device_row`. Raises UserError for a file that cannot be read, for a field that
    does not exist, for a value that no machine has, and for another device than this row's.
    """
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"--measured {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--measured {path} is not JSON: {error}") from None
    sections = values if isinstance(values, dict) else {}
    own, host = sections.get("device", {}), sections.get("host", {})
    if not isinstance(own, dict) or not isinstance(host, dict) or not (own or host):
        raise UserError(
            f"--measured {path} has neither a section device nor a section host; `mimscale bench train --out` and "
            f"`bench host --out` write them"
        )
    measured_on = sections.get("device_row", row.name)
    if own and measured_on != row.name:
        raise UserError(f"--measured {path} was measured on {measured_on}, not on {row.name}; change --gpu or the file")
    own = {key: value for key, value in own.items() if key not in ("name", "host", "source")}
    _check(path, "device", own, Device)
    _check(path, "host", host, HostCost)
    peak = {**row.peak, **own.pop("peak", {})}
    found = replace(
        row, **own, peak=peak, host=replace(row.host, **host), source=f"measured in {path}, else {row.source}"
    )
    if found.memory <= found.reserved:
        raise UserError(
            f"--measured {path}: device.memory = {found.memory:g} bytes is not more than device.reserved = "
            f"{found.reserved:g}; nothing would be left for tensors"
        )
    return found


def _check(path: Path, section: str, values: Mapping[str, Any], kind: type) -> None:
    known = [entry.name for entry in fields(kind)]
    for key, value in values.items():
        if key not in known:
            raise UserError(
                f"--measured {path}: {section}.{key} is unknown{nearest(key, known)}; known: {', '.join(known)}"
            )
        if key != "peak":
            _check_number(path, f"{section}.{key}", value)
        elif not isinstance(value, dict):
            raise UserError(f"--measured {path}: device.peak = {value!r} must be a rate for each precision")
        else:
            for precision, rate in value.items():
                if precision not in PRECISIONS:
                    raise UserError(
                        f"--measured {path}: device.peak.{precision} is unknown{nearest(precision, PRECISIONS)}"
                    )
                _check_number(path, f"device.peak.{precision}", rate)


def _check_number(path: Path, name: str, value: Any) -> None:
    good = number(value)
    if good is None or good <= 0:
        raise UserError(f"--measured {path}: {name} = {value!r:.80} must be a number above 0")
