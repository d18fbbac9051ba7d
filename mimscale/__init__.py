"""mimscale: masked-image-modeling pre-training at scale.

The public Python API is what `__all__` names; docs/python.md shows how it is used. Everything else is internal. The
names are imported when they are first used, so that `import mimscale` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mimscale.errors import Stopped, UserError

if TYPE_CHECKING:
    from mimscale.api.encoder import Encoder, Features, load_encoder
    from mimscale.api.reconstruction import Reconstruction, reconstruct
    from mimscale.api.shards import ShardBatch, Shards, open_shards
    from mimscale.api.training import TrainResult, train

__version__ = "0.1.0"
__all__ = [
    "Encoder",
    "Features",
    "Reconstruction",
    "ShardBatch",
    "Shards",
    "Stopped",
    "TrainResult",
    "UserError",
    "__version__",
    "load_encoder",
    "open_shards",
    "reconstruct",
    "train",
]

_MODULES = {
    "Encoder": "encoder",
    "Features": "encoder",
    "Reconstruction": "reconstruction",
    "ShardBatch": "shards",
    "Shards": "shards",
    "TrainResult": "training",
    "load_encoder": "encoder",
    "open_shards": "shards",
    "reconstruct": "reconstruction",
    "train": "training",
}


def __getattr__(name: str) -> Any:
    """PEP 562: called for a name that the module does not have yet."""
    if name not in _MODULES:
        raise AttributeError(f"module 'mimscale' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"mimscale.api.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
