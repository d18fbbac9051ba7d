"""The documentation agrees with the tree: links, quoted messages, paths, packages, versions and the diagram."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest

import mimscale
from tests.scripts import ROOT, load_script
from tests.test_imports import LEVELS

PAGES = [ROOT / name for name in load_script("docs/build_site.py").page_names()]
TOP = ("mimscale", "docs", "examples", "jobs", "data_prep", "ds_configs", "tests")
IGNORED = {"jobs/site.env"}  # what a user makes; git ignores it
GAP, END = "\0", "\1"  # a value inside a message; the end of one


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


def text_of(node: ast.expr) -> str:
    """A literal's text, GAP where a value is put in; "" for anything else."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else GAP for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


@lru_cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@lru_cache
def messages() -> str:
    """All texts in the sources, with END behind each; where a value is put in stands GAP."""
    texts = []
    for folder in ("mimscale", "data_prep", "jobs"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(parsed(path)):
                if isinstance(node, ast.expr) and (text := text_of(node)):
                    texts.append(text)
    for path in sorted((ROOT / "jobs").iterdir()):
        if path.suffix in (".sh", ".sbatch") or path.name == "submit":
            texts += re.sub(r"\$(\{[^}]*\}|\w+)", GAP, path.read_text()).splitlines()
    return "".join(f"{text}{END}" for text in dict.fromkeys(texts))


def occurs(message: str) -> bool:
    """Whether one text of the sources has the message's parts in this order, with values where it has `…`."""
    parts, texts = message.split("…"), messages()
    longest = max(parts, key=len)
    place = texts.find(longest)
    while place >= 0:
        end = texts.find(END, place)
        if in_order(parts, texts[texts.rfind(END, 0, place) + 1 : end]):
            return True
        place = texts.find(longest, end)
    return False


def in_order(parts: list[str], text: str) -> bool:
    place = 0
    for part in parts:
        place = text.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return True


def quoted_messages() -> list[str]:
    """All that stands in backquotes in the first column."""
    page = without_code((ROOT / "docs" / "troubleshooting.md").read_text())
    cells = re.findall(r"^\| (`.+?) \| ", page, re.MULTILINE)
    return [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]


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


def refusals(tree: ast.Module) -> Iterator[str]:
    """What refuses a user's input: texts of `UserError` and its kinds, and those of the checks of a recipe's sections.

    A text without two words of its own only carries another message.
    """
    checks = [f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) and _is_check(f)]
    for names, inside in (({"UserError", "BadArchive"}, [tree]), ({"ValueError"}, checks)):
        for node in (node for part in inside for node in ast.walk(part)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names and node.args:
                words = text_of(node.args[0])
                if len(re.findall(r"\b[A-Za-z]{2,}\b", words)) > 1:
                    yield words


def _is_check(function: ast.FunctionDef) -> bool:
    return any("_validator" in ast.unparse(decorator) for decorator in function.decorator_list)


def test_every_refusal_has_a_row() -> None:
    quoted = [message.split("…") for message in quoted_messages()]
    rows = [(max(parts, key=len), parts) for parts in quoted]  # the longest part alone is enough for most of them
    missing = []
    for path in (path for folder in ("mimscale", "data_prep") for path in sorted((ROOT / folder).rglob("*.py"))):
        texts = refusals(parsed(path))
        found = [text for text in texts if not any(part in text and in_order(row, text) for part, row in rows)]
        missing += [f"{path.relative_to(ROOT)}: {text.replace(GAP, '…')}" for text in found]
    assert not missing, "docs/troubleshooting.md has no row for:\n" + "\n".join(missing)


def test_refusals_are_found() -> None:
    source = """
        @model_validator(mode="after")
        def check(self):
            raise ValueError(f"no {self.x} at all")
        def other(x):
            raise ValueError("not for users")
        raise UserError(f"{x}: {y}", UserError(f"one " f"{x} two"))
    """
    assert set(refusals(ast.parse(inspect.cleandoc(source)))) == {f"no {GAP} at all", f"one {GAP} two"}


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
