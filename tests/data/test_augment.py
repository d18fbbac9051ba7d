"""RandAugment, erasing and mixing: timm's own results, and the same images however a global batch is split."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import Mixup, one_hot
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import str_to_pil_interp

from mimscale.data import augment, noise
from mimscale.data.config import DataConfig
from mimscale.data.device_prefetch import DevicePrefetcher
from mimscale.data.loader import TrainLoader
from mimscale.data.manifest import Manifest
from mimscale.errors import UserError
from mimscale.types import Batch, Mixing, Needs
from tests.golden import run_config

CPU = torch.device("cpu")
MIXING = Mixing(mixup=0.8, cutmix=1.0, prob=0.9, switch=0.5, classes=4, smoothing=0.1)
NEEDS = Needs(labels=True, mixing=MIXING)
GLOBAL, STEPS = 24, 4  # of 80 samples: more than an epoch
RELEASE = "rand-m9-mstd0.5-inc1"
Sample = tuple[torch.Tensor, torch.Tensor, int]


def config(manifest: Manifest, **changes) -> DataConfig:
    on = {"rand_augment": RELEASE, "random_erasing": 0.5, "colour_jitter": (0.4, 0.4, 0.4)}
    return DataConfig(
        **{"shards": manifest.folder, "image_size": 32, "workers": 0, "streams": 4, "block": 8, **on, **changes}
    )


def samples(
    manifest: Manifest, *, steps: int = STEPS, world: int = 1, micro: int = GLOBAL, needs: Needs = NEEDS, **changes
) -> dict[int, Sample]:
    """position -> (image, soft labels, sample id) as the method gets them on the device."""
    data, how = (
        config(manifest, **{k: v for k, v in changes.items() if k in DataConfig.model_fields}),
        {k: v for k, v in changes.items() if k not in DataConfig.model_fields},
    )
    found: dict[int, Sample] = {}
    for rank in range(world):
        loader = TrainLoader(
            manifest, data, needs, seed=3, global_batch=GLOBAL, micro_batch=micro, rank=rank, world=world, **how
        )
        batches = DevicePrefetcher(iter(loader), CPU, augment.DeviceAugmentation(data, needs.mixing, micro))
        for prefetched in islice(batches, steps * GLOBAL // (world * micro)):
            batch = prefetched.take()
            assert len(batch.images) == len(batch.ids) == micro and batch.partners is None
            soft = batch.soft_labels if batch.soft_labels is not None else torch.zeros(micro)
            for position, image, labels, sample in zip(batch.positions, batch.images, soft, batch.ids, strict=True):
                assert int(position) not in found
                found[int(position)] = image.clone(), labels.clone(), int(sample)
        loader.close()
    return found


def assert_same(one: dict[int, Sample], two: dict[int, Sample]) -> None:
    assert one.keys() == two.keys()
    for position, (image, labels, sample) in one.items():
        other = two[position]
        assert sample == other[2] and torch.equal(image, other[0]) and torch.equal(labels, other[1]), position


def test_no_bit_of_a_posterised_image_is_left() -> None:
    """timm asks for 0 bits at magnitude 10, which a deviation of the magnitude reaches; Pillow 13 refuses that."""
    transform = augment.make_rand_augment(DataConfig(shards="none", rand_augment="rand-m10-inc1-n1"))
    assert transform is not None
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    found = {}
    for op in transform.ops:  # type: ignore[attr-defined]
        if op.name == "PosterizeIncreasing":
            op.prob = 1.0
            found = {bits: np.asarray(op.aug_fn(image, bits)) for bits in range(9)}
            assert not np.asarray(op(image)).any()
    for bits, pixels in found.items():
        assert np.array_equal(pixels, np.asarray(image) & (256 - 2 ** (8 - bits)))
    assert len(found) == 9


@pytest.fixture(scope="module")
def uninterrupted(shards) -> dict[int, Sample]:
    return samples(Manifest.load(shards))


@pytest.mark.multi
@pytest.mark.parametrize(
    ("world", "workers", "micro"), [(1, 2, 4), (2, 0, 12), (2, 0, 3), (1, 0, 1), (4, 1, 6), (8, 0, 3), (24, 0, 1)]
)
def test_images_do_not_depend_on_ranks_workers_and_micro_batches(
    manifest: Manifest, uninterrupted: dict[int, Sample], world: int, workers: int, micro: int
) -> None:
    assert_same(uninterrupted, samples(manifest, world=world, workers=workers, micro=micro))


@pytest.mark.parametrize(("start", "world", "micro"), [(2, 1, 24), (3, 3, 4)])
def test_a_resumed_run_equals_an_uninterrupted_one(
    manifest: Manifest, uninterrupted: dict[int, Sample], start: int, world: int, micro: int
) -> None:
    later = samples(manifest, steps=STEPS - start, start_step=start, world=world, micro=micro)
    assert_same({p: s for p, s in uninterrupted.items() if p >= start * GLOBAL}, later)


def test_the_same_crops_of_one_decoded_image(manifest: Manifest) -> None:
    assert_same(samples(manifest, crops=2, steps=4), samples(manifest, crops=2, steps=4, world=2, micro=3))


def test_pairs_share_a_draw(manifest: Manifest, uninterrupted: dict[int, Sample]) -> None:
    """What one image of a pair gives away of its label the other gets; most pairs are mixed, some are not."""
    assert manifest.labels is not None
    mixed, off = 0, MIXING.smoothing / MIXING.classes
    for first in range(0, STEPS * GLOBAL, 2):
        (_, one, id_of_one), (_, two, id_of_two) = uninterrupted[first], uninterrupted[first + 1]
        labels = torch.tensor([int(manifest.labels[id_of_one]), int(manifest.labels[id_of_two])])
        hot = one_hot(labels, MIXING.classes, on_value=1 - MIXING.smoothing + off, off_value=off)
        torch.testing.assert_close(one + two, hot.sum(0))
        mixed += bool((one - hot[0]).abs().max() > 1e-6)
    assert 0.3 * STEPS * GLOBAL / 2 < mixed < STEPS * GLOBAL / 2


@pytest.mark.parametrize(
    ("mixup", "cutmix", "prob"), [(0.8, 1.0, 1.0), (0.8, 0.0, 1.0), (0.0, 1.0, 1.0), (0.8, 1.0, 0.5)]
)
def test_a_pair_is_mixed_as_timm_mixes_it(mixup: float, cutmix: float, prob: float) -> None:
    mixing = Mixing(mixup, cutmix, prob, switch=0.5, classes=7, smoothing=0.1)
    timm_mixes = Mixup(mixup, cutmix, prob=prob, label_smoothing=0.1, num_classes=7)
    random_images = torch.Generator().manual_seed(0)
    kinds = set()
    for key in range(40):
        images, labels = torch.randn(2, 3, 20, 20, generator=random_images), torch.tensor([key % 7, 3])
        with augment.keyed_generators() as seed:
            seed(key)
            drawn = torch.from_numpy(np.stack([augment.draw_mixing(mixing, 20)] * 2))
            seed(key)
            expected, soft = timm_mixes(images.clone(), labels)
        ours = augment.mix(batch_of(images, labels, {augment.MIX: drawn}, partners=torch.tensor([1, 0])), mixing, own=2)
        kinds.add("cut" if drawn[0, 6] else "mixed" if drawn[0, 0] != 1 else "left")
        assert torch.equal(ours.images, expected)
        assert ours.soft_labels is not None
        torch.testing.assert_close(ours.soft_labels, soft, atol=1e-7, rtol=0)
    assert kinds == {*(["cut"] if cutmix else []), *(["mixed"] if mixup else []), *(["left"] if prob < 1 else [])}


def batch_of(images: torch.Tensor, labels: torch.Tensor, drawn: dict[str, torch.Tensor], **more) -> Batch:
    count = len(images)
    where = torch.arange(count)
    return Batch(
        images=images,
        ids=where,
        positions=where,
        noise=drawn,
        boxes=torch.zeros(count, 4),
        flips=torch.zeros(count, dtype=torch.bool),
        labels=labels,
        **more,
    )


def test_erasing_is_timms() -> None:
    images, keys = torch.zeros(64, 3, 24, 24), torch.arange(64) * 2**50 - 5
    augment.erase(images, keys, 0.25)
    eraser = RandomErasing(0.25, mode="pixel", device="cpu")
    with augment.keyed_generators(CPU) as seed:
        for image, key in zip(images, keys.tolist(), strict=True):
            seed(key)
            assert torch.equal(image, eraser(torch.zeros(3, 24, 24)))
    erased = images.flatten(1).any(1)
    assert 4 < erased.sum() < 32
    assert images[erased].ne(0).float().mean() < 0.5 and images[images != 0].std() == pytest.approx(1, abs=0.1)


def test_rand_augment_is_timms(manifest: Manifest) -> None:
    """The crop without it, and timm's transform with the settings of `create_transform` under the position's key."""
    plain = {"random_erasing": 0.0, "colour_jitter": (0.0, 0.0, 0.0), "flip": 0.5, "decoder": "pillow"}
    with_it, without = (
        next(iter(TrainLoader(manifest, config(manifest, **plain, rand_augment=policy), Needs(), **WHOLE)))
        for policy in (RELEASE, None)
    )
    settings = {"translate_const": 14, "img_mean": (124, 116, 104), "interpolation": str_to_pil_interp("bicubic")}
    transform = rand_augment_transform(RELEASE, settings)
    changed = 0
    for row, position in enumerate(without.positions.tolist()):
        image = Image.fromarray(without.images[row].permute(1, 2, 0).numpy())
        with augment.keyed_generators() as seed:
            seed(int(noise.raw(3, "rand_augment", *divmod(position, manifest.samples), n=1)[0]))
            expected = torch.from_numpy(np.array(transform(image))).permute(2, 0, 1)
        assert torch.equal(with_it.images[row], expected)
        changed += not torch.equal(expected, without.images[row])
    assert changed > GLOBAL / 2


WHOLE: dict[str, Any] = {"seed": 3, "global_batch": GLOBAL, "micro_batch": GLOBAL, "rank": 0, "world": 1}


def test_generators_are_left_as_they_were(manifest: Manifest) -> None:
    def state() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    expected = state()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    samples(manifest, steps=1)
    assert state() == expected


def test_center_crops_are_those_of_evaluation(manifest: Manifest) -> None:
    off = {"rand_augment": None, "random_erasing": 0.0, "colour_jitter": (0.0, 0.0, 0.0), "decoder": "pillow"}
    data = config(manifest, crop="center", flip=0.0, crop_pct=0.9, **off)
    batch = next(iter(TrainLoader(manifest, data, Needs(labels=True), **WHOLE)))
    from mimscale.data.loader import eval_batches

    whole = next(eval_batches(manifest, 32, batch=manifest.samples, workers=0, crop_pct=0.9))
    assert torch.equal(batch.images, whole.images[batch.ids])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("randaug", "is not understood; give rand and, once each"),
        ("rand-m9-x3", "is not understood"),
        ("rand-m9-m8", "is not understood"),
        ("rand-m9.5", "is not understood"),
        ("rand-m99", "m = 99 must be from 0 to 30"),
        ("rand-n0", "n = 0 must be from 1 to 16"),
        ("rand-p2", "p = 2 must be from 0 to 1"),
    ],
)
def test_a_policy_that_is_not_understood(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(shards="none", rand_augment=text)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"mixup_prob": 0.5}, "mixup_prob = 0.5 with mixup = cutmix = 0: nothing is mixed; set one of these above 0"),
        ({"mixup": -1}, "method.mixup = -1"),
        ({"mixup": 0.8, "classes": 1}, "method.classes = 1"),
        ({"cutmix": 1e3}, "method.cutmix = 1000"),
        ({"cutmix": 1, "mixup_switch": 2}, "method.mixup_switch = 2"),
    ],
)
def test_mixing_that_cannot_be(section: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_config({"name": "finetune", "classes": 4, **section}, {"width": 32, "depth": 2, "heads": 2})


def test_an_odd_global_batch_cannot_be_mixed() -> None:
    from mimscale.methods.finetune import Finetune

    schedule = {"global_batch": 5, "steps": 2, "base_lr": 1e-3}
    student = {"width": 32, "depth": 2, "heads": 2}
    run = run_config({"name": "finetune", "classes": 4, "mixup": 0.8}, student, schedule=schedule)
    with pytest.raises(UserError, match="schedule.global_batch = 5 is odd, but method.mixup and method.cutmix mix"):
        Finetune.check(run, {})
    off = run.model_copy(update={"method": run.method.model_copy(update={"mixup": 0.0})})
    Finetune.check(off, {})


def test_soft_labels_reach_the_loss(manifest: Manifest) -> None:
    from mimscale.methods.finetune import Finetune

    section = {"name": "finetune", "classes": 4, "mixup": 0.8, "cutmix": 1.0, "head_std": 0.1}
    method = Finetune(run_config(section, {"width": 32, "depth": 2, "heads": 2, "patch": 8}, 32), {})
    data = config(manifest)
    assert method.needs.mixing == replace(MIXING, prob=1.0)
    loader = TrainLoader(manifest, data, method.needs, **WHOLE)
    prefetched = next(
        DevicePrefetcher(iter(loader), CPU, augment.DeviceAugmentation(data, method.needs.mixing, GLOBAL))
    )
    batch = prefetched.take()
    assert batch.soft_labels is not None
    expected = -(batch.soft_labels * method.logits(batch.images).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(method(batch, {})["loss"], expected)
    hard = method(replace(batch, soft_labels=None), {})["loss"]
    assert not torch.isclose(hard, expected)
