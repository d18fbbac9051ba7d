"""No command prints or keeps the user, the query or a token of an address, wherever one is given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.__main__ import main as data_prep
from mimscale.__main__ import main
from mimscale.checkpoint.run_folder import check_names, launch
from mimscale.config.recipes import load_recipe
from mimscale.errors import UserError

ADDRESSES = (
    "https://user:hunter2@127.0.0.1:9/x?token=hunter3",
    "s3://AKIA:hunter2/hunter3+h@bucket/x",
    "wds:http://127.0.0.1:9/a-{0..3}.tar::http://u:hunter2@127.0.0.1:9/b.tar",
)
TRAIN = ("train", "mae_tiny")
COMMANDS: list[tuple[str, ...]] = [
    *((*TRAIN, f"{key}={{}}") for key in ("data.shards", "data.cache", "init.weights", "engine.ds_config", "seed")),
    *((*TRAIN, option, "{}") for option in ("--run-dir", "--fork", "--unknown")),
    (*TRAIN, "data.shards={{'{}': 0.5}}"),
    (*TRAIN, "--show", "evals.val={}"),
    (*TRAIN, "log.wandb.tags=['{}']"),
    (*TRAIN, "teachers.a={{library: timm, model: m, weights: '{}'}}"),
    (*TRAIN, "teachers.a={{library: timm, model: m, options: {{a: ['{}']}}}}"),
    ("train", "{}"),
    ("{}",),
    ("evaluate", "{}"),
    ("evaluate", "knn", "a", "--train", "{}", "--val", "{}"),
    ("convert", "{}", "out", "--to", "student"),
    ("convert", "a", "{}", "--to", "student"),
    ("convert", "a", "b", "--to", "{}"),
    ("runs", "compare", "{}", "{}"),
    ("results", "{}"),
    ("report", "{}", "page.html"),
    ("reconstruct", "{}", "image.png", "out.png"),
    ("plan", "mae_tiny", "data.shards={}"),
    ("doctor", "mae_tiny", "data.shards={}"),
    ("bench", "{}"),
    ("completion", "{}"),
]
PREPARATIONS: list[tuple[str, ...]] = [
    ("folder", "{}", "out"),
    ("folder", "a", "{}"),
    ("table", "{}", "out"),
    ("index", "{}"),
    ("verify", "{}"),
    ("doctor", "{}"),
    ("finish", "{}"),
    ("{}",),
]


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize(("program", "commands"), [(main, COMMANDS), (data_prep, PREPARATIONS)])
def test_no_command_prints_them(
    program: Callable[[list[str]], int],
    commands: list[tuple[str, ...]],
    address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Each is refused, and none makes a folder of that name."""
    monkeypatch.chdir(tmp_path)
    for words in commands:
        try:
            code: object = program([word.format(address) for word in words])
        except SystemExit as stop:
            code = stop.code
        printed = "".join(capfd.readouterr())
        assert code == 2 and "hunter" not in printed and "Traceback" not in printed, (words, printed)
        assert not list(tmp_path.iterdir()), words


def test_a_path_of_this_machine_is_no_address(tmp_path: Path) -> None:
    for key in ("init.weights", "data.cache"):
        for address in ("s3://bucket/x", "https://host/mae.pth", "file:///data/x", "gs://b"):
            with pytest.raises(UserError, match=f"{key}: '.*' is an address; give a path of this machine"):
                load_recipe("mae_tiny", [f"{key}={address}"])
    with pytest.raises(UserError, match="--run-dir s3:/bucket/x is an address; name a folder on a disk"):
        check_names(Path("s3://bucket/x"))
    check_names(tmp_path / "a:b", tmp_path / "s3:" / "x", Path("n1:/x"))
    assert str(load_recipe("mae_tiny", ["data.cache=/a/s3:/x"]).data.cache) == "/a/s3:/x"


def test_the_command_that_is_kept_holds_none() -> None:
    """Of an override that a later one takes back."""
    words = launch(["train", "mae_tiny", f"data.shards={ADDRESSES[0]}", "data.shards=/b"])["command"]
    assert words == ["train", "mae_tiny", "data.shards=https://127.0.0.1:9/x", "data.shards=/b"]
