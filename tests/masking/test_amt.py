"""AMT's masks against the release's numbers, and the table of importance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mimscale.config.run import RunConfig, method_class
from mimscale.convert.formats import mae as official_mae
from mimscale.convert.formats import simmim as official_simmim
from mimscale.errors import UserError
from mimscale.masking._amt_importance import crop_importance, importance_from_attention, to_bytes
from mimscale.masking.amt import AMT, UNKNOWN
from mimscale.masking.attention import attentive_order
from mimscale.methods.mae import MAE
from mimscale.methods.simmim import SimMIM
from mimscale.models.patches import unpatchify
from mimscale.types import Batch, Masks, StepInfo, Targets, TeacherInfo, normalised
from tests import golden
from tests.golden import batch_of, close, gradient_close, run_config

STUDENT = {"width": 32, "depth": 2, "heads": 2}
AMT_HALF = {"policy": "amt", "ratio": 0.45, "drop_ratio": 0.4, "warmup_epochs": 0}


class GivenImportance(AMT):
    """Draws by a given importance: the goldens hold it as floats, after the release's own crop."""

    unit_importance: Tensor

    def choose(self, batch: Batch, targets: Mapping[str, Targets]) -> Masks:
        return self.draw(self.unit_importance, batch.noise["mask"])


def set_importance(method: Any, run: RunConfig, importance_BU: Tensor) -> None:
    policy = GivenImportance(run.method.masking, run, {})  # type: ignore[attr-defined]
    policy.unit_importance = importance_BU
    method.masking = policy


# ------------------------------------------------------------------------------------------------------------- goldens


def test_golden_mae() -> None:
    g = golden.load("amt_mae_dev")
    c = g.config
    run = golden.mae_run(c, {"masking": {**AMT_HALF, "ratio": c["mask_ratio"], "drop_ratio": c["throw_ratio"]}})
    method = golden.mae_method(run, official_mae.from_official(g.part("state")).weights)
    set_importance(method, run, g["patch_weights"])
    batch = batch_of(g["image"], mask=g["exponential_noise"])

    masks = method.masking.choose(batch, {})
    assert torch.equal(attentive_order(g["patch_weights"], g["exponential_noise"]), g["ids_shuffle"])
    for ours, name in ((masks.masked, "ids_masked"), (masks.visible, "ids_visible")):
        assert torch.equal(ours.sort().values, g[name].sort().values)
    pred, raster, _ = method.predict(batch, {})
    dropped = raster.dropped(36)
    assert dropped is not None and torch.equal(dropped, (g["mask_flag"] == -1).float())
    close(pred, g["pred"])
    close(method.target(batch.images), g["target_full"])
    loss = method(batch, {})["loss"]
    golden.loss_close(loss, g["loss"])
    loss.backward()
    ours_by_name = dict(method.named_parameters())
    stored = official_mae.from_official({**g.part("state"), **g.part("grad")}).weights
    asked = official_mae.from_official(
        {**{k: torch.zeros_like(t) for k, t in g.part("state").items()}, **g.part("grad")}
    )
    named = [name for name, tensor in asked.weights.items() if tensor.abs().sum() > 0]
    assert len(named) == len(g.part("grad")) == 8
    for name in named:
        gradient_close(ours_by_name[name].grad, stored[name])


def enlarged(quarter_B3hw: Tensor) -> Tensor:
    return F.interpolate(quarter_B3hw, scale_factor=4)


def simmim_golden(name: str, changes: Mapping[str, Tensor] | None = None) -> tuple[golden.Golden, SimMIM, Batch]:
    """changes: of the stored weights."""
    g = golden.load(name)
    c = g.config
    masking = {**AMT_HALF, "ratio": c["mask_ratio"], "drop_ratio": c["throw_ratio"], "unit": c["mask_unit"]}
    section = {
        "name": "simmim",
        "masking": masking,
        "positions": "absolute",
        "layer_scale": c["layer_scale_init"],
    }
    student = {"width": c["embed"], "depth": c["depth"], "heads": c["heads"], "patch": c["patch"]}
    run = run_config(section, student, c["img"])
    method = SimMIM(run, {})
    method.load_state_dict({**official_simmim.from_official(g.part("state")).weights, **(changes or {})})
    set_importance(method, run, g["unit_weights"])
    ranks = g["unit_order"].argsort(dim=1)  # the order is stored, not its noise: torch's differs between versions
    noise = g["unit_weights"] / (ranks.shape[1] - ranks)
    assert torch.equal(attentive_order(g["unit_weights"], noise), g["unit_order"])
    return g, method, batch_of(enlarged(g["image_quarter"]), mask=noise)


def gamma_1_of_ones(name: str) -> dict[str, Tensor]:
    """The release does not apply gamma_1, which equals a gamma_1 of ones."""
    state = official_simmim.from_official(golden.load(name).part("state")).weights
    return {key: torch.ones_like(tensor) for key, tensor in state.items() if key.endswith("gamma_1")}


@pytest.mark.parametrize("name", ["amt_simmim_dev", "amt_simmim_layerscale"])
def test_golden_simmim(name: str) -> None:
    g, method, batch = simmim_golden(name, gamma_1_of_ones(name))
    assert method.masking.count[:3] == (14, 22, 49)
    pred, raster, _ = method.predict(batch, {})
    dropped = raster.dropped(196)
    assert dropped is not None
    flags = raster.scatter(raster.mask, 196) - dropped
    assert torch.equal(flags.view(-1, 14, 14), g["mask_flag"].float())
    tokens = method.student(batch.images, raster.scatter(raster.mask, 196), None, raster.ids).tokens
    close(tokens[:, 1:].transpose(1, 2).unflatten(2, (12, 12)), g["z"])
    shown = unpatchify(pred, (12, 12))[: len(g["reconstruction"])]
    close(shown, g["reconstruction"])
    loss = method(batch, {})["loss"]
    golden.loss_close(loss, g["loss"])
    loss.backward()
    ours = dict(method.named_parameters())
    stored = official_simmim.from_official(g.part("grad")).weights
    assert len(stored) == len(g.part("grad")) >= 7
    for parameter, gradient in stored.items():
        gradient_close(ours[parameter].grad, gradient)
    attention = method.student(batch.images, attention=True).attention
    assert attention is not None
    close(attention, g["cls_attention_last_block"])
    close(importance_from_attention(attention), g["mask_weights"].flatten(1))


def test_the_layer_scale_that_the_release_omits_is_applied() -> None:
    g, method, batch = simmim_golden("amt_simmim_layerscale")
    loss = method(batch, {})["loss"]
    assert abs(float(loss) / float(g["loss"]) - 1) > 1e-3
    loss.backward()
    golden.every_parameter_has_a_gradient(method)


# --------------------------------------------------------------------------------------------------------- the policy


def small(masking: dict[str, Any] | None = None, **sections: Any) -> MAE:
    torch.manual_seed(0)
    decoder = {"decoder_width": 32, "decoder_heads": 4, "decoder_depth": 1}
    method = MAE(
        run_config({"name": "mae", "masking": {**AMT_HALF, **(masking or {})}, **decoder}, STUDENT, **sections), {}
    )
    method.before_run(10)
    return method


def policy(method: Any) -> AMT:
    assert isinstance(method.masking, AMT)
    return method.masking


def last_block(method: MAE) -> Any:
    student: Any = method.student
    return student.blocks[-1]


def rows(method: Any) -> Tensor:
    table = policy(method).table
    assert table is not None
    return table.rows


def batch_at(first: int, count: int = 2) -> Batch:
    """Positions first ... of an order in which position p holds sample 3 p mod 10; the even ones have uncropped
    images.
    """
    generator = torch.Generator().manual_seed(first)
    images = torch.randn(count, 3, 64, 64, generator=generator)
    positions = torch.arange(first, first + count)
    uncropped_rows = torch.nonzero(positions % 2 == 0).flatten()
    return replace(
        batch_of(images, mask=torch.empty(count, 16).exponential_(generator=generator)),
        ids=3 * positions % 10,
        positions=positions,
        uncropped=torch.randint(0, 256, (len(uncropped_rows), 3, 64, 64), generator=generator, dtype=torch.uint8),
        uncropped_rows=uncropped_rows,
    )


def step_info(batch: Batch, skipped: bool = False) -> StepInfo:
    return StepInfo(1, 10, skipped, ({"loss": torch.zeros(())},), batch, {}, lambda prefix: iter(()))


def step(method: Any, first: int) -> Batch:
    batch = method.prepare(batch_at(first))
    method.after_step(step_info(batch))
    return batch


def test_counts_are_the_releases() -> None:
    def counts(masking: dict[str, Any], size: int = 224) -> tuple[int, int, int]:
        run = run_config({"name": "mae", "masking": {"policy": "amt", **masking}}, STUDENT, size)
        return AMT.counts(run.method.masking, run)[:3]  # type: ignore[attr-defined]

    assert counts({"ratio": 0.45, "drop_ratio": 0.4}) == (30, 88, 196)
    assert counts({"ratio": 0.75}) == (49, 147, 196)  # attention-driven masking alone
    assert counts({"ratio": 0.44, "drop_ratio": 0.26, "unit": 32}) == (14, 22, 49)
    assert counts({"ratio": 0.45, "drop_ratio": 0.4}, 96) == (6, 16, 36)


def test_patches_of_high_importance_are_masked_and_those_of_low_importance_visible() -> None:
    method = small()
    importance = torch.linspace(0, 1, 16).expand(4000, 16)
    noise = torch.empty(4000, 16).exponential_(generator=torch.Generator().manual_seed(0))
    masks = policy(method).draw(importance, noise)
    masked = torch.zeros(16).scatter_add(0, masks.masked.flatten(), torch.ones(masks.masked.numel())) / 4000
    visible = torch.zeros(16).scatter_add(0, masks.visible.flatten(), torch.ones(masks.visible.numel())) / 4000
    assert masked[0] == 0 and masked[15] > 0.7 and visible[0] == 1 and visible[15] < 0.03
    assert masks.visible.shape[1] == 3 and masks.masked.shape[1] == 7
    together = torch.cat(masks, dim=1).sort().values
    assert (together[:, 1:] > together[:, :-1]).all()


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_importance_draws_uniformly(value: float) -> None:
    method = small()
    noise = torch.empty(2, 16).exponential_(generator=torch.Generator().manual_seed(0))
    masks = policy(method).draw(torch.full((2, 16), value), noise)
    assert torch.equal(torch.cat([masks.masked, masks.visible], dim=1)[:, :7], noise.argsort(dim=1)[:, :7])


def test_uncropped_images_update_the_table_with_the_current_student() -> None:
    method = small()
    assert (rows(method) == UNKNOWN).all()
    batch = batch_at(0)
    step(method, 0)
    with torch.no_grad():
        assert batch.uncropped is not None
        attention = method.student(normalised(batch.uncropped), attention=True).attention
    assert torch.equal(rows(method)[0], to_bytes(importance_from_attention(attention))[0])
    assert (rows(method)[1:] == UNKNOWN).all()
    with torch.no_grad():
        last_block(method).attn.qkv.weight.mul_(3)
    before = rows(method)[0].clone()
    step(method, 10)  # sample 0 again, another image, another student
    assert not torch.equal(rows(method)[0], before)


def test_a_batch_holds_the_importance_of_its_samples_and_crops_it() -> None:
    method = small()
    for first in (6, 8):
        step(method, first)
    batch = method.prepare(batch_at(6, 4))
    assert batch.importance is not None and torch.equal(batch.importance, rows(method)[batch.ids])
    assert batch.uncropped is None  # the policy keeps it in host memory until the step is done
    boxed = replace(batch, boxes=torch.rand(4, 4) * 0.5, flips=torch.tensor([True, False, True, False]))
    importance = policy(method).importance(boxed, {})
    assert importance is not None
    close(importance, crop_importance(batch.importance / 255, (4, 4), 16, boxed.boxes, boxed.flips))


def test_during_the_warm_up_masks_are_those_of_random() -> None:
    """10 samples, warm-up of 1.2 epochs: the global batch of positions 10, 11 is the last uniform one."""
    method, plain = small({"warmup_epochs": 1.2}), MAE(run_config({"name": "mae"}, STUDENT), {})
    for first in (0, 10):
        batch = step(method, first)
        assert batch.importance is None
        for ours, theirs in zip(method.masking.choose(batch, {}), plain.masking.choose(batch, {}), strict=True):
            assert torch.equal(ours, theirs)
    assert method.prepare(batch_at(12)).importance is not None


TEACHER = TeacherInfo("tiny", dim=48, depth=2, grid=(4, 4), image_size=64, has_cls=True)
STAGES = {"patches": [4, 2, 2], "widths": [8, 16], "depths": [1, 1]}
METHODS: dict[str, dict[str, Any]] = {
    "mae": {},
    "mff": {"fusion": {"kind": "mff", "levels": [0, 1]}},
    "pixmim": {"low_pass_radius": 8},
    "simmim": {"masking": {"unit": 16}},
    "convmae": {"stages": STAGES},
    "mrmae": {"stages": {**STAGES, "class_token": True}},
    "maskalign": {"levels": "top1"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_with_it(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    decoder = {"decoder_width": 32, "decoder_heads": 4, "decoder_depth": 1}
    section = {"name": name, **(decoder if name not in ("simmim", "maskalign") else {}), **METHODS[name]}
    section["masking"] = {**AMT_HALF, **section.get("masking", {})}
    run = run_config(section, STUDENT)
    has_teacher = name in ("mrmae", "maskalign")
    method = method_class(name)(run, {"tiny": TEACHER} if has_teacher else {}).to(dtype)
    method.before_run(10)
    features = {1: torch.randn(2, 16, 48)}
    targets = {"tiny": Targets(features, {1: torch.randn(2, 48)})} if has_teacher else {}
    batch = step(method, 0)
    assert not (rows(method)[0] == UNKNOWN).all()
    loss = method(batch, targets)["loss"]
    loss.backward()
    assert torch.isfinite(loss)
    golden.every_parameter_has_a_gradient(method)
    view = method.view(batch, targets)
    assert view is not None and view.dropped is not None and view.attention is not None


def test_attention_that_is_nan_leaves_the_row_unchanged() -> None:
    method = small()
    step(method, 0)
    before = rows(method).clone()
    with torch.no_grad():
        last_block(method).norm1.bias.fill_(float("nan"))
    step(method, 10)
    assert torch.equal(rows(method), before)


def test_constant_attention_counts_as_zero_and_still_trains() -> None:
    method = small()
    with torch.no_grad():
        last_block(method).attn.qkv.weight.zero_()
    step(method, 0)
    assert (rows(method)[0] == 0).all()
    batch = method.prepare(batch_at(10))
    assert torch.isfinite(method(batch, {})["loss"])


def test_a_skipped_step_updates_the_table_too() -> None:
    """The student has not changed, so its attention is as valid as after the step before."""
    skipped, taken = small(), small()
    for method, flag in ((skipped, True), (taken, False)):
        method.after_step(step_info(method.prepare(batch_at(0)), flag))
    assert torch.equal(rows(skipped), rows(taken)) and not (rows(skipped)[0] == UNKNOWN).all()


def test_uncropped_images_of_a_step_that_was_rolled_back_are_discarded() -> None:
    method = small()
    method.prepare(batch_at(0))
    step(method, 2)
    assert (rows(method)[0] == UNKNOWN).all() and not (rows(method)[6] == UNKNOWN).all()


def test_a_view_shows_dropped_patches_and_importance() -> None:
    method = small()
    batch = method.prepare(batch_at(0))
    view = method.view(batch, {})
    assert view is not None and view.mask is not None and view.dropped is not None and view.attention is not None
    assert view.dropped.sum(dim=1).tolist() == [6, 6] and view.mask.sum(dim=1).tolist() == [7, 7]
    assert not (view.dropped * view.mask).any()


@pytest.mark.parametrize(
    ("masking", "words"),
    [
        ({"ratio": 0.6, "drop_ratio": 0.4}, "ratio = 0.6 and drop_ratio = 0.4 leave 0 of 16 patches visible"),
        ({"ratio": 0.02}, "at least one is masked"),
        ({"unit": 8}, "unit = 8 must be a multiple of student.patch = 16"),
        ({"refresh": 0}, "refresh = 0"),
        ({"refresh": 1.5}, "refresh = 1.5"),
        ({"drop_ration": 0.4}, "unknown key method.masking.drop_ration; did you mean 'drop_ratio'?"),
        ({"warmup_epochs": -1}, "warmup_epochs = -1"),
    ],
)
def test_bad_input(masking: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        small(masking)
    assert words in str(caught.value) and "\n" not in str(caught.value)
