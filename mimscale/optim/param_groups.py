"""Parameter groups: weight decay, and layer-wise decay of the learning rate."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

from torch import Tensor, nn

from mimscale.errors import UserError


def is_decayed(name: str, parameter: Tensor, no_weight_decay: Collection[str] = ()) -> bool:
    """Weight decay is for tensors of two or more dimensions that are not a bias and not named as exempt.

    The class and mask tokens are [1, 1, D], so MAE and MaskAlign do decay them. Under ZeRO-3 a parameter is empty and
    `ds_shape` holds its shape.
    """
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return len(shape) > 1 and not name.endswith(".bias") and name not in no_weight_decay


def parameter_groups(
    parameters: nn.Module | Iterable[tuple[str, Tensor]],
    *,
    weight_decay: float,
    layer_decay: float = 1.0,
    no_weight_decay: Collection[str] = (),
    layer_of: Callable[[str], int | None] | None = None,
) -> list[dict[str, Any]]:
    """Groups with the keys params, names, weight_decay and lr_scale, in order of first appearance.

    layer_decay: a layer's lr_scale is layer_decay^(last layer - layer) (Bao et al. 2022, BEiT); 1 = off.
    Frozen parameters are left out. Raises UserError where layer decay is asked of a method without a layer order.
    """
    named = parameters.named_parameters() if isinstance(parameters, nn.Module) else parameters
    trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    layers = {name: layer_of(name) if layer_of else None for name, _ in trained}
    last = max((layer for layer in layers.values() if layer is not None), default=0)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in trained:
        decay = weight_decay if is_decayed(name, parameter, no_weight_decay) else 0.0
        scale = 1.0
        if layer_decay != 1:
            layer = layers[name]
            if layer is None:
                raise UserError(
                    f"optim.layer_decay = {layer_decay}: this method gives '{name}' no layer; set optim.layer_decay = 1"
                )
            scale = layer_decay ** (last - layer)
        group = groups.setdefault((scale, decay), {"params": [], "names": [], "weight_decay": decay, "lr_scale": scale})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())
