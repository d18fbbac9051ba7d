"""What only a CUDA device can show: 16-bit training on nccl, and forward passes that never wait for the device."""

from __future__ import annotations

import subprocess
from itertools import islice
from pathlib import Path

import pytest
import torch

from mimscale.config.recipes import load_recipe
from mimscale.config.run import method_class
from mimscale.data import shm_pool
from mimscale.data.config import DataConfig
from mimscale.data.device_prefetch import DevicePrefetcher
from mimscale.data.loader import TrainLoader
from mimscale.data.manifest import Manifest
from mimscale.teachers.ensemble import TeacherEnsemble, build_skeletons, describe
from mimscale.teachers.prefetcher import TeacherPrefetcher
from mimscale.types import Batch, Needs, Noise
from tests import ranks
from tests.teachers import tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("method", ["mae", "maskalign"])
@pytest.mark.parametrize("ds_config", ["zero2_fp16", "zero2_bf16", "zero3_fp16", "zero3_bf16"])
def test_trains(method: str, ds_config: str, shards: Path, tmp_path: Path) -> None:
    recipe = ranks.recipe(tmp_path, shards, method, engine={"device": "cuda", "activation_checkpointing": 1})
    words = ranks.command(
        1, "mimscale", "train", recipe, f"engine.ds_config={ds_config}", "--run-dir", tmp_path / "run"
    )
    subprocess.run(words, env=ranks.environment(), check=True)
    losses = list(ranks.curve(tmp_path / "run").values())
    assert len(losses) == 12 and losses[-1] < losses[0]


def drawn(noise: Noise, batch: int) -> torch.Tensor:
    values = torch.rand(batch, *noise.shape)
    return -torch.log1p(-values) if noise.kind == "exponential" else values


@pytest.mark.parametrize("name", ["mae", "maskalign"])
def test_forward_and_backward_never_wait_for_the_device(name: str, tmp_path: Path) -> None:
    run = load_recipe(str(ranks.recipe(tmp_path, tmp_path, name, engine={"device": "cuda"})))
    device = torch.device("cuda")
    skeletons = build_skeletons(run.teachers, 32)
    method = method_class(name)(run, describe(skeletons)).to(device)
    ensemble = TeacherEnsemble(run.teachers, skeletons, method.needs.teachers, 32, device)
    batch = Batch(
        images=torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8),
        ids=torch.arange(4),
        positions=torch.arange(4),
        noise={purpose: drawn(noise, 4) for purpose, noise in method.needs.noise.items()},
        boxes=torch.zeros(4, 4),
        flips=torch.zeros(4, dtype=torch.bool),
    )

    def step(on_device: Batch) -> None:
        normalised = on_device.normalised()
        method(normalised, ensemble(normalised.images))["loss"].backward()

    pinned = batch.pin_memory()
    step(pinned.to(device))  # constants are made and kernels chosen here
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(pinned.to(device))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["bf16", "int8", "fp8"])
def test_teachers_ahead_in_their_own_stream(precision: str) -> None:
    """Equal targets, also while the student keeps the device busy and its memory moving."""
    device = torch.device("cuda")
    config = tiny.timm_config("vit_base_patch16_dinov3", None, random=True, precision=precision,
                              options={"embed_dim": 128, "depth": 3, "num_heads": 4})  # fmt: skip
    ensemble = tiny.ensemble(config, 64, device=device)
    batches = [
        Batch(
            images=torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8),
            ids=torch.full((8,), number),
            positions=torch.arange(8),
            noise={},
            boxes=torch.zeros(8, 4),
            flips=torch.zeros(8, dtype=torch.bool),
        ).pin_memory()
        for number in range(8)
    ]
    seen = []
    for ahead in (False, True):
        sums = []
        prefetcher = TeacherPrefetcher(ensemble, device, DevicePrefetcher(iter(batches), device), ahead=ahead)
        for _ in batches:
            prefetcher.next_batch()
            batch, targets = prefetcher.targets()
            for _ in range(4):
                torch.randn(512, 512, device=device) @ torch.randn(512, 512, device=device)
            attention = targets["t"].cls_attention
            assert attention is not None
            sums.append((batch.images.clone(), targets["t"].levels[2].clone(), attention.clone()))
        seen.append(sums)
    for plain, early in zip(*seen, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(plain, early, strict=True))


@pytest.mark.multi
def test_batches_are_copied_ahead_from_slots_to_the_device(shards: Path) -> None:
    """Pinned from the workers' shared memory, copied in a stream of their own while the device is kept busy."""
    manifest, device = Manifest.load(shards), torch.device("cuda")
    needs = Needs(noise={"mask": Noise("uniform", (7,))})

    def loader(workers: int) -> TrainLoader:
        data = DataConfig(shards=str(shards), image_size=224, workers=workers)
        pin = workers > 0
        return TrainLoader(manifest, data, needs, seed=0, global_batch=16, micro_batch=16, rank=0, world=1, pin=pin)

    plain = list(islice(loader(0), 12))
    ahead = loader(2)
    for expected, prefetched in zip(plain, DevicePrefetcher(iter(ahead), device), strict=False):
        torch.randn(2048, 2048, device=device) @ torch.randn(2048, 2048, device=device)
        batch = prefetched.take()
        assert prefetched.raw.images.is_pinned() and prefetched.ready is not None
        (pool,) = shm_pool._POOLS.values()  # its memory is what is pinned: nothing was copied out of it
        assert 0 <= prefetched.raw.images.data_ptr() - pool.memory(0).ctypes.data < len(pool._bytes)
        assert batch.ids.untyped_storage().data_ptr() == batch.noise["mask"].untyped_storage().data_ptr()  # one copy
        assert torch.equal(prefetched.raw.images, expected.images) and torch.equal(batch.ids.cpu(), expected.ids)
        assert torch.equal(batch.images, expected.to(device).normalised().images)
        assert torch.equal(batch.noise["mask"].cpu(), expected.noise["mask"])
    ahead.close()
