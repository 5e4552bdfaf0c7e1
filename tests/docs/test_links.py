"""Every link of the documentation leads somewhere, every path in it exists, and the site builds."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import pytest
from markdown import Markdown
from pymdownx.slugs import slugify

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
# A path in backquotes that begins with one of the repository's folders.
_PATH = re.compile(
    r"`((?:benchmarks|client|deploy|docs|drafters|model_repository|prompts|python_backend|scripts"
    r"|tests)/[\w./-]*)`"
)


class Page(NamedTuple):
    """What a page links to, and the anchors of its headings."""

    links: list[str]
    anchors: set[str]


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.page = Page([], set())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.page.links.extend(link for link in (values.get("href"), values.get("src")) if link)
        if (anchor := values.get("id")) is not None:
            self.page.anchors.add(anchor)


@cache
def read(path: Path) -> Page:
    """Renders a page as `make docs` does, with the anchors of the repository's own pages."""
    converter = Markdown(
        extensions=["tables", "toc", "pymdownx.superfences"],
        extension_configs={"toc": {"slugify": slugify(case="lower")}},
    )
    reader = _Reader()
    reader.feed(converter.convert(path.read_text(encoding="utf-8")))
    return reader.page


def broken(path: Path) -> list[str]:
    """The links of a page that lead nowhere."""
    wrong = []
    for link in read(path).links:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            continue
        target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        known = target.exists()
        if known and parts.fragment:
            known = target.suffix == ".md" and parts.fragment in read(target).anchors
        if not known:
            wrong.append(link)
    return wrong


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_link_leads_somewhere(path: Path) -> None:
    assert broken(path) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A heading\n\n[a](#a-heading) [b](#another) [c](none.md) ![d](none.png)\n")
    assert broken(page) == ["#another", "none.md", "none.png"]


@pytest.mark.parametrize("path", sorted(DOCS.glob("*.md")), ids=lambda path: path.name)
def test_no_link_leaves_the_site(path: Path) -> None:
    """What lies outside `docs/` is named as a path: there is no such page in the site."""
    links = [urlsplit(link) for link in read(path).links]
    targets = [(path.parent / link.path).resolve() for link in links if not link.scheme]
    assert [target for target in targets if not target.is_relative_to(DOCS)] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_path_exists(path: Path) -> None:
    named = _PATH.findall(path.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_site_builds_and_fetches_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path)]
    built = subprocess.run(
        command, cwd=ROOT, env={"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    loads = re.compile(r'<(?:script|link|img)[^>]*(?:src|href)="?(https?:[^" >]*)')
    for page in tmp_path.glob("*.html"):
        assert loads.findall(page.read_text()) == [], page.name
