"""Fixtures that several packages share."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import settings

from data_prep.__main__ import main as data_prep
from mimscale.data.synthetic import make_image_folder
from mimscale.distributed.world import EMULATE_FP16

settings.register_profile("mimscale", deadline=None)  # machines are shared: no time is asserted
settings.load_profile("mimscale")
os.environ[EMULATE_FP16] = "1"  # some CPUs lack fp16 arithmetic; the tests of the fp16 path must run there too


WATCHERS = ("watchdog", "lock", "signal_watch")  # threads that may end their process
MOST_CHARACTERS = 3000  # of a failure that is printed at once; the summary has all of it


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 small labelled images in 4 classes, as 5 shards."""
    root = tmp_path_factory.mktemp("shards")
    make_image_folder(root / "images", classes=4, per_class=20, side=48)
    assert data_prep(["folder", str(root / "images"), str(root / "shards"), "--shard-samples", "16"]) == 0
    return root / "shards"


@pytest.fixture(autouse=True)
def no_watcher_stays() -> Iterator[None]:
    """No run's watcher outlives its test: it would end the process of the tests, minutes later and without a word."""
    before = set(threading.enumerate())
    yield
    stay = [thread for thread in threading.enumerate() if thread.name in WATCHERS and thread not in before]
    for thread in stay:
        thread.join(5.0)  # one that was told to end does so within half a second
    assert not [thread.name for thread in stay if thread.is_alive()]


@pytest.fixture
def ended_with_the_test(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For a run that fails in this process. The command leaves it watched to the end of its process; here that is the
    end of the test."""
    with ExitStack() as closing:
        monkeypatch.setattr("mimscale.training.cli.ExitStack", lambda: closing)
        yield


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes are named by their argument: all workers must find the same names, and a gzip header holds the time."""
    return argname if isinstance(val, bytes) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first, so that none of them is left over at the end where several run at a time."""
    marks, rank = ("slurm", "multi", "slow"), dict[Path, int]()
    for item in items:
        number = next((i for i, mark in enumerate(marks) if item.get_closest_marker(mark)), len(marks))
        rank[item.path] = min(number, rank.get(item.path, number))
    items.sort(key=lambda item: rank[item.path])


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A failure is printed when it happens: a run that is ended by hand shows it too. Workers only report to the one
    process that prints."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        print(f"\n{report.nodeid} failed ({report.when}):\n{report.longreprtext[-MOST_CHARACTERS:]}", flush=True)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """With MIMSCALE_NO_SKIPS a test that was skipped fails the run: continuous integration has all that they need."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter is not None else []
    if reporter is not None and os.environ.get("MIMSCALE_NO_SKIPS") and skipped:
        reporter.write_line(f"MIMSCALE_NO_SKIPS is set and {len(skipped)} tests were skipped: {skipped[0].longrepr}")
        session.exitstatus = 1
