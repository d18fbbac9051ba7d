"""Source: a folder tree of images."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data_prep.images import SIGNATURE_BYTES, describe_content, sniff
from data_prep.plan import Item, Source, unique_keys
from data_prep.reports import SHOWN
from data_prep.splits import check_classes, chosen_images
from data_prep.walk import files_below
from mimscale.data.decode import EXTENSIONS
from mimscale.data.names import one_line
from mimscale.data.sidecars import is_sidecar
from mimscale.errors import UserError, warn
from mimscale.files.progress import no_progress

WEAK_SIGNATURES = ("bmp", "ppm")
PROBE_THREADS = 16  # opening a file on a network file system is mostly waiting


def read_folder(
    root: Path,
    labelled: bool,
    classes: Sequence[str] | None = None,
    found: Callable[[int], None] = no_progress,
    files: str | None = None,
) -> Source:
    """Labelled: the sub-folders of `root` are the classes, in sorted order, as torchvision's ImageFolder has them.

    Unlabelled: all images below `root`. The first bytes of a file decide whether it is an image, not its name. classes:
    the names of the sub-folders in the order of the class index, instead of the sorted one. found: called with the
    number of files that were found since the last call. files: pattern, see `chosen_images`. Raises UserError.
    """
    if not root.is_dir():
        raise UserError(f"source '{root}': no such folder")
    skipped: Counter[str] = Counter()
    names = sorted(files_below(root, skipped, found))
    classes = _classes(root, classes) if labelled else None
    if classes is not None:
        names = _inside(root, names, classes, skipped)
    names = chosen_images(root, names, files, labelled)
    with ThreadPoolExecutor(PROBE_THREADS) as pool:
        probed = list(pool.map(lambda name: try_probe(root / name), names))
    _refuse_unreadable(root, {name: state for name, state in zip(names, probed, strict=True) if isinstance(state, str)})
    states = [state for state in probed if not isinstance(state, str)]
    keys = unique_keys(os.path.splitext(name)[0] for name in names)
    label_of = {name: label for label, name in enumerate(classes or [])}
    items = []
    left_out: dict[str, str] = {}
    for name, key, (is_image, size, reason) in zip(names, keys, states, strict=True):
        if not is_image:
            skipped[reason] += 1
            if _named_as_image(name):
                left_out[name] = reason
        else:
            label = label_of.get(name.split(os.sep, 1)[0], -1)
            items.append(Item(key, label, str(root / name), 0, size))
    empty = set(label_of.values()) - {item.label for item in items}
    if classes and empty:
        folder = root / classes[min(empty)]
        where = f" of its own: it is a link to '{os.readlink(folder)}'" if folder.is_symlink() else ""
        raise UserError(f"class folder '{folder}' holds no image{where}; fill it or remove it")
    return Source({"kind": "folder", "path": str(root)}, items, classes, +skipped, left_out)


def _named_as_image(name: str) -> bool:
    return os.path.splitext(name)[1][1:].lower() in EXTENSIONS


def _inside(root: Path, names: Sequence[str], classes: Sequence[str], skipped: Counter[str]) -> list[str]:
    """The files in the class folders. Raises UserError where most images lie beside these folders, not in them."""
    inside = [name for name in names if os.sep in name]
    beside = sum(map(_named_as_image, names)) - sum(map(_named_as_image, inside))
    if beside > len(inside):
        raise UserError(
            f"source '{root}': {beside:,} images lie beside its class folders ('{one_line(classes[0])}'"
            f"{', ...' if len(classes) > 1 else ''}) and {len(inside):,} files in them; take all images without "
            "classes with --unlabelled, or move them into the folders"
        )
    skipped["outside of the class folders"] += len(names) - len(inside)
    return inside


def try_probe(path: Path) -> tuple[bool, int, str] | str:
    """As `probe`; a text says why the file cannot be read."""
    try:
        return probe(path)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        return getattr(error, "strerror", None) or str(error)


def _refuse_unreadable(root: Path, states: Mapping[str, str]) -> None:
    """Raises UserError, which counts the files and names the first."""
    if states:
        shown = ", ".join(f"'{one_line(name)}' ({state})" for name, state in list(states.items())[:SHOWN])
        more = ", ..." if len(states) > SHOWN else ""
        raise UserError(
            f"source '{root}': {len(states):,} source files cannot be read: {shown}{more}; repair or remove them"
        )


def _classes(root: Path, known: Sequence[str] | None) -> list[str]:
    names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not is_sidecar(entry.name))
    if not names:
        raise UserError(f"source '{root}' has no class sub-folders; for images without classes add --unlabelled")
    check_classes(root, names)
    if known is not None:
        odd = sorted(set(names) ^ set(known)) or [name for name, count in Counter(known).items() if count > 1]
        if odd:
            raise UserError(
                f"source '{root}' has {len(names):,} class folders, the list of classes {len(known):,} names; "
                f"'{one_line(odd[0])}' is in only one of them, or twice in the list"
            )
        return list(known)
    moved = next((n for n, name in enumerate(names) if name.isdecimal() and int(name) != n), None)
    if moved is not None and all(name.isdecimal() for name in names) and names != sorted(names, key=int):
        warn(
            f"'{root}': the class folders are numbers, in the order of text as in torchvision: '{names[moved]}' is "
            f"class {moved}; --classes FILE gives another order"
        )
    return names


def probe(path: Path) -> tuple[bool, int, str]:
    """(whether the file is an image, by its first bytes; its size in bytes; if not, why). Raises OSError.

    Signatures of two bytes count only for a name with the extension of an image: a text may begin with BM or P5.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a named pipe would wait for its writer
        return False, 0, "no regular file"
    with open(path, "rb") as file:
        start, size = file.read(SIGNATURE_BYTES), os.fstat(file.fileno()).st_size
    kind, extension = sniff(start), os.path.splitext(path.name)[1][1:].lower()
    named = _named_as_image(path.name)
    if kind is not None and (named or kind not in WEAK_SIGNATURES):
        return True, size, ""
    return False, size, describe_content(start) + ("" if named else f" (.{extension})" if _plain(extension) else "")


def _plain(extension: str) -> bool:
    """Whether a reason may name it: there must not be a reason for every file."""
    return len(extension) <= 5 and extension.isascii() and extension.isalnum() and not extension.isdecimal()
