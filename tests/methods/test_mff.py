"""MFF against the official program's numbers, and the properties that make it MFF."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mimscale.convert.formats import openmmlab
from mimscale.errors import UserError
from mimscale.methods.mae import MAE
from mimscale.methods.mff import MFF
from mimscale.models.fusion import LevelFusion
from mimscale.models.targets import low_pass
from mimscale.models.token_selection import mask_of, raster_order
from mimscale.optim.param_groups import is_decayed
from tests import golden
from tests.golden import batch_of, close, gradient_close, run_config

STUDENT = {"width": 32, "depth": 4, "heads": 2}
DECODER = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}


def small(**values: object) -> MFF:
    torch.manual_seed(3)
    return MFF(run_config({"name": "mff", "fusion": {"levels": [0, 2, 3]}, **DECODER, **values}, STUDENT), {})


def inputs(count: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(count, 3, 64, 64, generator=generator), torch.rand(count, 16, generator=generator)


def test_golden() -> None:
    g = golden.load("mff_dev")
    run = golden.mae_run(g.config, {"name": "mff", "fusion": {"levels": g.config["out_indices"]}})
    method = MFF(run, {})
    method.load_state_dict(openmmlab.from_official(g.part("state")).weights)
    masks = method.masking.choose(batch_of(g["image"], mask=g["noise"]), {})
    ids_keep = masks.visible
    assert torch.equal(raster_order(masks).ids_restore, g["ids_restore"])
    golden.equal(mask_of(ids_keep, method.student.patches), g["mask"])

    levels = g.config["out_indices"]
    assert isinstance(method.fusion, LevelFusion)
    out = method.student(g["image"], ids_keep, levels=range(run.student.depth), apply_norm=False)
    for level, output in out.levels.items():
        close(output, g[f"enc_block_out/{level}"])
    assert torch.equal(out.tokens, out.levels[3])
    for j, level in enumerate(levels[:-1]):
        close(method.fusion.projections[j](out.levels[level]), g[f"proj_out/{j}"])
    fused = method.fusion([out.levels[level] for level in levels])
    close(fused.tokens, g["fused_before_norm"])
    close(fused.weights, g["fusion_weights_softmax"])

    batch = batch_of(g["image"], mask=g["noise"])
    latent, fused_latent, scalars = method.encode(batch, ids_keep)
    assert fused_latent is latent
    close(latent, g["latent"])
    assert list(scalars) == ["weight_0", "weight_1", "weight_3"]
    close(torch.stack(list(scalars.values())), g["fusion_weights_softmax"])
    close(method.predict(batch, {}).pred, g["pred"])
    close(method.target(batch.images), g["target"])
    outputs = method(batch, {})
    assert outputs.keys() == {"loss", *scalars}
    golden.loss_close(outputs["loss"], g["loss"])

    outputs["loss"].backward()
    ours = {name: p.grad for name, p in method.named_parameters()}
    stored = openmmlab.from_official(g.part("grad")).weights
    assert len(stored) >= 8 and "fusion.logits" in stored
    for name, gradient in stored.items():
        gradient_close(ours[name], gradient)
    golden.every_parameter_has_a_gradient(method)


def test_golden_names() -> None:
    state = golden.load("mff_dev").part("state")
    ours = openmmlab.from_official(state)
    assert not ours.notes
    back = openmmlab.to_official(ours.weights).weights
    assert back.keys() == state.keys() and all(torch.equal(back[name], tensor) for name, tensor in state.items())


def test_who_is_decayed() -> None:
    """The release exempts tokens, norms and biases; the fusion logits match none of its exemptions."""
    method = small()
    decayed = {n for n, p in method.named_parameters() if is_decayed(n, p, method.no_weight_decay())}
    assert {"fusion.logits", "fusion.projections.0.weight", "student.patch_embed.proj.weight"} <= decayed
    assert not decayed & {"student.cls_token", "decoder.mask_token", "fusion.projections.0.bias", "student.norm.weight"}
    assert method.no_weight_decay() <= {name for name, _ in method.named_parameters()}


def test_one_level_is_mae() -> None:
    method = small(fusion={"levels": [3]})
    mae = MAE(run_config({"name": "mae", **DECODER}, STUDENT), {})
    mae.load_state_dict(method.state_dict())
    images, noise = inputs()
    batch = batch_of(images, mask=noise)
    outputs = method(batch, {})
    assert torch.equal(outputs["loss"], mae(batch, {})["loss"])
    outputs["loss"].backward()
    golden.every_parameter_has_a_gradient(method)
    official = openmmlab.to_official(method.state_dict()).weights
    frozen = {**official, "backbone.proj_weights": torch.ones(1, 1, 1, 1)}
    mapped = openmmlab.from_official(frozen)
    assert mapped.weights.keys() == method.state_dict().keys() and len(mapped.notes) == 1


def test_low_frequencies_can_be_its_target() -> None:
    method, (images, _) = small(low_pass_radius=8, norm_pix_loss=False), inputs()
    plain = small(norm_pix_loss=False)
    close(method.target(images), plain.target(low_pass(images, 8)))
    assert not torch.equal(method.target(images), plain.target(images))


@pytest.mark.parametrize("recompute", [0, 1])
def test_every_parameter_has_a_gradient_with_drop_path(recompute: int) -> None:
    torch.manual_seed(3)
    section = {"name": "mff", "fusion": {"levels": [0, 2, 3]}, **DECODER}
    student = {**STUDENT, "drop_path": 0.3}
    method = MFF(run_config(section, student, engine={"activation_checkpointing": recompute}), {})
    assert {name: n.shape for name, n in method.needs.noise.items()} == {"mask": (16,), "drop_path": (4, 2)}
    images, noise = inputs()
    before = torch.get_rng_state()
    kept = batch_of(images, mask=noise, drop_path=torch.full((3, 4, 2), 0.99))
    loss = method(kept, {})["loss"]
    loss.backward()
    golden.every_parameter_has_a_gradient(method)
    dropped = replace(kept, noise={"mask": noise, "drop_path": torch.zeros(3, 4, 2)})
    assert method(dropped, {})["loss"] != loss and torch.equal(method(kept, {})["loss"], loss)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_fp32(dtype: torch.dtype) -> None:
    method = small()
    images, noise = inputs(8)
    batch = batch_of(images, mask=noise)
    full = method(batch, {})["loss"]
    for parameter in method.parameters():
        parameter.data = parameter.data.to(dtype)
    outputs = method(batch, {})
    assert all(value.dtype == torch.float32 for value in outputs.values())
    outputs["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())
    torch.testing.assert_close(outputs["loss"], full, rtol=5e-3, atol=0)


@pytest.mark.parametrize(
    ("values", "fragment"),
    [
        ({"fusion": {"levels": [0, 2]}}, "ascending, from 0 or more to 3"),
        ({"fusion": {"levels": [0, 4]}}, "ascending, from 0 or more to 3"),
        ({"fusion": {"levels": [1, 0, 3]}}, "must be ascending"),
        ({"fusion": {"levels": [1, 1, 3]}}, "must be ascending"),
        ({"fusion": {"levels": [-1, 3]}}, "must be ascending"),
        ({"fusion": {"levels": []}}, "method.fusion: kind = mff has nothing to fuse"),
        ({"masking": {"ratio": 0.99}}, "leaves 0 of 16"),
        ({"low_pass_radius": 90}, "passes 4096 of 4096"),
    ],
)
def test_refusals(values: dict[str, object], fragment: str) -> None:
    with pytest.raises(UserError, match=fragment) as error:
        small(**values)
    assert "\n" not in str(error.value)


def test_default_levels_do_not_fit_another_depth() -> None:
    with pytest.raises(
        UserError, match=r"fusion.levels = \[0, 2, 4, 6, 8, 11\] must be ascending, from 0 or more to 3"
    ):
        MFF(run_config({"name": "mff", **DECODER}, STUDENT), {})
