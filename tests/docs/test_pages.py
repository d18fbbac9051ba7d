"""The documentation agrees with the tree: links, quoted messages, paths, packages, versions and the diagram."""

from __future__ import annotations

import ast
import re
from functools import lru_cache
from pathlib import Path

import pytest

import mimscale
from tests.scripts import ROOT, load_script
from tests.test_imports import LEVELS

PAGES = [ROOT / name for name in load_script("docs/build_site.py").page_names()]
TOP = ("mimscale", "docs", "examples", "jobs", "data_prep", "ds_configs", "tests")
IGNORED = {"jobs/site.env"}  # what a user makes; git ignores it
GAP = "\0"  # a value inside a message


def without_code(text: str) -> str:
    """Without fenced blocks, where a bracket is no link and a # no heading."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


# ------------------------------------------------------------------------------------------------ links


def anchors(page: Path) -> set[str]:
    """Names of a page's headings as GitHub makes them."""
    found: dict[str, int] = {}
    names = set()
    for heading in re.findall(r"^#{1,6} +(.+?)\s*$", without_code(page.read_text()), re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        count = found.get(name, 0)
        found[name] = count + 1
        names.add(f"{name}-{count}" if count else name)
    return names


def links(page: Path) -> list[str]:
    """Targets of a page's links and images, without those to other sites."""
    text = re.sub(r"`[^`\n]*`", "", without_code(page.read_text()))
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset|href)="([^"]+)"', text)
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def broken(page: Path, root: Path) -> list[str]:
    wrong = []
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or root.resolve() not in (file, *file.parents):
            wrong.append(f"{page.relative_to(root)}: {target}: no such file")
        elif anchor and anchor not in anchors(file):
            wrong.append(f"{page.relative_to(root)}: {target}: no such heading")
    return wrong


def test_links_lead_somewhere() -> None:
    wrong = [line for page in PAGES for line in broken(page, ROOT)]
    assert not wrong, "\n".join(wrong)


def test_broken_links_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A `b`: c\n[x](page.md#a-b-c) [x](#a-b-c) [x](#d) ![x](no.png) [x](../) `[x](y)` [x](https://a.b)\n"
    )
    assert [line.split(": ")[1] for line in broken(page, tmp_path)] == ["#d", "no.png", "../"]


def test_every_page_is_in_the_index() -> None:
    """Once, and the notebooks too."""
    index = ROOT / "docs" / "index.md"
    listed = [(index.parent / target.partition("#")[0]).resolve() for target in links(index)]
    notebooks = (ROOT / "examples").glob("*.ipynb")
    assert sorted(listed) == sorted({*PAGES, *notebooks} - {index})


# ------------------------------------------------------------------------------------------------ names in the text


def test_paths_exist() -> None:
    """Whatever stands in backquotes and has the form of a path of the project, but for patterns."""
    wrong = []
    for page in PAGES:
        for word in re.findall(r"`([^`\s]+)`", without_code(page.read_text())):
            if word.split("/")[0] in TOP and "/" in word and not re.search(r"[*<>{}A-Z]{2}|[*{<]", word):
                place = ROOT / word.partition("::")[0]
                if not place.exists() and word not in IGNORED:
                    wrong.append(f"{page.relative_to(ROOT)}: {word}")
    assert not wrong, "\n".join(wrong)


def test_every_package_is_in_the_architecture() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    packages = {name for level in LEVELS for name in level if (ROOT / "mimscale" / name).is_dir()}
    missing = sorted(name for name in packages if f"| `{name}/`" not in text)
    assert not missing, f"docs/architecture.md: no row for {missing}"


def test_commands_name_verbs() -> None:
    from mimscale.__main__ import VERBS

    wrong = []
    for page in PAGES:
        text = page.read_text()
        for verb in re.findall(r"(?:^|`|-m )mimscale ([a-z_]+)", text, re.MULTILINE):
            if verb not in VERBS:
                wrong.append(f"{page.relative_to(ROOT)}: mimscale {verb}")
    assert not wrong, "\n".join(wrong)


# ------------------------------------------------------------------------------------------------ messages


@lru_cache
def messages() -> frozenset[str]:
    """All texts in the sources; where a value is put in stands GAP."""
    texts = []
    for folder in ("mimscale", "data_prep", "jobs"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = (p.value if isinstance(p, ast.Constant) else GAP for p in node.values)
                    texts.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
    for path in sorted((ROOT / "jobs").iterdir()):
        if path.suffix in (".sh", ".sbatch") or path.name == "submit":
            texts += re.sub(r"\$(\{[^}]*\}|\w+)", GAP, path.read_text()).splitlines()
    return frozenset(texts)


def occurs(message: str) -> bool:
    """Whether one text of the sources has the message's parts in this order, with values where it has `…`."""
    return any(in_order(message.split("…"), text) for text in messages())


def in_order(parts: list[str], text: str) -> bool:
    place = 0
    for part in parts:
        place = text.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return True


def quoted_messages() -> list[str]:
    page = without_code((ROOT / "docs" / "troubleshooting.md").read_text())
    return re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)


def test_quoted_messages_are_in_the_code() -> None:
    quoted = quoted_messages()
    assert len(quoted) > 50
    wrong = [message for message in quoted if not occurs(message)]
    assert not wrong, "docs/troubleshooting.md quotes what no source prints:\n" + "\n".join(wrong)


def test_a_message_that_no_source_prints_is_found() -> None:
    assert occurs("schedule.global_batch = … does not divide over … ranks")
    assert not occurs("schedule.global_batch = … does not divide by … ranks")
    assert not occurs("does not divide over … schedule.global_batch =")


def test_quoted_messages_have_words_of_their_own() -> None:
    """`…: …` alone would be found anywhere."""
    short = [message for message in quoted_messages() if len(re.findall(r"[A-Za-z]{2,}", message)) < 2]
    assert set(short) <= {"BAD NODE …: …", "unknown key …"}


# ------------------------------------------------------------------------------------------------ diagram and versions


def test_the_readme_is_short() -> None:
    """At most 1,100 words without code, tables and comments."""
    text = without_code((ROOT / "README.md").read_text())
    lines = [line for line in text.splitlines() if not line.startswith(("|", "<!--"))]
    assert len(" ".join(lines).split()) <= 1100


def test_versions_agree() -> None:
    version = mimscale.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"version = {{{version}}}" in (ROOT / "README.md").read_text()
    assert re.search(rf"^## \[{re.escape(version)}\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_the_diagram_is_what_its_script_draws() -> None:
    """By its texts, because other releases of matplotlib write other numbers."""
    pytest.importorskip("matplotlib")
    script = load_script("docs/data_flow.py")
    lines = [line for *_, below in script.BOXES.values() for line in below]
    drawn = set(re.findall(r"<!-- (.+?) -->", (ROOT / "docs" / "data_flow.svg").read_text()))
    wanted = {*script.BOXES, *lines, *script.LABELS, *script.LEGEND, script.FRAME}
    assert drawn == wanted, "run python docs/data_flow.py"
