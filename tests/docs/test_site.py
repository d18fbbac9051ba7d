"""The site of docs/build_site.py has every page, and needs nothing but itself."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.docs.test_pages import PAGES
from tests.scripts import ROOT, load_script

pytestmark = pytest.mark.slow
BUILDER = load_script("docs/build_site.py")
NOTEBOOKS = sorted(ROOT.glob(BUILDER.NOTEBOOKS))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    assert BUILDER.build(folder) == 0
    return folder / "site"


class Html(HTMLParser):
    """What a page refers to, what in it can be referred to, and the text of its paragraphs and cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids, self.links, self.loaded = set[str](), list[str](), list[str]()
        self.text, self._open = list[str](), list[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attributes if value is not None}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") not in ("prev", "next", "canonical"):
            self.loaded.append(given["href"])
        self.loaded += [given[name] for name in ("src", "poster", "data") if name in given]
        self.loaded += [part.split()[0] for part in given.get("srcset", "").split(",") if part.strip()]
        self.loaded += urls(given.get("style", ""))
        if tag not in ("br", "img", "input", "link", "meta", "hr", "source", "path"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while tag in self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not {"code", "pre", "script", "style"} & set(self._open):
            self.text.append(data)


def urls(css: str) -> list[str]:
    found = re.findall(r"url\(\s*[\"']?([^)\"']+)", css) + re.findall(r"@import\s+[\"']([^\"']+)", css)
    return [address for address in found if not address.startswith("data:")]


def read(site: Path) -> dict[Path, Html]:
    return {path: Html(path.read_text()) for path in sorted(site.rglob("*.html"))}


def broken(site: Path, pages: dict[Path, Html]) -> list[str]:
    """References that lead nowhere, and resources that another site would have to send."""
    wrong = []
    for page, html in pages.items():
        name = page.relative_to(site).as_posix()
        wrong += [f"{name}: {target}: loaded from elsewhere" for target in html.loaded if is_remote(target)]
        for target in {*html.links, *html.loaded}:
            if is_remote(target):
                wrong += [] if re.match("https?:", target) else [f"{name}: {target}: no link of the web"]
                continue
            path, _, anchor = unquote(target).partition("#")
            start = site if path.startswith("/") else page.parent  # the page of error 404 is served from any folder
            file = (start / path.lstrip("/")).resolve() if path else page
            file = file / "index.html" if file.is_dir() else file
            if not file.is_file() or site.resolve() not in file.resolve().parents:
                wrong.append(f"{name}: {target}: no such file")
            elif anchor and file in pages and anchor not in pages[file].ids:
                wrong.append(f"{name}: {target}: no such anchor")
    for css in site.rglob("*.css"):
        wrong += [f"{css.name}: {address}" for address in urls(css.read_text()) if is_remote(address)]
    return sorted(wrong)


def is_remote(target: str) -> bool:
    return re.match(r"[a-z]+:|//", target) is not None and not target.startswith("data:")


def built(site: Path, page: Path) -> Path:
    """The file that a page of the repository becomes."""
    place = site / page.relative_to(ROOT)
    return place.with_name("index.html") if page.name == "README.md" else place.with_suffix(".html")


def test_every_page_was_built_and_leads_somewhere(site: Path) -> None:
    pages = {path.resolve(): html for path, html in read(site).items()}
    missing = [str(page) for page in (*PAGES, *NOTEBOOKS) if built(site, page).resolve() not in pages]
    assert not missing, missing
    assert not (wrong := broken(site.resolve(), pages)), "\n".join(wrong)
    for page in PAGES:  # no Markdown was left as it was
        html = built(site, page).read_text()
        assert html.count("<img") >= len(re.findall(r"^!\[", page.read_text(), re.MULTILINE)), page
        text = " ".join(pages[built(site, page).resolve()].text)
        left = re.search(r".{0,60}(?:```|\| ?-{3}|\]\(|^\s*#+ |\*\*).{0,60}", text)
        assert left is None, f"{page.relative_to(ROOT)}: not rendered: {left[0]}"


def test_a_broken_site_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<h1 id="x">A</h1><a href="b.html">b</a><a href="#x">x</a><a href="#y">y</a><a href="https://a.b">c</a>'
        '<img src="no.png"><script src="https://a.b/c.js"></script><a href="../../out.html">d</a>'
        '<p style="background: url(//a.b/d.png)"><a href="file:///etc/hosts">e</a>'
    )
    (tmp_path / "a.css").write_text('@import "https://a.b/f.css"; a { background: url(data:x) }')
    root = tmp_path.resolve()
    assert broken(root, read(root)) == [
        "a.css: https://a.b/f.css",
        "a.html: #y: no such anchor",
        "a.html: ../../out.html: no such file",
        "a.html: //a.b/d.png: loaded from elsewhere",
        "a.html: //a.b/d.png: no link of the web",
        "a.html: b.html: no such file",
        "a.html: file:///etc/hosts: no link of the web",
        "a.html: https://a.b/c.js: loaded from elsewhere",
        "a.html: no.png: no such file",
    ]


def test_every_page_is_in_the_navigation_once() -> None:
    listed = re.findall(r'"([^"]+\.md)"', (ROOT / "docs" / "zensical.toml").read_text())
    pages = (*PAGES, *(notebook.with_suffix(".md") for notebook in NOTEBOOKS))
    assert sorted(listed) == sorted(page.relative_to(ROOT).as_posix() for page in pages)


def test_a_notebook_is_a_page_with_its_outputs(site: Path) -> None:
    for notebook in NOTEBOOKS:
        html = (site / "examples" / f"{notebook.stem}.html").read_text()
        assert html.count("<img") >= 2 and "matplotlib.pyplot" in re.sub(r"<[^>]*>", "", html), notebook
        for number in (1, 2):
            assert (site / "examples" / f"{notebook.stem}-{number}.png").read_bytes().startswith(b"\x89PNG")
    assert 'href="../examples/reconstruct.html"' in (site / "docs" / "python.html").read_text()


def test_links_out_of_the_pages_become_text(tmp_path: Path) -> None:
    page = ROOT / "docs" / "recipes.md"
    text = BUILDER.for_site(page, {page, ROOT / "docs" / "python.md"})
    assert "lie in mimscale/recipes." in text and "](../mimscale" not in text
