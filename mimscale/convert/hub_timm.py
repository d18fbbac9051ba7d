"""timm's folder: `timm.create_model("local-dir:PATH", pretrained=True)`, or `hf_hub:ORG/NAME` after a push."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mimscale.convert import check
from mimscale.convert.difference import Differences
from mimscale.convert.formats import timm
from mimscale.convert.hub_folder import HubModel, preprocessing_of
from mimscale.convert.names import State
from mimscale.convert.networks import Student, StudentInfo, classifier_of
from mimscale.convert.read import Loaded
from mimscale.errors import UserError
from mimscale.models.convvit import ConvViT

LAST_NORM = "filled in: a last norm of weight 1 and bias 0; the method trains none"


def model_of(loaded: Loaded, vit: Student, info: StudentInfo, with_head: bool) -> HubModel:
    """Raises UserError for ConvMAE's encoder, and where there is no classifier to take with it."""
    if isinstance(vit, ConvViT):
        raise UserError(f"{loaded.path} holds ConvMAE's encoder, which timm does not have; choose --to student")
    left: tuple[str, ...] = ()
    if with_head:
        weights: State = {**vit.state_dict(), **classifier_of(loaded)}
    else:
        weights = timm.with_last_norm(vit.state_dict())
        left = () if info.final_norm else (LAST_NORM,)
    weights = timm.with_stored_index(vit, weights)
    name, options = timm.create_call(vit, weights)

    def compare(folder: Path) -> Differences:
        return check.timm_differences(vit, weights, folder)

    return HubModel(
        library="timm",
        weights=weights,
        config=_config(name, options, vit, loaded),
        files={},
        compare=compare,
        usage="timm.create_model('local-dir:PATH', pretrained=True)",
        task="image-classification" if options["num_classes"] else "image-feature-extraction",
        left=left,
    )


def _config(name: str, options: dict[str, Any], vit: Student, loaded: Loaded) -> dict[str, Any]:
    """config.json as timm's `save_config_for_hf` lays it out. model_args: what the architecture's name does not say."""
    images = preprocessing_of(vit, loaded)
    classes = options["num_classes"]
    card = {
        "input_size": [3, images.image_size, images.image_size],
        "fixed_input_size": True,
        "interpolation": images.interpolation,
        "crop_pct": images.crop_pct,
        "crop_mode": "center",
        "mean": list(images.mean),
        "std": list(images.std),
        "num_classes": classes,
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "custom_load": False,
    }
    pooling = {"global_pool": options.get("global_pool", "token")}
    facts = {"architecture": name, "num_classes": classes, "num_features": vit.config.width, **pooling}
    return {**facts, "model_args": options, "pretrained_cfg": card}
