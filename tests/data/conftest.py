from __future__ import annotations

from pathlib import Path

import pytest

from mimscale.data.manifest import Manifest


@pytest.fixture
def manifest(shards: Path) -> Manifest:
    return Manifest.load(shards)
