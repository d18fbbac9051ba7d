"""`import mimscale` itself: light, complete, typed."""

from __future__ import annotations

import subprocess
import sys

import pytest

import mimscale


def test_importing_does_not_wait_for_torch() -> None:
    code = (
        "import sys, mimscale; assert 'torch' not in sys.modules and 'mimscale.api' not in sys.modules\n"
        "assert set(mimscale.__all__) <= set(dir(mimscale)) and 'torch' not in sys.modules\n"
        "assert issubclass(mimscale.UserError, ValueError)\n"
        "import data_prep.__main__; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there_and_documented() -> None:
    for name in set(mimscale.__all__) - {"__version__"}:
        assert (getattr(mimscale, name).__doc__ or "").strip(), name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'mimscale' has no attribute 'load_encodr'"):
        mimscale.load_encodr  # noqa: B018
