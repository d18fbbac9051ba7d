"""Builds the documentation as a site, without a network: python docs/build_site.py [FOLDER]

FOLDER (default build/docs) gets `site/`, and `pages/`, what zensical reads, in place of those it has: the guides, docs/
and the notebooks, each where it lies in the repository, so that links between them stay as they are. A link to anything
else of the repository becomes plain text. Pages can be read from disk; their search needs a server. Needs the extra
[docs].
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GUIDES = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "data_prep/README.md",
    "ds_configs/README.md",
    "jobs/README.md",
    "tests/FAULTS.md",
)
COPIED = ("docs/*.md", "docs/reference/*.md", "docs/*.svg", "docs/*.png", "docs/*.css", "examples/*.ipynb", *GUIDES)
FENCED = re.compile(r"(^ *```.*?^ *```)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[((?:[^\[\]`]|`[^`]*`|!\[[^\]]*\]\([^)]*\))*)\]\(([^)\s]+)\)")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "build" / "docs", metavar="FOLDER")
    return build(parser.parse_args().folder.resolve())


def build(folder: Path) -> int:
    """Exit code of zensical, whose strict mode refuses warnings."""
    try:
        import zensical  # noqa: F401
    except ImportError:
        print("docs/build_site.py: zensical is not installed; pip install -e '.[docs]'", file=sys.stderr)
        return 2
    for part in ("site", "pages"):
        shutil.rmtree(folder / part, ignore_errors=True)
    pages = {path for pattern in COPIED for path in ROOT.glob(pattern)}
    for path in pages:
        copy = folder / "pages" / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".md":
            copy.write_text(for_site(path, pages))
        else:
            shutil.copy(path, copy)
    shutil.copy(ROOT / "docs" / "zensical.toml", folder)
    done = subprocess.run([sys.executable, "-m", "zensical", "build", "--strict"], cwd=folder)
    if done.returncode == 0:
        print(f"wrote {folder / 'site'}; python -m http.server -d {folder / 'site'} 8000 serves it")
    return done.returncode


def for_site(page: Path, pages: set[Path]) -> str:
    """The Markdown of a page without links to files that the site does not have."""

    def link(match: re.Match[str]) -> str:
        text, target = match.groups()
        path = target.partition("#")[0]
        inside = not path or re.match(r"[a-z]+:", target) or (page.parent / path).resolve() in pages
        return match[0] if inside else text

    parts = FENCED.split(page.read_text())
    return "".join(part if FENCED.match(part) else LINK.sub(link, part) for part in parts)


if __name__ == "__main__":
    sys.exit(main())
