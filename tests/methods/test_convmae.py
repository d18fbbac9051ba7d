"""ConvMAE against the official program's numbers, pre-training and fine-tuning, and what its check refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mimscale.convert.formats import convmae, finetune
from mimscale.errors import UserError
from mimscale.methods.convmae import ConvMAE
from mimscale.methods.finetune import Finetune
from mimscale.models.convvit import ConvViT, to_map
from mimscale.models.token_selection import mask_of, raster_order
from mimscale.optim.param_groups import parameter_groups
from tests import golden
from tests.golden import batch_of, close, gradient_close, run_config

STUDENT = {"width": 32, "depth": 2, "heads": 2}
SECTION = {
    "name": "convmae",
    "decoder_width": 16,
    "decoder_depth": 1,
    "decoder_heads": 2,
    "stages": {"widths": [8, 12], "depths": [1, 2]},
}


def sections(c: dict[str, Any], skip_masked: bool = True) -> tuple[dict[str, Any], dict[str, Any]]:
    """(student, stages) of a golden's configuration."""
    student = {"width": c["embed_dims"][2], "depth": c["depths"][2], "heads": c["heads"]}
    stages = {
        "widths": c["embed_dims"][:2],
        "depths": c["depths"][:2],
        "mlp_ratios": c["mlp_ratio"][:2],
        "skip_masked": skip_masked,
    }
    return {**student, "mlp_ratio": c["mlp_ratio"][2]}, stages


def small(student: dict[str, Any] = STUDENT, image_size: int = 64, **values: Any) -> ConvMAE:
    torch.manual_seed(3)
    return ConvMAE(run_config({**SECTION, **values}, student, image_size), {})


def inputs(method: ConvMAE, count: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    side = method.student.grid[0] * method.student.config.patch
    images = torch.randn(count, 3, side, side, generator=generator)
    return images, torch.rand(count, method.student.patches, generator=generator)


def outputs_of(student: ConvViT) -> dict[str, Tensor]:
    """Filled with what each part gives when the student runs, maps as NCHW, under the names of the golden."""
    outputs: dict[str, Tensor] = {}

    def watch(name: str, module: torch.nn.Module) -> None:
        def keep(_module: torch.nn.Module, _inputs: Any, output: Tensor) -> None:
            outputs[name] = to_map(output, student.grid) if output.dim() == 5 else output

        module.register_forward_hook(keep)

    for stage in (1, 2, 3):
        watch(f"patch_embed{stage}", student.get_submodule(f"patch_embed{stage}"))
        for index, block in enumerate(student.get_submodule(f"blocks{stage}").children()):
            watch(f"stage{stage}_block{index}", block)
    watch("patch_embed4", student.patch_embed4)
    watch("stage1_down", student.get_submodule("stage1_output_decode"))
    watch("stage2_down", student.get_submodule("stage2_output_decode"))
    return outputs


@pytest.mark.parametrize("skip_masked", [True, False])
def test_golden(skip_masked: bool) -> None:
    g = golden.load("convmae_dev")
    student, stages = sections(g.config, skip_masked)
    section = {
        "name": "convmae",
        "masking": {"ratio": g.config["mask_ratio"]},
        "norm_pix_loss": g.config["norm_pix_loss"],
        "decoder_width": g.config["dec_dim"],
        "decoder_depth": g.config["dec_depth"],
        "decoder_heads": g.config["dec_heads"],
        "stages": stages,
    }
    method = ConvMAE(run_config(section, student, g.config["img"]), {})
    method.load_state_dict(convmae.from_official(g.part("state")).weights)
    assert isinstance(method.student, ConvViT)

    masks = method.masking.choose(batch_of(g["input/images"], mask=g["mask/noise"]), {})
    ids_keep = masks.visible
    hidden = mask_of(ids_keep, method.student.patches)
    assert torch.equal(ids_keep, g["mask/ids_keep"]) and torch.equal(
        raster_order(masks).ids_restore, g["mask/ids_restore"]
    )
    golden.equal(hidden, g["mask/binary"])
    for stage, side in ((1, 4), (2, 2)):
        windows = (1 - hidden)[:, :, None, None, None].expand(-1, -1, side, side, 1)
        assert torch.equal(to_map(windows, method.student.grid), g[f"mask/stage{stage}_visible"])

    if not skip_masked:  # maps are whole
        outputs = outputs_of(method.student)
        method.student(g["input/images"], ids_keep)
        stored = g.part("enc")
        assert outputs.keys() == stored.keys() and len(stored) == 13
        for name, output in outputs.items():
            close(output, stored[name])
    out = method.student(g["input/images"], ids_keep, levels=range(3))
    for level, output in out.levels.items():
        close(output, g[f"enc/stage3_block{level}"])
    close(out.tokens, g["latent"])
    close(method.decoder.embed(out.tokens), g["dec/embed"])

    batch = batch_of(g["input/images"], mask=g["mask/noise"])
    pred = method.predict(batch, {}).pred
    close(pred, g["prediction"])
    close(method.target(batch.images), g["target"])
    close((pred - method.target(batch.images)).square().mean(-1), g["loss/per_patch"])
    loss = method(batch, {})["loss"]
    golden.loss_close(loss, g["loss/total"][0])
    loss.backward()
    golden.every_parameter_has_a_gradient(method)
    ours = {name: p.grad for name, p in method.named_parameters()}
    gradients = convmae.from_official(g.part("grad")).weights
    assert len(gradients) == 12
    for name, gradient in gradients.items():
        gradient_close(ours[name], gradient)


def test_golden_finetune() -> None:
    g = golden.load("convvit_finetune_dev")
    student, stages = sections(g.config)
    run = run_config({"name": "finetune", "classes": g.config["num_classes"], "stages": stages}, student)
    method = Finetune(run, {})
    state = g.part("state")
    weights = finetune.from_official(state).weights
    method.load_state_dict(weights)
    assert finetune.to_official(weights).weights.keys() == state.keys()
    features = method.features(g["input/images"])
    close(features, g["output/features"])
    close(method.head(features), g["output/logits"])
    method(batch_of(g["input/images"]), {})["loss"].backward()
    golden.every_parameter_has_a_gradient(method)


def test_golden_layer_decay_of_the_finetuned_network() -> None:
    stored = golden.load_json("schedules_dev.json")["convvit_finetune_groups"]
    stages = {"widths": [8, 12], "depths": stored["depth"][:2]}
    student = {**STUDENT, "depth": stored["depth"][2], "drop_path": 0.2}
    method = Finetune(run_config({"name": "finetune", "classes": 10, "stages": stages}, student), {})
    assert method.needs.noise["drop_path"].shape == (sum(stored["depth"]), 2)
    groups = parameter_groups(
        method,
        weight_decay=stored["weight_decay"],
        layer_decay=stored["layer_decay"],
        no_weight_decay=method.no_weight_decay(),
        layer_of=method.layer_of,
    )
    ours = {
        name.removeprefix("student."): [group["lr_scale"], group["weight_decay"]]
        for group in groups
        for name in group["names"]
    }
    assert ours.keys() == stored["name_to_lrscale_wd"].keys()
    for name, values in stored["name_to_lrscale_wd"].items():
        assert ours[name] == pytest.approx(values, rel=1e-12), name


def test_both_ways_give_one_loss_at_other_sizes() -> None:
    changes: list[tuple[dict[str, Any], int, dict[str, Any]]] = [
        ({**STUDENT, "patch": 8}, 40, {"patches": [2, 2, 2]}),
        ({**STUDENT, "mlp_ratio": 2.0}, 80, {"class_token": True, "mlp_ratios": [2.0, 3.0]}),
    ]
    for student, side, stages in changes:
        losses = []
        for skip_masked in (True, False):
            values = {**SECTION["stages"], **stages, "skip_masked": skip_masked}  # type: ignore[dict-item]
            method = small(student, side, stages=values)
            images, noise = inputs(method)
            loss = method(batch_of(images, mask=noise), {})["loss"]
            loss.backward()
            golden.every_parameter_has_a_gradient(method)
            assert all(p.dim() > 0 for p in method.parameters())
            losses.append(loss.detach())
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)


def test_needs_and_drop_path() -> None:
    assert {name: n.shape for name, n in small().needs.noise.items()} == {"mask": (16,)}
    method = small({**STUDENT, "drop_path": 0.5})
    assert method.needs.noise["drop_path"].shape == (5, 2)
    images, noise = inputs(method)
    before = torch.get_rng_state()
    drop = torch.full((3, 5, 2), 0.5)
    kept = method(batch_of(images, mask=noise, drop_path=drop), {})["loss"]
    dropped = method(batch_of(images, mask=noise, drop_path=torch.zeros(3, 5, 2)), {})["loss"]
    again = method(batch_of(images, mask=noise, drop_path=drop), {})["loss"]
    assert kept != dropped and torch.equal(kept, again) and torch.equal(torch.get_rng_state(), before)


def test_view() -> None:
    method = small({**STUDENT, "drop_path": 0.5})
    images, noise = inputs(method)
    view = method.view(batch_of(images, mask=noise), {})
    assert view.mask is not None and view.mask.sum(1).tolist() == [12, 12, 12]
    assert view.reconstruction is not None and view.reconstruction.shape == images.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_fp32(dtype: torch.dtype) -> None:
    method = small()
    images, noise = inputs(method, 8)
    batch = batch_of(images, mask=noise)
    full = method(batch, {})["loss"]
    for parameter in method.parameters():
        parameter.data = parameter.data.to(dtype)
    half = method(batch, {})["loss"]
    assert half.dtype == torch.float32
    half.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())
    torch.testing.assert_close(half, full, rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("method", "fragment"),
    [
        ({"masking": {"ratio": 0.95}}, "leaves 0 of 16"),
        ({"stages": {"patches": [4, 2, 4]}}, "multiply to 32, student.patch is 16"),
        ({"stages": {"patches": [4, 4]}}, "method.stages.patches"),
        ({"stages": {"widths": [0, 12]}}, "method.stages.widths.0 = 0"),
        ({"stages": {"mlp_ratios": [0.01, 1.0], "widths": [8, 8]}}, "less than one channel"),
        ({"stages": {"width": [8, 12]}}, "unknown key method.stages.width; did you mean 'widths'"),
    ],
)
def test_refusals(method: dict[str, Any], fragment: str) -> None:
    with pytest.raises(UserError, match=fragment) as error:
        small(**method)
    assert "\n" not in str(error.value)


def test_refuses_a_teacher_and_a_class_token_that_is_not_there() -> None:
    from tests.methods.test_maskalign import INFO

    with pytest.raises(UserError, match="neither convmae nor the masking policy random uses it"):
        ConvMAE(run_config(SECTION, STUDENT), {"t": INFO})
    finetune: dict[str, Any] = {"name": "finetune", "classes": 3}
    with pytest.raises(UserError, match="stages.class_token is false"):
        Finetune(run_config({**finetune, "pool": "cls", "stages": {}}, STUDENT), {})
    with pytest.raises(UserError, match="unknown key method.stages.width; did you mean 'widths'"):
        run_config({**finetune, "stages": {"width": 3}}, STUDENT)
