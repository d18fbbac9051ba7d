"""The ensemble: what it loads, what it says it loaded, what it refuses; files and where they come from."""

from __future__ import annotations

import argparse
import json
import os
import pickle
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import torch._dynamo.utils
from safetensors.torch import load_file, save_file

from mimscale.errors import UserError
from mimscale.teachers import ensemble as ensembles
from mimscale.teachers import quantise, weights
from mimscale.teachers.config import TeacherConfig
from mimscale.teachers.ensemble import TeacherEnsemble, build_skeletons
from mimscale.types import TeacherNeeds
from tests.teachers import tiny

DINO = "vit_base_patch16_224.dino"
SIGLIP = "vit_base_patch16_siglip_224"


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.saved(tiny.timm_model(DINO, 32), tmp_path_factory.mktemp("dino") / "w.safetensors")


def test_two_teachers_and_only_those_that_are_needed(dino: Path) -> None:
    configs = {
        "dino": tiny.timm_config(DINO, dino),
        "siglip": tiny.timm_config(SIGLIP, None, random=True, image_size=64),
        "unused": tiny.timm_config(DINO, Path("absent.safetensors")),
    }
    needs = {"dino": TeacherNeeds(cls_attention=True), "siglip": TeacherNeeds(levels=(2,))}
    skeletons = build_skeletons(configs, 32)
    ensemble = TeacherEnsemble(configs, skeletons, needs, 32, tiny.CPU)
    targets = ensemble(tiny.images(2, 32))
    assert set(targets) == {"dino", "siglip"}
    assert targets["dino"].cls_attention is not None and targets["dino"].cls_attention.shape == (2, 4)
    assert targets["siglip"].levels[2].shape == (2, 16, 32) and not targets["siglip"].cls
    for name in needs:
        assert ensemble.teachers[name].info == skeletons[name].info
    assert ensemble.teachers["dino"] is skeletons["dino"]  # built once


def test_teachers_with_equal_input_share_their_pixels() -> None:
    def of(model: str, **changes: Any) -> TeacherConfig:
        return tiny.timm_config(model, None, random=True, **changes)

    configs = {"a": of(DINO), "b": of("deit3_small_patch16_224"), "c": of(SIGLIP), "d": of(DINO, image_size=64)}
    ensemble = tiny.ensemble_of(configs, dict.fromkeys(configs, TeacherNeeds(levels=(0,))), 32)
    inputs_of: dict[str, torch.Tensor] = {}
    for name, teacher in ensemble.teachers.items():
        teacher.register_forward_pre_hook(lambda module, inputs, name=name: inputs_of.update({name: inputs[0]}))
    ensemble(tiny.images(1, 32))
    assert inputs_of["a"] is inputs_of["b"] and len({tensor.data_ptr() for tensor in inputs_of.values()}) == 3
    for name, teacher in ensemble.teachers.items():
        assert torch.equal(inputs_of[name], teacher.preprocess(tiny.images(1, 32)))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", pytest.param("int8", marks=pytest.mark.skipif(
    bool(quantise.unavailable()), reason="torchao does not fit this torch"))])  # fmt: skip
def test_compiled_blocks_compute_the_same(precision: str) -> None:
    config = tiny.timm_config("vit_base_patch16_dinov3", None, random=True, precision=precision)
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    plain, compiled = (tiny.ensemble(config.model_copy(update={"compile": flag}), 32) for flag in (False, True))
    compiled.check()  # of another size, and it compiles nothing
    ours, reference = compiled(tiny.images(2, 32))["t"], plain(tiny.images(2, 32))["t"]
    assert ours.cls_attention is not None and reference.cls_attention is not None
    assert graphs["unique_graphs"] == (1 if precision == "fp32" else 2)  # not one per block
    limit = 1e-5 if precision == "fp32" else 1e-2  # fused kernels round to bf16 less often
    for a, b in ((ours.levels[2], reference.levels[2]), (ours.cls_attention, reference.cls_attention)):
        assert float((a.float() - b.float()).norm() / b.float().norm()) < limit


@pytest.mark.parametrize(
    ("changes", "device", "fault", "expected", "why"),
    [
        ({}, "cpu", "", False, "auto compiles on a GPU only"),
        ({}, "cuda", "", True, "compile = auto"),
        ({"precision": "fp8"}, "cuda", "", True, "compile = auto"),
        ({}, "cuda", "triton is not installed", False, "triton is not installed"),
        ({"compile": False}, "cuda", "", False, "compile = false"),
        ({"compile": True}, "cpu", "", True, "compile = true"),
        ({"compile": True}, "cpu", "no C++ compiler", False, "no C++ compiler"),
        ({"shard": True}, "cuda", "", False, "its parameters are split over the ranks"),
    ],
)
def test_which_teachers_are_compiled_and_why(
    changes: dict[str, Any], device: str, fault: str, expected: bool, why: str
) -> None:
    config = tiny.timm_config(DINO, None, random=True, **changes)
    assert ensembles.compiles(config, torch.device(device), fault) == (expected, why)


def test_an_eager_8_bit_teacher_is_refused_on_a_gpu() -> None:
    config = tiny.timm_config(DINO, None, random=True, precision="fp8", compile=False)
    with pytest.raises(UserError, match="compile = false with precision = fp8: uncompiled it takes twice") as error:
        ensembles.check_compiled("t", config, torch.device("cuda"))
    assert "\n" not in str(error.value)
    ensembles.check_compiled("t", config, torch.device("cpu"))
    ensembles.check_compiled("t", config.model_copy(update={"compile": "auto"}), torch.device("cuda"))


@pytest.mark.parametrize("change", [{"compile": True}, {"precision": "fp8"}])
def test_what_cannot_be_split_over_ranks(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="shard = true with .*use one or the other"):
        tiny.timm_config(DINO, None, shard=True, **change)


def test_identities_are_content_and_json(dino: Path) -> None:
    configs = {"a": tiny.timm_config(DINO, dino), "b": tiny.timm_config(DINO, None, random=True)}
    identities = tiny.ensemble_of(configs, dict.fromkeys(configs, TeacherNeeds()), 32).identities()
    assert identities["a"] == {"library": "timm", "model": DINO, "sha256": weights.sha256(dino), "random": False}
    assert identities["b"] == {"library": "timm", "model": DINO, "sha256": None, "random": True}
    assert json.loads(json.dumps(identities)) == identities


@pytest.mark.parametrize("config", [tiny.timm_config(DINO, None, random=True),
                                    tiny.open_clip_config("ViT-B-16", None, random=True)])  # fmt: skip
def test_random_weights_depend_on_the_name_alone(config: TeacherConfig) -> None:
    def build(name: str, seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        ensemble = tiny.ensemble_of({name: config}, {name: TeacherNeeds()}, 32)
        assert torch.equal(torch.get_rng_state(), before)
        return ensemble.teachers[name].state_dict()

    first, again, other = build("a", 1), build("a", 2), build("b", 1)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_loading_draws_no_random_numbers(dino: Path) -> None:
    before = torch.get_rng_state()
    tiny.ensemble(tiny.timm_config(DINO, dino), 32)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("config", "needs", "line"),
    [
        (tiny.timm_config(SIGLIP, None), TeacherNeeds(cls_attention=True), "no class token.*use random masking or a"),
        (tiny.timm_config(DINO, None), TeacherNeeds(levels=(3,)), "blocks 0 to 2; level 3 does not exist"),
        (tiny.timm_config("vit_base_patch16_224", Path("none.pth")), TeacherNeeds(), "not exist; copy it there"),
        (tiny.timm_config("vit_base_patch16_224", None), TeacherNeeds(), "neither weights nor a tag; .* are .*dino"),
        (tiny.timm_config(DINO, Path("nowhere.pth")), TeacherNeeds(), "nowhere.pth does not exist; run `mimscale"),
    ],
)  # fmt: skip
def test_refusals(config: TeacherConfig, needs: TeacherNeeds, line: str) -> None:
    with pytest.raises(UserError, match=line) as error:
        tiny.ensemble(config, 32, needs)
    assert "\n" not in str(error.value)


def test_a_teacher_that_is_not_in_the_recipe() -> None:
    with pytest.raises(UserError, match="needs teachers.clip, which the recipe does not have"):
        tiny.ensemble_of({}, {"clip": TeacherNeeds()}, 32)


# ------------------------------------------------------------------------------------------------ files


def test_wrong_sha256_names_both_and_reads_nothing(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"not even safetensors")
    wrong = "0" * 64
    with pytest.raises(UserError, match=f"{wrong}, but .* has {weights.sha256(path)}"):
        tiny.ensemble(tiny.timm_config(DINO, path, sha256=wrong), 32)
    with pytest.raises(UserError, match="(is not a whole safetensors file|cannot be read as a torch checkpoint)"):
        tiny.ensemble(tiny.timm_config(DINO, path, sha256=weights.sha256(path)), 32)


def official_style(state: dict[str, Any]) -> dict[str, Any]:
    """As training scripts save: wrapped, with DDP's prefix and their arguments."""
    return {
        "model": {f"module.{key}": tensor for key, tensor in state.items()},
        "args": argparse.Namespace(lr=0.1),
        "epoch": 3,
    }


def test_torch_files(dino: Path, tmp_path: Path) -> None:
    state = load_file(dino)
    plain, wrapped = tmp_path / "plain.pth", tmp_path / "wrapped.pth"
    torch.save(state, plain)
    torch.save(official_style(state), wrapped)
    images = tiny.images(1, 32)
    outputs = [tiny.ensemble(tiny.timm_config(DINO, path), 32)(images)["t"] for path in (dino, plain, wrapped)]
    for output in outputs[1:]:
        assert torch.equal(output.levels[2], outputs[0].levels[2])


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["BOMB"],)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_never_runs(zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOMB", str(tmp_path / "ran"))
    path = tmp_path / "w.pth"
    torch.save({"model": Bomb()}, path) if zipped else path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(
        UserError,
        match="cannot be read as a torch checkpoint .*(posix.mkdir, which could run code|no pickle of tensors)",
    ) as error:
        tiny.ensemble(tiny.timm_config(DINO, path), 32)
    assert "\n" not in str(error.value) and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.9])
def test_a_truncated_file_is_one_line(suffix: str, share: float, dino: Path, tmp_path: Path) -> None:
    path = tmp_path / f"w{suffix}"
    save_file(load_file(dino), path) if suffix == ".safetensors" else torch.save(load_file(dino), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(
        UserError, match="(is not a whole safetensors file|cannot be read as a torch checkpoint)"
    ) as error:
        tiny.ensemble(tiny.timm_config(DINO, path), 32)
    assert "\n" not in str(error.value)


def test_torchscript_archives_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(UserError, match="is a TorchScript archive, which holds code") as error:
        tiny.ensemble(tiny.open_clip_config("ViT-B-16", path), 32)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"blocks.1.mlp.fc1.weight": None}, r"'blocks.1.mlp.fc1.weight' is absent in the file and \[128, 32\] in the"),
        ({"extra.weight": torch.ones(2)}, r"'extra.weight' is \[2\] in the file and absent in the model"),
        ({"blocks.0.attn.proj.bias": torch.ones(7)}, r"'blocks.0.attn.proj.bias' is \[7\] in the file and \[32\]"),
        ({"pos_embed": torch.ones(5)}, "is not a checkpoint of this model"),
    ],
)
def test_a_file_that_does_not_fit(change: dict[str, Any], line: str, dino: Path, tmp_path: Path) -> None:
    state = {key: tensor for key, tensor in {**load_file(dino), **change}.items() if tensor is not None}
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=line) as error:
        tiny.ensemble(tiny.timm_config(DINO, tmp_path / "w.safetensors"), 32)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("value", "precision"), [(float("nan"), "fp32"), (1e5, "fp16")])
def test_weights_that_are_not_finite(value: float, precision: str, dino: Path, tmp_path: Path) -> None:
    state = load_file(dino)
    state["blocks.1.attn.qkv.weight"][0, 0] = value
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=f"'blocks.1.attn.qkv.weight' is not finite in {precision}; ") as error:
        tiny.ensemble(tiny.timm_config(DINO, tmp_path / "w.safetensors", precision=precision), 32)
    assert "\n" not in str(error.value)


def test_a_teacher_whose_targets_are_not_finite(dino: Path, tmp_path: Path) -> None:
    """Finite weights that overflow in 16 bit; the same ones are finite in fp32."""
    state = load_file(dino)
    state["patch_embed.proj.weight"] *= 2e4
    save_file(state, tmp_path / "w.safetensors")
    tiny.ensemble(tiny.timm_config(DINO, tmp_path / "w.safetensors"), 32).check()
    broken = tiny.ensemble(tiny.timm_config(DINO, tmp_path / "w.safetensors", precision="fp16"), 32)
    with pytest.raises(
        UserError, match="precision = fp16: the patch tokens of block 0 are not finite .* use bf16"
    ) as e:
        broken.check()
    assert "\n" not in str(e.value)


def test_no_teacher_passes_the_check() -> None:
    tiny.ensemble_of({}, {}, 32).check()


# ------------------------------------------------------------------------------------------------ the hub's cache


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def put(cache: Path, repo: str, files: dict[str, bytes]) -> None:
    """Files in the cache's layout on disk."""
    folder, revision = cache / f"models--{repo.replace('/', '--')}", "a" * 40
    for part in ("refs", f"snapshots/{revision}"):
        (folder / part).mkdir(parents=True)
    (folder / "refs" / "main").write_text(revision)
    for name, data in files.items():
        (folder / "snapshots" / revision / name).write_bytes(data)


def test_a_cached_file_is_used(dino: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    put(cache, "timm/vit_base_patch16_224.dino", {"model.safetensors": dino.read_bytes()})
    images = tiny.images(1, 32)
    ensemble = tiny.ensemble(tiny.timm_config("vit_base_patch16_224", None, pretrained="dino"), 32)
    local = tiny.ensemble(tiny.timm_config(DINO, dino), 32)
    assert torch.equal(ensemble(images)["t"].levels[2], local(images)["t"].levels[2])
    assert ensemble.identities()["t"]["sha256"] == weights.sha256(dino)


def test_each_library_takes_the_file_with_its_names(cache: Path, tmp_path: Path) -> None:
    """A hub repository may hold the same weights twice."""
    path = tiny.saved(tiny.open_clip_model("ViT-B-16", 32), tmp_path / "clip.safetensors")
    files = {"model.safetensors": b"timm's names", "open_clip_model.safetensors": path.read_bytes()}
    put(cache, "laion/CLIP-ViT-B-16-laion2B-s34B-b88K", files)
    config = tiny.open_clip_config("ViT-B-16", None, pretrained="laion2b_s34b_b88k", activation=None)
    assert tiny.ensemble(config, 32).identities()["t"]["sha256"] == weights.sha256(path)


@pytest.mark.parametrize("variable", ["SLURM_JOB_ID", "HF_HUB_OFFLINE"])
def test_nothing_is_downloaded_in_a_job(variable: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(UserError, match="not in the local cache.*run `mimscale doctor RECIPE --fetch`"):
        tiny.ensemble(tiny.timm_config(DINO, None), 32)
