"""What the gates look at: the files of the project, parsed once."""

import ast
import io
import subprocess
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SKIPPED_TOKENS = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


@dataclass(frozen=True)
class Source:
    """One Python file of the package."""

    path: Path  # relative to the repository
    text: str
    tree: ast.Module
    code_lines: frozenset[int]  # lines that hold code: comments are free, a docstring counts as one line

    def code_between(self, first: int, last: int) -> int:
        """Code lines from ``first`` to ``last``, both counted."""
        return sum(first <= line <= last for line in self.code_lines)


def docstrings(tree: ast.Module) -> Iterator[tuple[int, int]]:
    """First and last line of each docstring."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node):
            yield node.body[0].lineno, node.body[0].end_lineno or node.body[0].lineno


def parse(path: Path, text: str) -> Source:
    """Parse a file and find its code lines."""
    tree = ast.parse(text)
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in SKIPPED_TOKENS:
            lines.update(range(token.start[0], token.end[0] + 1))
    for first, last in docstrings(tree):
        lines.difference_update(range(first + 1, last + 1))
    return Source(path, text, tree, frozenset(lines))


@pytest.fixture(scope="session")
def sources(repo: Path) -> list[Source]:
    """Every Python file of the package."""
    files = sorted((repo / "minivllm").rglob("*.py"))
    return [parse(f.relative_to(repo), f.read_text(encoding="utf-8")) for f in files]


@pytest.fixture(scope="session")
def project_files(repo: Path) -> list[Path]:
    """Every file that is, or would be, committed."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], cwd=repo, capture_output=True, check=False
    )
    if listed.returncode != 0:
        pytest.skip("this is no git checkout, so what belongs to the project is not known")
    return [f for name in listed.stdout.decode().split("\0") if name and (f := repo / name).is_file()]


@pytest.fixture(scope="session")
def parse_source() -> object:
    """``parse``, for tests of the gates themselves."""
    return parse
