"""Hugging Face transformers' folder of a student: ViTModel or BeitModel, with its classifier, or MAE with its decoder.

ViTModel always has a last norm, so a method that trains none gets one of weight 1 and bias 0, as in timm. A ViT whose
classifier takes the mean of the patches becomes BeitForImageClassification: ViTForImageClassification knows only the
class token, and a BEiT without relative positions is the same network (`networks.without_key_bias`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from mimscale.config.run import RunConfig
from mimscale.convert import check
from mimscale.convert.difference import Differences, random_input, relative_difference
from mimscale.convert.formats import transformers as names
from mimscale.convert.formats.timm import with_last_norm
from mimscale.convert.hub_folder import HubModel, preprocessing_of
from mimscale.convert.hub_timm import LAST_NORM
from mimscale.convert.names import State, below, parts_of
from mimscale.convert.networks import Student, StudentInfo, classifier_of, load, without_key_bias
from mimscale.convert.read import Loaded
from mimscale.errors import UserError
from mimscale.methods.base import masking_class
from mimscale.methods.mae import MAEConfig, masked_patch_loss
from mimscale.models.beit import Beit
from mimscale.models.convvit import ConvViT
from mimscale.models.decoder import MAEDecoder
from mimscale.models.targets import pixel_target
from mimscale.models.token_selection import raster_order
from mimscale.models.vit import LN_EPS, ViT
from mimscale.types import Masks

LIBRARY, EXTRA = "transformers", "pip install -e '.[huggingface]'"
UNCHECKED = f"{LIBRARY} is not installed: read back and compared by our own reader only; to compare with it, {EXTRA}"
KEY_BIAS = "left out: the bias of the keys, which changes no output (BEiT has none)"
RESAMPLING = {"bilinear": 2, "bicubic": 3}  # numbers of Pillow's filters


class Class(NamedTuple):
    """A class of transformers. arguments: of `from_pretrained`, as a user has to give them."""

    name: str
    model_type: str
    arguments: Mapping[str, Any] = {}


VIT = Class("ViTModel", "vit", {"add_pooling_layer": False})
VIT_CLASSIFIER = Class("ViTForImageClassification", "vit")
BEIT = Class("BeitModel", "beit")
BEIT_CLASSIFIER = Class("BeitForImageClassification", "beit")
MAE = Class("ViTMAEForPreTraining", "vit_mae")


def model_of(loaded: Loaded, vit: Student, info: StudentInfo, with_head: bool) -> HubModel:
    """Raises UserError for ConvMAE's encoder, and where what stands on the encoder has no class in transformers."""
    if isinstance(vit, ConvViT):
        raise UserError(
            f"{loaded.path} holds ConvMAE's encoder, which transformers has no class for; choose --to student, or "
            "--to official"
        )
    if with_head and loaded.run is not None and loaded.run.method.name != "finetune":
        return _mae(loaded, vit, loaded.run)
    if with_head:
        return _classifier(loaded, vit)
    left = () if info.final_norm else (LAST_NORM,)
    kind = BEIT if isinstance(vit, Beit) else VIT
    weights = names.named_encoder(with_last_norm(vit.state_dict()))
    config = _config(kind, vit) | ({"use_mean_pooling": False} if kind == BEIT else {})

    def compare(folder: Path) -> Differences:
        with torch.no_grad():
            theirs = _load(kind, folder)(_image(vit)).last_hidden_state
        return {"encoder": relative_difference(check.tokens_of(vit), theirs)}

    return _model(kind, loaded, vit, weights, config, compare, "image-feature-extraction", left)


def _classifier(loaded: Loaded, vit: ViT | Beit) -> HubModel:
    head = classifier_of(loaded)
    mean = "fc_norm.weight" in head
    network = without_key_bias(vit) if mean and isinstance(vit, ViT) else vit
    kind = BEIT_CLASSIFIER if isinstance(network, Beit) else VIT_CLASSIFIER
    encoder = {**network.state_dict(), **{n: t for n, t in head.items() if n.startswith("fc_norm.")}}
    root = f"{kind.model_type}."
    weights = names.named_encoder(encoder, root) | {f"classifier.{n}": t for n, t in below("head.", head).items()}
    labels = {str(index): f"LABEL_{index}" for index in range(len(head["head.weight"]))}
    config = _config(kind, network) | {"id2label": labels, "label2id": {name: int(i) for i, name in labels.items()}}
    if kind == BEIT_CLASSIFIER:
        config |= {"use_mean_pooling": mean}

    def compare(folder: Path) -> Differences:
        with torch.no_grad():
            theirs = _load(kind, folder)(_image(vit)).logits
        return {"logits": relative_difference(check.logits_of(vit, head), theirs)}

    left = (KEY_BIAS,) if network is not vit else ()
    return _model(kind, loaded, vit, weights, config, compare, "image-classification", left)


def _mae(loaded: Loaded, vit: ViT | Beit, run: RunConfig) -> HubModel:
    """MAE with its decoder. Its masks in transformers are random, with the recipe's share of visible patches."""
    method = run.method
    plain = isinstance(method, MAEConfig) and method.low_pass_radius is None
    if not plain or parts_of(loaded.weights) != {"student", "decoder"} or not isinstance(vit, ViT):
        raise UserError(
            f"--with-head: transformers has no class for what method.name = {method.name} of {loaded.path} trains on "
            "its encoder; leave it out"
        )
    mae = cast(MAEConfig, method)
    decoder = MAEDecoder(
        in_width=vit.config.width,
        width=mae.decoder_width,
        depth=mae.decoder_depth,
        heads=mae.decoder_heads,
        mlp_ratio=mae.decoder_mlp_ratio,
        patch=vit.config.patch,
        grid=vit.grid,
    ).eval()
    load(decoder, below("decoder.", loaded.weights), loaded.path)
    counts = masking_class(mae).counts(mae.masking, run)
    visible = counts.visible * counts.factor**2
    config = _config(MAE, vit) | {
        "decoder_hidden_size": mae.decoder_width,
        "decoder_num_hidden_layers": mae.decoder_depth,
        "decoder_num_attention_heads": mae.decoder_heads,
        "decoder_intermediate_size": int(mae.decoder_width * mae.decoder_mlp_ratio),
        "mask_ratio": _mask_ratio(mae.masking.ratio, vit.patches, visible),
        "norm_pix_loss": mae.norm_pix_loss,
    }

    def compare(folder: Path) -> Differences:
        image, noise = _image(vit), random_input(1, vit.patches)
        order = noise.argsort(dim=1)
        masks = Masks(order[:, :visible], order[:, visible:])
        raster = raster_order(masks)
        with torch.no_grad():
            theirs = _load(MAE, folder)(image, noise=noise)
            pixels = decoder(vit.eval()(image, masks.visible).tokens, raster)
            target = pixel_target(image, vit.config.patch, mae.norm_pix_loss)
            loss = masked_patch_loss(pixels, target, raster.mask)
        return {
            "reconstruction": relative_difference(pixels, theirs.logits),
            "loss": relative_difference(loss, theirs.loss),
        }

    weights = names.to_official(loaded.weights).weights
    return _model(MAE, loaded, vit, weights, config, compare, "image-feature-extraction", ())


def _mask_ratio(ratio: float, patches: int, visible: int) -> float:
    """The recipe's ratio; another of the same number of visible patches where transformers would round to another."""
    return ratio if int(patches * (1 - ratio)) == visible else 1 - (visible + 0.5) / patches


def _model(
    kind: Class,
    loaded: Loaded,
    vit: Student,
    weights: State,
    config: dict[str, Any],
    compare: Any,
    task: str,
    left: tuple[str, ...],
) -> HubModel:
    arguments = "".join(f", {name}={value}" for name, value in kind.arguments.items())
    return HubModel(
        library=LIBRARY,
        weights=weights,
        config=config,
        files={"preprocessor_config.json": _preprocessor(loaded, vit)},
        compare=compare if find_spec(LIBRARY) is not None else None,
        usage=f"transformers.{kind.name}.from_pretrained('PATH'{arguments})",
        task=task,
        left=left,
        unchecked=UNCHECKED,
    )


def _config(kind: Class, vit: ViT | Beit) -> dict[str, Any]:
    """config.json. Our dropout is 0 and our norms' eps is MAE's, which is not transformers' default."""
    config: dict[str, Any] = {
        "architectures": [kind.name],
        "model_type": kind.model_type,
        "hidden_size": vit.config.width,
        "num_hidden_layers": vit.config.depth,
        "num_attention_heads": vit.config.heads,
        "intermediate_size": int(vit.config.width * vit.config.mlp_ratio),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": LN_EPS,
        "image_size": vit.grid[0] * vit.config.patch,
        "patch_size": vit.config.patch,
        "num_channels": 3,
    }
    if not isinstance(vit, Beit):
        return config | {"qkv_bias": True}
    return config | {
        "use_absolute_position_embeddings": vit.positions == "absolute",
        "use_relative_position_bias": vit.positions == "per_block",
        "use_shared_relative_position_bias": vit.positions == "relative",
        "layer_scale_init_value": vit.layer_scale or 0.0,
        "drop_path_rate": 0.0,
    }


def _preprocessor(loaded: Loaded, vit: Student) -> dict[str, Any]:
    """preprocessor_config.json: short side, then centre crop, which ViT's own processor does not do."""
    images = preprocessing_of(vit, loaded)
    side = {"height": images.image_size, "width": images.image_size}
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": round(images.image_size / images.crop_pct)},
        "resample": RESAMPLING[images.interpolation],
        "do_center_crop": True,
        "crop_size": side,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(images.mean),
        "image_std": list(images.std),
    }


def _image(vit: Student) -> Tensor:
    return random_input(1, 3, *(side * vit.config.patch for side in vit.grid))


def _load(kind: Class, folder: Path) -> Any:
    """transformers' network of the folder, in float32 and eval mode, as its `from_pretrained` loads it.

    Raises RuntimeError where it lacks a tensor or does not use one, which it would only warn of.
    """
    with _quiet():
        import transformers

        found = getattr(transformers, kind.name).from_pretrained(
            str(folder), local_files_only=True, output_loading_info=True, **kind.arguments
        )
    network, info = found
    wrong = [f"{what}: {sorted(map(str, info[what]))[:3]}" for what in info if what.endswith("_keys") and info[what]]
    if wrong:
        raise RuntimeError(f"{kind.name} does not take the tensors as they are ({'; '.join(wrong)})")
    return network.float().eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without progress bars and without the warnings of transformers, and those of torch about torchao, which
    transformers imports where it is installed.
    """
    noisy = logging.getLogger("torch.utils._pytree")
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        from transformers.utils import logging as theirs

        verbosity, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
        theirs.set_verbosity_error()
        theirs.disable_progress_bar()
        try:
            yield
        finally:
            theirs.set_verbosity(verbosity)
            if bars:
                theirs.enable_progress_bar()
    finally:
        noisy.setLevel(level)
