"""The site builds without a warning, every link in it leads somewhere, and nothing in it comes from another host."""

import posixpath
import re
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import pytest


class PageParser(HTMLParser):
    """What a page links to, what it loads, and the places in it that can be linked to."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.places: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value is not None}
        self.places |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if "src" in given:
            self.loaded.append(given["src"])
        if tag == "link" and given.get("rel") not in ("canonical", "prev", "next"):
            self.loaded.append(given["href"])


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, PageParser]:
    """Every page, by its path in the site."""
    found = {}
    for file in site.rglob("*.html"):
        parser = PageParser()
        parser.feed(file.read_text(encoding="utf-8"))
        found[file.relative_to(site).as_posix()] = parser
    assert len(found) > 20
    return found


def reached(page: str, to: str) -> str:
    """The file that a relative link leads to."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), unquote(urlsplit(to).path)))
    return posixpath.normpath(f"{path}/index.html") if urlsplit(to).path.endswith("/") or path == "." else path


def test_every_link_leads_somewhere(pages: dict[str, PageParser], site: Path) -> None:
    dead = []
    for page, parsed in pages.items():
        if page == "404.html":  # its links are absolute, because nobody knows where it is shown
            continue
        for to in parsed.links + parsed.loaded:
            parts = urlsplit(to)
            if parts.scheme or to.startswith("#__"):
                continue
            file = reached(page, to) if parts.path else page
            if file == "." or (not (site / file).is_file() and not (site / file / "index.html").is_file()):
                dead.append(f"{page}: {to}")
            elif parts.fragment and file in pages and unquote(parts.fragment) not in pages[file].places:
                dead.append(f"{page}: {to} (no such place)")
    assert dead == []


def test_nothing_is_loaded_from_another_host(pages: dict[str, PageParser], site: Path) -> None:
    assert [f"{page}: {url}" for page, parsed in pages.items() for url in parsed.loaded if urlsplit(url).netloc] == []
    styles = "".join(file.read_text(encoding="utf-8") for file in site.rglob("*.css"))
    assert re.findall(r"url\(['\"]?(?:https?:)?//[^)]*\)|@import[^;]*", styles) == []


def test_names_lead_to_their_lines(pages: dict[str, PageParser]) -> None:
    """The life of a request names files; each has a page that shows it."""
    assert "source/minivllm/engine/engine.py/index.html" in pages
    assert any(to.endswith("source/minivllm/engine/engine.py/") for to in pages["architecture/index.html"].links)


@pytest.mark.parametrize(
    ("link", "said"),
    [
        ("[`take`](../pool.py)", None),
        ("[`give`](../pool.py)", "index.md links to give in pool.py, which does not define it"),
        ("[a pool](../pond.py)", "contains a link '../pond.py'"),
    ],
)
def test_a_strict_build_sees_a_link_that_went_stale(
    repo: Path, tmp_path: Path, run_mkdocs: Callable[..., subprocess.CompletedProcess[str]], link: str, said: str | None
) -> None:
    pytest.importorskip("mkdocs")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# A page\n\n{link}\n", encoding="utf-8")
    (tmp_path / "pool.py").write_text("def take():\n    pass\n", encoding="utf-8")
    hook = repo / "docs" / "hooks" / "sources.py"
    (tmp_path / "mkdocs.yml").write_text(f"site_name: small\nhooks: [{hook}]\nnav: [index.md]\n", encoding="utf-8")
    done = run_mkdocs(tmp_path / "mkdocs.yml", tmp_path / "site")
    if said is None:
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode != 0 and said in done.stderr


SOURCE = '''
LIMIT: int = 3
class Pool:
    size: int
    def take(self) -> None:
        pass
def main() -> None:
    pass
'''


@pytest.mark.parametrize(
    ("name", "line"),
    [("LIMIT", 2), ("Pool", 3), ("Pool.size", 4), ("Pool.take", 5), ("main()", 7), ("take", None), ("Pool.give", None)],
)
def test_a_name_is_found(sources: ModuleType, name: str, line: int | None) -> None:
    assert sources.find_line(SOURCE, name) == line


def test_links_are_led_into_the_site(sources: ModuleType) -> None:
    there = {"minivllm/kv/pool.py", "docs/learn/a.md", "docs/log.md", "README.md", "docs/learn/x.svg"}
    links = sources.Links("docs/learn/a.md", lambda path: path in there)
    text = (
        "[`Pool.take`](../../minivllm/kv/pool.py) [log](../log.md#here) [all](../../README.md) ![x](x.svg) [gone](gone.py)\n"
        "[out](https://example.org/a.py) `kv/pool.py` [`kv/pool.py`](../../minivllm/kv/pool.py)\n"
        "```\n[`Pool.take`](../../minivllm/kv/pool.py) `kv/pool.py`\n```\n"
    )
    assert links.rewritten(text) == (
        "[`Pool.take`](../source/minivllm/kv/pool.py.md) [log](../log.md#here) [all](../source/README.md) ![x](x.svg) "
        "[gone](gone.py)\n"
        "[out](https://example.org/a.py) [`kv/pool.py`](../source/minivllm/kv/pool.py.md) "
        "[`kv/pool.py`](../source/minivllm/kv/pool.py.md)\n"
        "```\n[`Pool.take`](../../minivllm/kv/pool.py) `kv/pool.py`\n```\n"
    )
    assert links.files(text) == {"minivllm/kv/pool.py", "docs/log.md", "README.md"}


@pytest.mark.parametrize("path", ["docs/log.md", "docs/learn/a.md", "README.md", "minivllm/kv/pool.py", "deploy/README.md"])
def test_a_place_leads_home(sources: ModuleType, path: str) -> None:
    assert sources.home(sources.place(path)) == path
