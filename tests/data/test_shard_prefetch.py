"""The process that copies shards ahead: it copies, is started again when it hangs or ends, and is given up at last."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from mimscale.data import shard_prefetch
from mimscale.data.manifest import Manifest
from mimscale.data.mixture import order_of
from mimscale.data.shard_cache import Cache
from mimscale.data.shard_prefetch import ShardPrefetcher

pytestmark = pytest.mark.multi


def test_it_is_started_again_and_given_up(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shard_prefetch, "STARTS", 3)
    manifest = Manifest.load(shards, cache=Cache(tmp_path / "cache", 1 << 30))
    prefetcher = ShardPrefetcher(manifest, order_of(manifest, 0, 4, 8), 8, 0, 1, 0)
    try:
        first = prefetcher.pid
        assert first is not None
        os.kill(first, signal.SIGSTOP)  # before it runs any code of ours
        prefetcher._deadline_s = time.monotonic() - 1
        prefetcher.advance(1)
        second = prefetcher.pid
        assert second not in (None, first)
        copies = tmp_path / "cache" / "shards"
        while len(list(copies.glob("*.tar"))) < len(manifest.shards):
            prefetcher.advance(1)
            assert prefetcher.pid == second
            time.sleep(0.1)
        prefetcher._deadline_s = time.monotonic() - 1  # it has begun, so that this is nothing to it
        prefetcher.advance(2)
        assert prefetcher.pid == second
        for expected in (True, False):
            pid = prefetcher.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            while prefetcher.pid == pid:
                prefetcher.advance(3)
                time.sleep(0.05)
            assert (prefetcher.pid is not None) == expected
        prefetcher.advance(4)
    finally:
        prefetcher.close()
    *_, hung, ended, last = capfd.readouterr().err.splitlines()
    assert "did not begin within 120 s; it is started again" in hung
    assert "has ended; it is started again" in ended
    assert last.endswith("has ended, 3 times; samples are read without it")
