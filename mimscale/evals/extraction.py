"""The features of networks of one image size on a whole data set: each chunk computed once, by one of the ranks.

With a cache they come from the disk, and only chunks that are not there are computed. Without one every rank keeps all
of them in memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mimscale.data.manifest import Manifest
from mimscale.distributed.coordination import Coordinator
from mimscale.distributed.same_ranks import flat, refuse_different
from mimscale.errors import UserError, warn
from mimscale.evals.cache import Array, Stored, check_room, chunk_length, size_text
from mimscale.evals.features import Key, chunks
from mimscale.evals.networks import Network
from mimscale.evals.parallel import rows_of
from mimscale.files.progress import tracked


@dataclass(frozen=True)
class Extraction:
    """How images become features. cache: keep them on disk; folder: for all networks, in place of that of each run."""

    device: torch.device
    precision: str
    crop_pct: float
    batch: int
    workers: int
    cache: bool = True
    folder: Path | None = None


def features_of(
    networks: Sequence[Network], manifest: Manifest, what: str, how: Extraction, ranks: Coordinator
) -> dict[Key, Tensor]:
    """{(network, pooling): float32 [N, ...] in host memory, mapped from the cache or not} on every rank.

    what: the data set in a word, for the progress. Raises UserError and DamagedSample, on all ranks.
    """
    arrays = {
        (network.name, pool): Array(_identity(network, manifest, pool, how), manifest.samples, shape)
        for network in networks
        for pool, shape in shapes(network, how.device).items()
    }
    parts = (flat(f"{name}, {pool}, of {what}", array.of) for (name, pool), array in arrays.items())
    refuse_different({key: value for part in parts for key, value in part.items()}, ranks)
    length = min(chunk_length(manifest.samples, array.shape) for array in arrays.values())
    if not how.cache:
        return _in_memory(networks, manifest, what, how, ranks, arrays, length)
    folders = {network.name: how.folder or network.folder for network in networks}
    stored = {key: Stored(array, folders[key[0]], length) for key, array in arrays.items()}
    missing = ranks.on_rank0(_missing, stored, what)
    wanted: dict[int, set[str]] = {}
    for key, numbers in missing.items():
        for number in numbers:
            wanted.setdefault(number, set()).add(key[0])

    def compute() -> None:
        try:
            for number, found in _mine(wanted, networks, manifest, what, how, ranks, length):
                for key, values in found.items():
                    if number in missing[key]:
                        stored[key].put(number, values)
        except OSError as error:
            raise _unwritable(error) from error

    def complete() -> None:
        try:
            for array in stored.values():  # also those whose chunks another job wrote
                array.complete()
        except OSError as error:
            raise _unwritable(error) from error

    ranks.on_all_ranks(compute)
    ranks.on_rank0(complete)
    return ranks.on_all_ranks(lambda: {key: array.open() for key, array in stored.items()})


def shapes(network: Network, device: torch.device) -> dict[str, tuple[int, ...]]:
    """Pooling -> shape of one image's features, by a forward pass of a black one."""
    image = torch.zeros(1, 3, network.image_size, network.image_size, device=device)
    return {pool: tuple(values.shape[1:]) for pool, values in network.extract(image).items()}


def _identity(network: Network, manifest: Manifest, pool: str, how: Extraction) -> dict[str, Any]:
    return {
        "network": dict(network.identity),
        "data": manifest.fingerprint,
        "image_size": network.image_size,
        "crop_pct": how.crop_pct,
        "pooling": pool,
        "precision": how.precision,
    }


def _missing(stored: Mapping[Key, Stored], what: str) -> dict[Key, list[int]]:
    """Chunks that no file holds. Says how much will be written before it is. Raises UserError."""
    try:
        missing = {key: array.missing() for key, array in stored.items()}
    except OSError as error:
        raise _unwritable(error) from error
    for folder in dict.fromkeys(array.folder.parent for array in stored.values()):
        new = [key for key, array in stored.items() if array.folder.parent == folder and missing[key]]
        size = sum(stored[key].array.bytes for key in new)
        if new:
            some = sum(len(missing[key]) for key in new)
            total = sum(-(-stored[key].array.samples // stored[key].length) for key in new)
            rest = "" if some == total else f", {total - some} of {total} chunks are there already"
            warn(f"features of {what}: {size_text(size)} into {folder} (--no-cache writes none){rest}")
            check_room(folder, 2 * size)  # parts, and the file that is made of them
    return missing


def _mine(
    wanted: Mapping[int, Collection[str]],
    networks: Sequence[Network],
    manifest: Manifest,
    what: str,
    how: Extraction,
    ranks: Coordinator,
    length: int,
) -> Iterator[tuple[int, dict[Key, Tensor]]]:
    """This rank's share of the wanted chunks."""
    numbers = sorted(wanted)[rows_of(len(wanted), ranks.rank, ranks.world)]
    found = chunks(
        {number: wanted[number] for number in numbers},
        {network.name: network.extract for network in networks},
        manifest,
        networks[0].image_size,
        length=length,
        batch=how.batch,
        workers=how.workers if numbers else 0,
        crop_pct=how.crop_pct,
        device=how.device,
    )
    if ranks.rank:
        return found
    return tracked(found, len(numbers), f"features of {what}", f"chunks of {length:,} images")


def _in_memory(
    networks: Sequence[Network],
    manifest: Manifest,
    what: str,
    how: Extraction,
    ranks: Coordinator,
    arrays: Mapping[Key, Array],
    length: int,
) -> dict[Key, Tensor]:
    whole = {key: torch.empty(array.samples, *array.shape) for key, array in arrays.items()}
    wanted = {number: [n.name for n in networks] for number in range(-(-manifest.samples // length))}

    def compute() -> None:
        for number, found in _mine(wanted, networks, manifest, what, how, ranks, length):
            for key, values in found.items():
                whole[key][number * length : (number + 1) * length] = values

    ranks.on_all_ranks(compute)
    for owner in range(ranks.world if ranks.world > 1 else 0):
        for number in range(len(wanted))[rows_of(len(wanted), owner, ranks.world)]:
            for key in arrays:
                dist.broadcast(whole[key][number * length : (number + 1) * length], src=owner)
    return whole


def _unwritable(error: OSError) -> UserError:
    return UserError(
        f"the feature cache cannot be used: {error}; name another folder with --cache, or pass --no-cache to keep the "
        f"features in memory"
    )
