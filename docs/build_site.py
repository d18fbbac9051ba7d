"""Builds the documentation as a site, without a network: python docs/build_site.py [FOLDER]

FOLDER (default build/docs) gets `site/`, and `pages/`, what zensical reads, in place of those it has: the guides, docs/
and the notebooks, each where it lies in the repository, so that links between them stay as they are. A notebook becomes
a page of its text, code and outputs. A link to anything else of the repository becomes plain text. Pages can be read
from disk; their search needs a server. Needs the extra [docs].
"""

from __future__ import annotations

import argparse
import base64
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

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
PAGES = (*GUIDES, "docs/*.md", "docs/reference/*.md")
NOTEBOOKS = "examples/*.ipynb"
BESIDE = ("docs/*.svg", "docs/*.png", "docs/*.css", NOTEBOOKS)
FENCED = re.compile(r"(^ *```.*?^ *```)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[((?:[^\[\]`]|`[^`]*`|!\[[^\]]*\]\([^)]*\))*)\]\(([^)\s]+)\)")


def page_names() -> list[str]:
    """The Markdown pages by their paths from the root. docs/index.md and the navigation name each of them."""
    return sorted(path.relative_to(ROOT).as_posix() for pattern in PAGES for path in ROOT.glob(pattern))


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
    files = {path for pattern in (*PAGES, *BESIDE) for path in ROOT.glob(pattern)}
    for path in files:
        copy = folder / "pages" / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".md":
            copy.write_text(for_site(path, files))
        else:
            shutil.copy(path, copy)
        if path.suffix == ".ipynb":
            text, images = notebook_page(json.loads(path.read_text()), path.stem)
            copy.with_suffix(".md").write_text(text)
            for name, content in images.items():
                (copy.parent / name).write_bytes(content)
    shutil.copy(ROOT / "docs" / "zensical.toml", folder)
    done = subprocess.run([sys.executable, "-m", "zensical", "build", "--strict"], cwd=folder)
    if done.returncode == 0:
        print(f"wrote {folder / 'site'}; python -m http.server -d {folder / 'site'} 8000 serves it")
    return done.returncode


def for_site(page: Path, files: set[Path]) -> str:
    """The Markdown of a page, without links to files that the site does not have; a notebook's lead to its page."""

    def link(match: re.Match[str]) -> str:
        text, target = match.groups()
        path = target.partition("#")[0]
        inside = not path or re.match(r"[a-z]+:", target) or (page.parent / path).resolve() in files
        return re.sub(r"\.ipynb\)$", ".md)", match[0]) if inside else text

    parts = FENCED.split(page.read_text())
    return "".join(part if FENCED.match(part) else LINK.sub(link, part) for part in parts)


def notebook_page(notebook: dict[str, Any], name: str) -> tuple[str, dict[str, bytes]]:
    """(Markdown, images by their file names) of a notebook with its outputs. name: of its file, without the ending."""
    parts, images = [], dict[str, bytes]()
    for cell in notebook["cells"]:
        source = "".join(cell["source"]).strip()
        if cell["cell_type"] != "code":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            if "text" in output:
                parts.append(f"```text\n{''.join(output['text']).rstrip()}\n```")
            elif "image/png" in output.get("data", {}):
                file = f"{name}-{len(images) + 1}.png"
                images[file] = base64.b64decode(output["data"]["image/png"])
                parts.append(f"![What the code above draws]({file})")
    title, rest = parts[0], parts[1:]
    parts = [title, f"The notebook itself, to run it: [{name}.ipynb]({name}.ipynb).", *rest]
    return "\n\n".join(parts) + "\n", images


if __name__ == "__main__":
    sys.exit(main())
