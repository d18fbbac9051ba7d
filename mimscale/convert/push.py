"""A folder to a repository of the Hugging Face Hub, by huggingface_hub. `HF_ENDPOINT` names another server.

The token is the one of the environment (HF_TOKEN) or of `hf auth login`; it is never printed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from mimscale.errors import UserError

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check(repository: str) -> None:
    """Before anything is written: the form of the name, and that there is a token. Raises UserError."""
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        if not REPOSITORY.fullmatch(repository):
            raise HFValidationError("two names with a slash between them")
        validate_repo_id(repository)
    except HFValidationError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--push {repository} is no ORG/NAME of the Hub ({reason})") from None
    if not get_token():
        raise UserError(f"--push {repository}: there is no token; run `hf auth login`, or set HF_TOKEN")


def push(folder: Path, repository: str, private: bool) -> str:
    """Create the repository where it does not exist, and upload the folder in one commit. Returns its address.

    private: of a repository that is created. Raises UserError; the folder stays.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import disable_progress_bars

    again = f"{folder} is whole; try again with: hf upload {repository} {folder}{' --private' if private else ''}"
    disable_progress_bars()
    try:
        api = HfApi(library_name="mimscale")
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload a model with mimscale convert")
    except Exception as error:  # of whatever kind the library of its release raises for a connection (requests, httpx)
        refusal = next((cause for cause in _causes(error) if isinstance(cause, HfHubHTTPError)), None)
        if refusal is None:
            said = _one_line(f"{type(error).__name__}: {error}", get_token())
            raise UserError(f"--push {repository}: {constants.ENDPOINT} did not take it ({said}); {again}") from None
        status = refusal.response.status_code if refusal.response is not None else "no status"
        said = _one_line(refusal.server_message or str(refusal), get_token())
        raise UserError(
            f"--push {repository}: {constants.ENDPOINT} refused it with {status} ({said}); check what the token may "
            f"write; {again}"
        ) from None
    return f"{constants.ENDPOINT}/{repository}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and what it was raised for: an upload of several files wraps the answer of the server."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _one_line(words: str, token: str | None) -> str:
    line = " ".join(words.split())[:200]
    return line.replace(token, "...") if token else line
