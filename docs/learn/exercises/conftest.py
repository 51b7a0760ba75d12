"""Where the solution is that an exercise's tests are to try."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--solution my.py``; or a folder that has a file for each exercise, named like its test."""
    parser.addoption("--solution", type=Path, default=None, metavar="FILE", help="the file with your solution")


@pytest.fixture(scope="module")
def solution(request: pytest.FixtureRequest) -> ModuleType:
    """The reader's file, as a module."""
    path: Path | None = request.config.getoption("--solution")
    if path is None:
        pytest.fail("Name the file with your solution: --solution my.py", pytrace=False)
    if path.is_dir():
        path /= Path(str(request.fspath)).name.removeprefix("test_")
    if not path.is_file():
        pytest.fail(f"There is no file {path}.", pytrace=False)
    spec = importlib.util.spec_from_file_location(f"solution_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
