"""The table of advisories in docs/reliability.md and the tests: each names what the other has."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ID = r"(?:CVE|PYSEC|GO)-20\d\d-\d+|GHSA(?:-[0-9a-z]{4}){3}|(?:vllm|llama\.cpp|SGLang|sendnn)#\d+"
OURS = re.compile(r"(CVE|PYSEC|GO)_(20\d\d)_(\d+)|(vllm|llama_cpp|SGLang|sendnn)_(\d+)")
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def rows(repo: Path) -> list[tuple[list[str], str]]:
    """The advisories of each row, and what is said of them."""
    page = (repo / "docs" / "reliability.md").read_text(encoding="utf-8")
    part = page.partition("\n### Advisories\n")[2].partition("\n## ")[0]
    found = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| ") and "---" not in line]
    return [(re.findall(ID, cells[0]), cells[-1]) for cells in found[1:]]


def functions(repo: Path) -> dict[str, str]:
    """Every test function, and the file that it is in."""
    return {
        node.name: file.read_text(encoding="utf-8")
        for file in (repo / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def named(function: str) -> set[str]:
    """The advisories in a function's name."""
    found = OURS.finditer(function)
    return {f"{m[1]}-{m[2]}-{m[3]}" if m[1] else f"{m[4].replace('_', '.', 1)}#{m[5]}" for m in found}


def test_the_table_names_tests_that_exist(rows: list[tuple[list[str], str]], repo: Path) -> None:
    tests = functions(repo)
    assert len(rows) > 60
    for ids, told in rows:
        assert ids
        for name in re.findall(r"`(test_\w+)`", told):
            assert name in tests, f"{ids}: there is no {name}"
        if not told.startswith("does not apply"):
            assert re.search(r"`test_\w+`", told), f"{ids}: neither a test nor a reason"


def test_an_advisory_that_has_a_test_is_in_its_name_or_its_parameters(rows: list[tuple[list[str], str]], repo: Path) -> None:
    tests = functions(repo)
    for ids, told in rows:
        names = re.findall(r"`(test_\w+)`", told)
        for each in ids if names else ():
            assert any(each in named(name) or f'"{each}"' in tests[name] for name in names), f"{each} is in none of {names}"


def test_every_test_of_an_advisory_is_in_the_table(rows: list[tuple[list[str], str]], repo: Path) -> None:
    told = {each for ids, _ in rows for each in ids}
    listed = " ".join(text for _, text in rows)
    for name in functions(repo):
        if found := named(name):
            assert found <= told and f"`{name}`" in listed, name


def test_no_advisory_twice(rows: list[tuple[list[str], str]]) -> None:
    ids = [each for found, _ in rows for each in found]
    assert sorted(set(ids)) == sorted(ids)


def test_what_these_tests_say_holds_under_optimisation_too() -> None:
    """pytest rewrites the asserts of test files, so ``python -O``, which drops asserts, does not drop these."""
    with pytest.raises(AssertionError):
        assert not HERE.exists()


@pytest.mark.slow
@pytest.mark.skipif(bool(sys.flags.optimize), reason="this is that run")
def test_nothing_rests_on_asserts_of_the_package(repo: Path) -> None:
    """The same tests with the server, the engine and the helpers under ``python -O``."""
    files = [str(HERE / name) for name in ("test_advisories.py", "test_keys.py", "test_error_bodies.py", "test_table.py")]
    slow = ("backtracking", "25048", "23310", "29770", "105757", "no_body_is_long", "48942", "48943", "48944")
    fast = " and ".join(f"not {name}" for name in slow)
    done = subprocess.run(
        [sys.executable, "-O", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", fast, *files],
        cwd=repo, env={**os.environ, "PYTHONOPTIMIZE": "1"}, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[-1]) > 150
