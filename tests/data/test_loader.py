"""Batches are bit-identical for any ranks, workers, micro-batches and resumes."""

from __future__ import annotations

import multiprocessing.util
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mimscale.data import loader as loader_module
from mimscale.data import sample_reader as module
from mimscale.data.config import DataConfig
from mimscale.data.decode import BadImage, Part, Wanted, decode, make_decoder
from mimscale.data.loader import TrainLoader, eval_batches
from mimscale.data.manifest import Manifest
from mimscale.data.sample_reader import DamagedSample, SampleReader
from mimscale.data.shm_pool import SharedMemoryPool
from mimscale.data.transforms import resized_crop, resized_short_side, to_pixels
from mimscale.errors import Stopped, UserError
from mimscale.types import Batch, Needs, Noise

NEEDS = Needs(
    noise={"mask": Noise("uniform", (3, 4)), "jitter": Noise("uniform", (3, 4)), "wait": Noise("exponential", (5,))},
    labels=True,
)
GLOBAL, STEPS = 24, 8  # of 80 samples: more than two epochs


def config(manifest: Manifest, **changes) -> DataConfig:
    return DataConfig(
        **{"shards": manifest.folder, "image_size": 32, "workers": 0, "streams": 4, "block": 8, **changes}
    )


def loader(manifest: Manifest, data: DataConfig | None = None, needs: Needs = NEEDS, **changes) -> TrainLoader:
    values = {"seed": 3, "global_batch": GLOBAL, "micro_batch": GLOBAL, "rank": 0, "world": 1, **changes}
    return TrainLoader(manifest, data or config(manifest), needs, **values)


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    fields = {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    return {**fields, **{f"noise/{name}": value for name, value in batch.noise.items()}}


def by_position(batches: Iterator[Batch]) -> dict[int, dict[str, torch.Tensor]]:
    samples = {}
    for batch in batches:
        for row, position in enumerate(batch.positions.tolist()):
            if batch.weights is not None and not batch.weights[row]:
                continue
            assert position not in samples
            samples[position] = {name: tensor[row] for name, tensor in tensors(batch).items()}
    return samples


def assert_same(one: dict[int, dict[str, torch.Tensor]], two: dict[int, dict[str, torch.Tensor]]) -> None:
    assert one.keys() == two.keys()
    for position, fields in one.items():
        assert fields.keys() == two[position].keys()
        for name, value in fields.items():
            assert torch.equal(value, two[position][name]), (position, name)


@pytest.fixture(scope="module")
def uninterrupted(shards: Path) -> dict[int, dict[str, torch.Tensor]]:
    """All steps, by one rank without workers."""
    return by_position(islice(loader(Manifest.load(shards)), STEPS))


def test_contents_of_a_batch(manifest: Manifest) -> None:
    data = config(manifest)
    batch = next(iter(loader(manifest, data)))
    shapes = {name: (tuple(value.shape), value.dtype) for name, value in tensors(batch).items()}
    assert shapes == {
        "images": ((GLOBAL, 3, 32, 32), torch.uint8),
        "ids": ((GLOBAL,), torch.int64),
        "positions": ((GLOBAL,), torch.int64),
        "boxes": ((GLOBAL, 4), torch.float32),
        "flips": ((GLOBAL,), torch.bool),
        "labels": ((GLOBAL,), torch.int64),
        "noise/mask": ((GLOBAL, 3, 4), torch.float32),
        "noise/jitter": ((GLOBAL, 3, 4), torch.float32),
        "noise/wait": ((GLOBAL, 5), torch.float32),
    }
    assert batch.labels is not None and manifest.labels is not None
    for row, sample in enumerate(batch.ids.tolist()):
        source = make_decoder(data)(manifest.read(sample))
        height, width = source.height, source.width
        box = (batch.boxes[row].double() * torch.tensor([height, width, height, width])).round().int().tolist()
        expected = to_pixels(resized_crop(source, tuple(box), 32, "bicubic"), bool(batch.flips[row]))
        assert np.array_equal(batch.images[row].numpy(), expected)
        assert batch.labels[row] == manifest.labels[sample]


def test_an_epoch_has_every_sample_once(manifest: Manifest) -> None:
    ids = torch.cat([batch.ids for batch in islice(loader(manifest, global_batch=16, micro_batch=4), 20)])
    assert sorted(ids.tolist()) == list(range(80))


@pytest.mark.multi
@pytest.mark.parametrize(("world", "workers", "micro"), [(1, 1, 24), (1, 2, 4), (2, 0, 12), (4, 2, 3), (12, 0, 1)])
def test_batches_do_not_depend_on_ranks_workers_and_micro_batches(
    manifest: Manifest, uninterrupted, world: int, workers: int, micro: int
) -> None:
    per_rank = STEPS * GLOBAL // (world * micro)
    batches = []
    for rank in range(world):
        part = loader(manifest, config(manifest, workers=workers), micro_batch=micro, rank=rank, world=world)
        batches += list(islice(part, per_rank))
        part.close()
    assert_same(by_position(iter(batches)), uninterrupted)


@pytest.mark.multi
@pytest.mark.parametrize(("step", "world", "workers"), [(1, 1, 0), (3, 1, 2), (5, 2, 1)])
def test_a_resumed_run_equals_an_uninterrupted_one(
    manifest: Manifest, uninterrupted, step: int, world: int, workers: int
) -> None:
    batches = []
    for rank in range(world):
        data = config(manifest, workers=workers)
        part = loader(manifest, data, micro_batch=GLOBAL // world, rank=rank, world=world, start_step=step)
        batches += list(islice(part, STEPS - step))
        part.close()
    rest = {position: fields for position, fields in uninterrupted.items() if position >= step * GLOBAL}
    assert_same(by_position(iter(batches)), rest)


@pytest.mark.parametrize(("world", "micro"), [(1, 24), (2, 12), (4, 2), (12, 1)])
def test_uncropped_images_belong_to_positions(manifest: Manifest, world: int, micro: int) -> None:
    """The first 5 of every 24 positions have the uncropped image too, on whatever rank; nothing else changes."""
    found, plain = {}, by_position(islice(loader(manifest), 2))
    for rank in range(world):
        part = loader(manifest, needs=replace(NEEDS, uncropped_images=5), micro_batch=micro, rank=rank, world=world)
        for batch in islice(part, 2 * GLOBAL // (world * micro)):
            assert batch.uncropped is not None and batch.uncropped_rows is not None
            assert (
                batch.uncropped.shape == (len(batch.uncropped_rows), 3, 32, 32) and batch.uncropped.dtype == torch.uint8
            )
            for image, row in zip(batch.uncropped, batch.uncropped_rows.tolist(), strict=True):
                source = make_decoder(config(manifest))(manifest.read(int(batch.ids[row])))
                expected = source.resize((32, 32), Image.Resampling.BICUBIC)
                assert np.array_equal(image.numpy(), to_pixels(expected))
                found[int(batch.positions[row])] = image
            for row, position in enumerate(batch.positions.tolist()):
                assert torch.equal(batch.images[row], plain[position]["images"])
    assert sorted(found) == [0, 1, 2, 3, 4, 24, 25, 26, 27, 28]


def test_noise_does_not_depend_on_other_noise(manifest: Manifest, uninterrupted) -> None:
    """Purposes do not share random numbers, and another purpose changes neither the others nor the pixels."""
    alone = by_position(islice(loader(manifest, needs=Needs(noise={"mask": NEEDS.noise["mask"]})), 1))
    for position, fields in alone.items():
        for name in ("images", "boxes", "noise/mask"):
            assert torch.equal(fields[name], uninterrupted[position][name])
        assert not torch.equal(fields["noise/mask"], uninterrupted[position]["noise/jitter"])
        assert "labels" not in fields


def test_epochs_and_seeds_differ(manifest: Manifest, uninterrupted) -> None:
    seen = {int(fields["ids"]): fields for position, fields in uninterrupted.items() if position < 80}
    later = [fields for position, fields in uninterrupted.items() if 80 <= position < 160]
    other = by_position(islice(loader(manifest, seed=4), 4))
    for fields in (*later, *(f for p, f in other.items() if p < 80)):
        for name in ("boxes", "noise/mask", "noise/wait"):
            assert not torch.equal(fields[name], seen[int(fields["ids"])][name])


def test_flip_and_crop_follow_the_configuration(manifest: Manifest) -> None:
    always = next(iter(loader(manifest, config(manifest, flip=1.0, crop_scale=(1.0, 1.0), crop_ratio=(0.1, 10.0)))))
    assert always.flips.all()
    never = next(iter(loader(manifest, config(manifest, flip=0.0))))
    assert not never.flips.any() and torch.equal(never.boxes, next(iter(loader(manifest))).boxes)


def test_padded_crops_match_their_boxes(manifest: Manifest) -> None:
    """Inside the image a crop equals the resized image; the box of a padded crop may reach a little outside of it."""
    batch = next(iter(loader(manifest, config(manifest, crop="padded", crop_padding=6, interpolation="bilinear"))))
    outside, reader = 0, SampleReader(manifest, make_decoder(config(manifest)))
    for image, sample, box, flip in zip(batch.images, batch.ids, batch.boxes, batch.flips, strict=True):
        resized = to_pixels(resized_short_side(reader.load(int(sample)), 32, "bilinear"))
        height, width = resized.shape[1:]
        top, left = round(float(box[0]) * height), round(float(box[1]) * width)
        assert box.tolist() == pytest.approx([top / height, left / width, 32 / height, 32 / width], abs=1e-6)
        assert -6 <= top <= height + 6 - 32 and -6 <= left <= width + 6 - 32
        rows, columns = np.arange(max(top, 0), min(top + 32, height)), np.arange(max(left, 0), min(left + 32, width))
        ours = image.flip(2) if flip else image
        assert np.array_equal(ours[:, rows[:, None] - top, columns - left], resized[:, rows[:, None], columns])
        outside += len(rows) < 32 or len(columns) < 32
    assert outside > len(batch.ids) / 2 and batch.flips.any() and not batch.flips.all()


@pytest.mark.parametrize(("world", "micro", "start"), [(1, 24, 0), (2, 4, 0), (1, 12, 4), (3, 8, 5)])
def test_consecutive_steps_take_other_crops_of_one_decoded_image(
    manifest: Manifest, world: int, micro: int, start: int
) -> None:
    """With data.crops=3 three steps get the same images with different crops and masks, for any number of ranks."""
    data, plain = config(manifest, crops=3), by_position(islice(loader(manifest), 3))
    expected = by_position(islice(loader(manifest, data), 9))
    assert sorted(expected) == list(range(9 * GLOBAL))
    moved = 0
    for position, fields in expected.items():
        step, offset = divmod(position, GLOBAL)
        assert fields["ids"] == plain[step // 3 * GLOBAL + offset]["ids"]
        if step % 3:
            moved += not torch.equal(fields["boxes"], expected[position - GLOBAL]["boxes"])
            assert not torch.equal(fields["noise/mask"], expected[position - GLOBAL]["noise/mask"])
    assert moved > 0.95 * 6 * GLOBAL  # the images are small, so two boxes may coincide
    assert_same({p: expected[p] for p in range(GLOBAL)}, {p: plain[p] for p in range(GLOBAL)})
    batches = []
    for rank in range(world):
        part = loader(manifest, data, micro_batch=micro, rank=rank, world=world, start_step=start)
        batches += list(islice(part, (9 - start) * GLOBAL // (world * micro)))
        steps = [int(batch.positions[0]) // GLOBAL for batch in batches[-(9 - start) * GLOBAL // (world * micro) :]]
        assert steps == sorted(steps)
    assert_same(by_position(iter(batches)), {p: f for p, f in expected.items() if p >= start * GLOBAL})


def test_a_second_iteration_starts_again(manifest: Manifest) -> None:
    both = loader(manifest, start_step=2)
    assert torch.equal(next(iter(both)).positions, next(iter(both)).positions)
    assert next(iter(both)).positions[0] == 2 * GLOBAL


def test_the_global_generators_are_not_used(manifest: Manifest) -> None:
    torch.manual_seed(0)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    next(iter(loader(manifest)))
    list(eval_batches(manifest, 16, batch=80, workers=0))
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)  # type: ignore[index]


def test_wrong_sizes_are_refused(manifest: Manifest) -> None:
    with pytest.raises(UserError, match="global batch 24 is not a multiple of world size 5 x micro-batch 1"):
        loader(manifest, world=5, micro_batch=1)
    with pytest.raises(UserError, match="rank 2"):
        next(iter(loader(manifest, world=2, micro_batch=12, rank=2)))


def test_missing_labels(manifest: Manifest) -> None:
    manifest.labels = None
    with pytest.raises(UserError, match="needs labels"):
        loader(manifest)
    assert next(iter(loader(manifest, needs=replace(NEEDS, labels=False)))).labels is None
    assert next(iter(eval_batches(manifest, 16, batch=2, workers=0))).labels is None


@pytest.mark.parametrize(("world", "batch"), [(1, 80), (1, 7), (3, 7), (4, 4), (7, 100), (100, 2)])
def test_evaluation_takes_every_sample_once_in_order(manifest: Manifest, world: int, batch: int) -> None:
    """Every rank has the same number of batches of the same size; padding has weight 0 and comes last."""
    parts = [list(eval_batches(manifest, 16, batch=batch, workers=0, rank=r, world=world)) for r in range(world)]
    assert {len(part) for part in parts} == {len(parts[0])}
    assert {len(one.ids) for part in parts for one in part} == {min(batch, -(-80 // world))}
    batches = [one for part in parts for one in part]
    ids = torch.cat([one.ids for one in batches])
    weights = torch.cat([one.weights for one in batches if one.weights is not None])
    assert torch.equal(ids[weights == 1], torch.arange(80)) and weights.sum() == 80 and weights.unique().max() == 1
    for one in batches:
        assert one.labels is not None and manifest.labels is not None
        assert one.labels.tolist() == manifest.labels[one.ids.numpy()].tolist()
        assert one.images.shape == (len(one.ids), 3, 16, 16) and not one.flips.any()


@pytest.mark.multi
def test_evaluation_is_the_same_with_workers(manifest: Manifest) -> None:
    plain = by_position(eval_batches(manifest, 16, batch=7, workers=0))
    assert_same(by_position(eval_batches(manifest, 16, batch=7, workers=2)), plain)


@pytest.fixture
def damaged(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Manifest, int]:
    """A copy of the data set in which the bytes of one image are overwritten."""
    monkeypatch.setattr(module, "RETRY_PAUSES_S", (0.0, 0.0))
    manifest = Manifest.load(Path(shutil.copytree(shards, tmp_path / "damaged")))
    with open(manifest.shard_paths[2], "r+b") as file:
        file.seek(int(manifest.offsets[40]))
        file.write(bytes(64))
    return manifest, 40


@pytest.mark.multi
@pytest.mark.parametrize("workers", [0, 2])
def test_damage_names_shard_and_key(damaged: tuple[Manifest, int], workers: int) -> None:
    manifest, sample = damaged
    with pytest.raises(DamagedSample) as caught:
        list(eval_batches(manifest, 16, batch=10, workers=workers))
    for part in (f"sample {sample} ", manifest.key(sample), "shard-000002.tar", "data_prep verify"):
        assert part in str(caught.value)
    assert isinstance(caught.value, Stopped) and "\n" not in str(caught.value)  # one line
    assert not multiprocessing.active_children()  # although `caught` still holds the frames of the traceback


def test_a_temporary_fault_is_retried(damaged: tuple[Manifest, int], shards: Path) -> None:
    """The shard is replaced by an undamaged one after the first try: the next try opens it again."""
    manifest, sample = damaged
    broken = manifest.shard_paths[2]

    class Repaired(Manifest):
        tries = 0

        def read(self, sample_id: int) -> bytes:
            self.tries += 1
            if self.tries == 2:
                shutil.copy(shards / broken.name, f"{broken}.new")
                os.replace(f"{broken}.new", broken)
            return super().read(sample_id)

    again = Repaired.load(manifest.folder)
    assert isinstance(again, Repaired)
    assert SampleReader(again, decode).load(sample).size == decode(Manifest.load(shards).read(sample)).size
    assert again.tries == 2


def test_a_damaged_sample_is_tried_again_without_pauses(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other crops may not need its damaged part, and a batch must not depend on what its process has met before."""
    slept: list[float] = []
    monkeypatch.setattr(module.time, "sleep", slept.append)

    def decode_upper_half(data: bytes, wanted: Wanted | None = None) -> Image.Image:
        if wanted is None or wanted((48, 48)).bottom > 24:
            raise BadImage("damaged below")
        return decode(data)

    reader = SampleReader(manifest, decode_upper_half)
    for _ in range(2):
        sample, _, found = reader.load_or_substitute(3, 0, 0, 0, wanted=lambda size: Part(20, 20))
        assert (sample, found) == (3, [])
        with pytest.raises(DamagedSample):
            reader.load_or_substitute(3, 0, 0, 0, wanted=lambda size: Part(30, 20))
    tried = {3, *module.substitutes(manifest.samples, 0, 0, 0).tolist()}
    assert len(slept) == len(module.RETRY_PAUSES_S) * len(tried)  # each of them paused the first time


EVALUATE = """
import sys
from pathlib import Path
import mimscale
from mimscale.data.loader import eval_batches
from mimscale.data.manifest import Manifest

shards = Path(sys.argv[1])
kept = list(eval_batches(Manifest.load(shards), 224, batch=20, workers=2))  # more than there are slots
assert [len(batch.images) for batch in kept] == [20] * 4
assert sum(map(len, mimscale.open_shards(shards).batches(20, image_size=224, workers=2))) == 80
"""


@pytest.mark.multi
def test_evaluation_needs_no_room_in_dev_shm(shards: Path) -> None:
    """Where mounts are permitted it gets 64 kB there, and a batch has 3 MB; containers have 64 MB, and batches 40."""
    small = ["unshare", "--mount", "bash", "-c", 'mount -t tmpfs -o size=64k none /dev/shm && exec "$@"', "bash"]
    permitted = subprocess.run([*small, "true"], capture_output=True).returncode == 0
    words = [*(small if permitted else []), sys.executable, "-c", EVALUATE, str(shards)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.multi
def test_workers_that_cannot_start_are_one_line(shards: Path) -> None:
    """Python's queues need room for semaphores in /dev/shm; where mounts are not permitted, files that may be open."""
    full = ["unshare", "--mount", "bash", "-c", 'mount -t tmpfs -o ro none /dev/shm && exec "$@"', "bash"]
    limit = ["bash", "-c", 'ulimit -n 14 && exec "$@"', "bash"]
    permitted = subprocess.run([*full, "true"], capture_output=True).returncode == 0
    code = EVALUATE.replace("kept = ", "import torch, torchvision, simplejpeg, encodings.idna\nkept = ")
    words = [*(full if permitted else limit), sys.executable, "-c", code, str(shards)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "workers = 2: a worker cannot be started (" in done.stderr.splitlines()[-1]


SCRIPT = """
import os, sys, time
from itertools import islice
from pathlib import Path
from mimscale.data.config import DataConfig
from mimscale.types import Needs
from mimscale.data.loader import TrainLoader
from mimscale.data.manifest import Manifest

folder = Path(sys.argv[1])
data = DataConfig(shards=folder, image_size=32, workers=2)
sizes = dict(global_batch=4, micro_batch=4, rank=0, world=1)
batches = iter(TrainLoader(Manifest.load(folder), data, Needs(), seed=0, **sizes))
next(batches), next(batches)  # from each worker one: both ignore the signals now
print(*open(f"/proc/self/task/{os.getpid()}/children").read().split(), flush=True)
"""


def run_script(shards: Path, ending: str) -> tuple[subprocess.Popen[str], list[int]]:
    script = subprocess.Popen([sys.executable, "-c", SCRIPT + ending, str(shards)], stdout=-1, stderr=-1, text=True)
    assert script.stdout is not None
    return script, [int(pid) for pid in script.stdout.readline().split()]


def have_ended(pids: list[int], timeout_s: float) -> bool:
    end = time.monotonic() + timeout_s
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.multi
@pytest.mark.parametrize("ending", ["", "raise RuntimeError('trainer failed')", "sys.exit(3)"])
def test_the_program_ends_with_its_workers(shards: Path, ending: str) -> None:
    script, workers = run_script(shards, ending)
    assert len(workers) == 2
    script.communicate(timeout=30)
    assert script.returncode == {"": 0, "sys.exit(3)": 3}.get(ending, 1)
    assert have_ended(workers, 0.5)


@pytest.mark.multi
@pytest.mark.slow
def test_workers_ignore_the_signals_of_a_job_and_end_with_their_trainer(shards: Path) -> None:
    """SLURM signals every process of a job; only the trainer acts on it."""
    script, workers = run_script(shards, "\nfor batch in batches: time.sleep(0.01)")
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        for pid in workers:
            os.kill(pid, number)
    time.sleep(0.5)
    assert script.poll() is None and all(Path(f"/proc/{pid}").exists() for pid in workers)
    script.kill()
    script.communicate()
    assert have_ended(workers, 20)


@pytest.mark.multi
def test_a_worker_may_be_killed_during_close(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the out-of-memory killer may do."""

    begin = loader_module._begin

    def kill_at_exit(*args: Any) -> None:
        multiprocessing.util.Finalize(None, os.kill, (os.getpid(), signal.SIGKILL), exitpriority=0)
        begin(*args)

    monkeypatch.setattr(loader_module, "_begin", kill_at_exit)
    train_loader = loader(manifest, config(manifest, workers=2))
    next(iter(train_loader))
    train_loader.close()


@pytest.mark.multi
def test_a_worker_that_never_begins_is_started_again(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As one that was forked while another thread held a lock: it waits before it runs any code of ours."""
    begin, first = loader_module._begin, tmp_path / "first"

    def hang_once(begun: int, pool: SharedMemoryPool, worker: int) -> None:
        if worker == 1 and not first.exists():
            first.touch()
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            threading.Event().wait()
        begin(begun, pool, worker)

    monkeypatch.setattr(loader_module, "START_S", 3.0)
    monkeypatch.setattr(loader_module, "_begin", hang_once)
    found = by_position(eval_batches(manifest, 16, batch=7, workers=2))
    assert first.exists() and "all 2 are started again" in capsys.readouterr().err
    assert_same(found, by_position(eval_batches(manifest, 16, batch=7, workers=0)))


@pytest.mark.multi
def test_workers_that_never_begin_end_the_run(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_module, "START_S", 0.5)
    monkeypatch.setattr(loader_module, "STARTS", 2)
    monkeypatch.setattr(loader_module, "_begin", lambda *args: threading.Event().wait())
    with pytest.raises(RuntimeError, match="did not begin within 0.5 s, 2 times"):
        next(eval_batches(manifest, 16, batch=7, workers=1))


def children() -> set[int]:
    return {child.pid or 0 for child in multiprocessing.active_children()}


def limit_with_free_files(count: int) -> int:
    """A limit on descriptors below which so many are free."""
    used, limit = set(map(int, os.listdir("/proc/self/fd"))), 0
    while count:
        count -= limit not in used
        limit += 1
    return limit


def test_a_start_that_fails_leaves_no_worker(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """They ignore SIGTERM, so a process that failed would wait for them at its exit."""
    before = children()

    def endless_then_bad(self: object) -> Iterator[object]:
        raise ValueError("absurd")
        yield

    with monkeypatch.context() as patch:
        patch.setattr(loader_module.PositionSampler, "__iter__", endless_then_bad)
        with pytest.raises(ValueError, match="absurd"):
            next(iter(loader(manifest, config(manifest, workers=3))))
    assert children() <= before
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit_with_free_files(24), hard))
        with pytest.raises(
            UserError, match="data.workers = 20: a worker cannot be started .Too many open files.; raise"
        ):
            next(iter(loader(manifest, config(manifest, workers=20))))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert children() <= before


def test_an_index_that_is_cut_while_it_is_read(manifest: Manifest, tmp_path: Path) -> None:
    """torch takes the worker's SIGBUS for a lack of shared memory."""
    folder = Path(shutil.copytree(manifest.folder, tmp_path / "shards"))
    opened = Manifest.load(folder)
    batches = iter(loader(opened, config(opened, workers=1)))
    next(batches)
    for name in ("index.npy", "labels.npy"):
        os.truncate(folder / name, 0)
    with pytest.raises(UserError, match="index.npy' was cut or replaced while it was in use; make it again"):
        for _ in range(200):
            next(batches)
