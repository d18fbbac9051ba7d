"""Files that operating systems put beside others: AppleDouble (`._x`), `__MACOSX`, Thumbs.db, and hidden files."""

from __future__ import annotations

import re

METADATA = re.compile(r"__[^/]*__($|/)")  # beginnings of names that webdataset passes over
SIDECARS = frozenset(  # in lower case
    (
        "__macosx",
        "icon\r",
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        "$recycle.bin",
        "system volume information",
        "lost+found",
        "@eadir",  # of Synology, and #recycle
        "#recycle",
    )
)


def is_sidecar(name: str) -> bool:
    """name: of a file or folder, or a path in an archive: whether one of its parts is hidden or of the system."""
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    return any(part.startswith(".") or part.lower() in SIDECARS for part in parts)
