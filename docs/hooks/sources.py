"""A hook of mkdocs: links from pages to source files lead to pages of the site that show these files.

Pages link to code in the way that works in the repository, ``[kv/block_pool.py](../../minivllm/kv/block_pool.py)``. mkdocs
warns of links that leave ``docs/``, and a link to a host would need one, and a network. So each file that a page links to
becomes a page under ``source/``, and the site is whole by itself. Files that pages name without a link, like
``kv/block_pool.py`` in backticks, are linked too.

A link whose text is one name in backticks, ``[`BlockPool.take`](../../minivllm/kv/block_pool.py)``, leads to that name's line.
The line is looked up when the site is built, so no link goes stale as the file grows; a name that is gone ends a strict build.

Every path in here is relative to the repository; ``home`` is the inverse of ``place``.
"""

import ast
import logging
import posixpath
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

log = logging.getLogger("mkdocs.hooks.sources")

SHOWN: Final = {".py": "python", ".cpp": "cpp", ".json": "json", ".toml": "toml", ".yml": "yaml", ".html": "html"}
FENCE: Final = re.compile(r"^(`{3,}|~{3,}).*?^\1[ \t]*$", re.MULTILINE | re.DOTALL)
LINK: Final = re.compile(r"(?<!!)\[(?P<text>(?:[^][]|\[[^]]*\])*)\]\((?P<to>[^)\s]+)\)")
MENTION: Final = re.compile(r"(?<![\[`\w])`(?P<path>[a-z_][\w/]*\.(?:py|cpp))`(?![\]`])")
UNSEARCHED: Final = "---\nsearch:\n  exclude: true\n---\n\n"  # a search is for pages; code would drown them
IMAGE: Final = re.compile(r'(?P<before><img\b[^>]*\bsrc=")(?P<to>[^"]+)"')  # HTML in Markdown, which mkdocs leaves as it is
LINE: Final = "__codelineno-0-"  # what pymdownx.highlight calls the lines of a page's first block


def place(path: str) -> str:
    """Where a file of the repository stands among the site's sources."""
    if path.startswith("docs/") and not path.endswith(".py"):  # which mkdocs.yml leaves out
        return path.removeprefix("docs/")
    return f"source/{path}" if path.endswith(".md") else f"source/{path}.md"


def home(src_uri: str) -> str:
    """Which file of the repository a page of the site is."""
    if not src_uri.startswith("source/"):
        return f"docs/{src_uri}"
    path = src_uri.removeprefix("source/")
    return path if Path(path).stem.lower() == "readme" else path.removesuffix(".md")


def find_line(source: str, name: str) -> int | None:
    """The line on which ``name`` (a function, class, method, constant or field, dotted) is defined."""
    body: Iterable[ast.stmt] = ast.parse(source).body
    line = None
    for part in name.removesuffix("()").split("."):
        for node in body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            if getattr(node, "name", None) == part or any(isinstance(t, ast.Name) and t.id == part for t in targets):
                line, body = node.lineno, getattr(node, "body", ())
                break
        else:
            return None
    return line


class Links:
    """The links of one page. ``exists`` says what the repository has."""

    def __init__(self, path: str, exists: Callable[[str], bool]) -> None:
        self.path = path
        self._exists = exists

    def target(self, to: str) -> str | None:
        """The file or folder of the repository that a link leads to; None: it leads elsewhere, or nowhere."""
        parts = urlsplit(to)
        if parts.scheme or parts.netloc or not parts.path or parts.path.startswith("/"):
            return None
        path = posixpath.normpath(posixpath.join(posixpath.dirname(self.path), parts.path))
        return path if not path.startswith("..") and self._exists(path) else None

    def mentioned(self, text: str) -> str | None:
        """The file that backticks name: by its path, or by its path in the package."""
        return next((p for p in (f"minivllm/{text}", text) if "/" in p and self._exists(p)), None)

    def files(self, markdown: str) -> set[str]:
        """All that a page links to or mentions."""
        text = FENCE.sub("", markdown)
        found = {self.target(match["to"]) for match in LINK.finditer(text)}
        found |= {self.mentioned(match["path"]) for match in MENTION.finditer(text)}
        return {path for path in found if path is not None and path != self.path}

    def rewritten(self, markdown: str) -> str:
        """The page with its links leading to where the site has these files."""
        done, at = [], 0
        for fence in FENCE.finditer(markdown):
            done += [self._prose(markdown[at : fence.start()]), fence[0]]
            at = fence.end()
        return "".join([*done, self._prose(markdown[at:])])

    def from_url(self, to: str, url: str) -> str:
        """A link of the page, as the browser needs it that shows the page at ``url`` of the site."""
        path = self.target(to)
        return to if path is None else posixpath.relpath(place(path), url or ".")

    def _prose(self, text: str) -> str:
        text = MENTION.sub(self._link_mention, text)
        return LINK.sub(self._link, text)

    def _link_mention(self, match: re.Match[str]) -> str:
        path = self.mentioned(match["path"])
        return match[0] if path is None else f"[{match[0]}]({posixpath.relpath(path, posixpath.dirname(self.path) or '.')})"

    def _link(self, match: re.Match[str]) -> str:
        path = self.target(match["to"])
        if path is None:
            return match[0]
        to = posixpath.relpath(place(path), posixpath.dirname(place(self.path)) or ".")
        fragment = urlsplit(match["to"]).fragment
        return f"[{match['text']}]({to}{'#' + fragment if fragment else ''})"


def shown(root: Path, path: str) -> str:
    """The page of a file, or of a folder: its files, each with the first line of its docstring."""
    if path.endswith(".md"):
        return (root / path).read_text(encoding="utf-8")
    if (root / path).is_dir():
        inside = sorted(p for p in (root / path).iterdir() if p.suffix in SHOWN and p.name != "__init__.py")
        rows = [f"* [{p.name}]({path.rpartition('/')[2]}/{p.name}) {_first_line(p)}" for p in inside]
        return "\n".join([f"# {path}/", "", *rows])
    text = (root / path).read_text(encoding="utf-8")
    fence = f'~~~~~~{SHOWN.get(Path(path).suffix, "text")} linenums="1"'
    return f"{UNSEARCHED}# {path}\n\n{fence}\n{text}~~~~~~\n"


def _first_line(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) if path.suffix == ".py" else None
    return docstring.partition("\n")[0] if docstring else ""


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add a page for each file that pages link to, and for those that these link to."""
    root = Path(config.docs_dir).parent

    def exists(path: str) -> bool:
        return (root / path).exists()

    left = [home(f.src_uri) for f in files.documentation_pages()]
    seen = set(left)
    while left:
        path = left.pop()
        if not path.endswith(".md") and not (root / path).is_dir():
            continue
        for found in sorted(Links(path, exists).files(shown(root, path)) - seen):
            seen.add(found)
            if files.get_file_from_path(place(found)) is None:
                left.append(found)
                made = File.generated(config, place(found), content=shown(root, found), inclusion=InclusionLevel.NOT_IN_NAV)
                files.append(made)
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead the links of a page to the site's own pages."""
    root = Path(config.docs_dir).parent
    path = home(page.file.src_uri)
    if not path.endswith(".md") and not (root / path).is_dir():
        return markdown
    links = Links(path, lambda p: (root / p).exists())
    return IMAGE.sub(lambda m: f'{m["before"]}{links.from_url(m["to"], page.url)}"', links.rewritten(markdown))


def on_page_content(html: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links whose text is a name to its line."""
    root = Path(config.docs_dir).parent

    def with_line(match: re.Match[str]) -> str:
        path = home(posixpath.normpath(posixpath.join(page.url, match["to"])) + ".md")
        if path.endswith(".py") and (root / path).is_file():
            line = find_line((root / path).read_text(encoding="utf-8"), match["name"])
            if line is not None:
                return f'<a href="{match["to"]}#{LINE}{line}"><code>{match["name"]}</code></a>'
            if "/" not in match["name"] and Path(match["name"]).suffix not in SHOWN:
                log.warning("%s links to %s in %s, which does not define it", page.file.src_uri, match["name"], path)
        return match[0]

    return re.sub(r'<a href="(?P<to>[^"#]*source/[^"#]+)"><code>(?P<name>[^<]+)</code></a>', with_line, html)
