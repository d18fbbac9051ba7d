"""`--push` with the real huggingface_hub, in processes of their own, against a server on loopback."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from mimscale.__main__ import main
from mimscale.convert import push
from mimscale.errors import UserError
from tests.convert.hub_server import TOKEN, Hub, serving
from tests.convert.runs import refused, saved_run

PUSH = """
import sys
from pathlib import Path
from mimscale.convert import push
from mimscale.errors import UserError
try:
    push.check("org/name")
    print(push.push(Path(sys.argv[1]), "org/name", True))
except UserError as error:
    print(error)
assert "torch" not in sys.modules
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as found:
        yield found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("---\nlibrary_name: timm\n---\n")
    (out / "model.safetensors").write_bytes(bytes(range(256)))
    return out


def environment(hub_address: str, home: Path, token: str | None) -> dict[str, str]:
    """The user's login is out of reach. Xet is the Hub's other protocol for large files; the server knows git-lfs."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE_"))}
    own = {"HF_ENDPOINT": hub_address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    return {**kept, **own, **({} if token is None else {"HF_TOKEN": token})}


def pushed(folder: Path, address: str, token: str | None = TOKEN) -> str:
    words = [sys.executable, "-c", PUSH, str(folder)]
    found = subprocess.run(
        words,
        env=environment(address, folder.parent / "home", token),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert TOKEN not in found.stdout + found.stderr and found.stdout.count("\n") == 1
    return found.stdout


def test_a_conversion_is_pushed(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the command line: the repository is created as private, and holds what the folder holds.

    huggingface_hub was imported before, so what it reads of the environment then is set here.
    """
    run_dir, _ = saved_run(tmp_path / "run", "mae")
    out = tmp_path / "out"
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)  # 0.26, the oldest, knows no Xet
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    words = ["convert", str(run_dir), str(out), "--to", "timm", "--push", "org/name", "--private"]
    assert main(words) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-2:] == [f"wrote {out}", f"pushed to {hub.address}/org/name"]
    assert TOKEN not in printed.out + printed.err
    assert hub.files == {path.name: path.read_bytes() for path in out.iterdir()}
    (created,) = hub.repositories
    assert (created["organization"], created["name"]) == ("org", "name")
    assert created.get("visibility") == "private" or created.get("private") is True


def test_refusals_are_one_line(hub: Hub, folder: Path) -> None:
    assert pushed(folder, hub.address, None).startswith("--push org/name: there is no token; run `hf auth login`")
    assert not hub.requests
    wrong = pushed(folder, hub.address, "hf_of_nobody")
    assert "refused it with 401 (no token); check what the token may write" in wrong and "hf_of_nobody" not in wrong
    assert not hub.files
    for place in ("/api/repos/create", "/api/models/org/name/commit", "/large/"):
        hub.refuse = {place: 403}
        message = pushed(folder, hub.address)
        assert "refused it with 403" in message and f"is whole; try again with: hf upload org/name {folder}" in message
    assert not hub.files
    hub.refuse = {}
    assert pushed(folder, hub.address) == f"{hub.address}/org/name\n"
    assert hub.files.keys() == {"README.md", "model.safetensors"}


def test_nobody_answers(folder: Path) -> None:
    with serving() as hub:
        address = hub.address
    message = pushed(folder, address)
    assert f"--push org/name: {address} did not take it (Connect" in message  # the exception of httpx, or of requests
    assert "is whole; try again with: hf upload" in message


@pytest.mark.parametrize("name", ["name", "a/b/c", "org/", "org/na me", "org/-name", "org/name--x", "../x"])
def test_what_is_no_repository(name: str) -> None:
    with pytest.raises(UserError, match="is no ORG/NAME of the Hub"):
        push.check(name)


def test_private_without_push(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["nothing", str(tmp_path / "out"), "--to", "timm", "--private"]
    assert "--private says how --push creates a repository" in refused(words, capsys)
