"""The site of docs/, built once, and the hook that gives it its source pages."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def sources(repo: Path) -> ModuleType:
    """The hook, as mkdocs loads it: by its path."""
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("mkdocs_sources", repo / "docs" / "hooks" / "sources.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def run_mkdocs() -> Callable[[Path, Path], subprocess.CompletedProcess[str]]:
    """``run_mkdocs(config, to)`` builds a site; strict: a warning is a failure."""

    def run(config: Path, to: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(config)]
        environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
        return subprocess.run(
            [*command, "--site-dir", str(to)], env=environment, capture_output=True, text=True, check=False
        )

    return run


@pytest.fixture(scope="session")
def site(
    repo: Path, tmp_path_factory: pytest.TempPathFactory, run_mkdocs: Callable[[Path, Path], subprocess.CompletedProcess[str]]
) -> Path:
    """The folder of the built site."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    folder = tmp_path_factory.mktemp("site")
    done = run_mkdocs(repo / "mkdocs.yml", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    return folder
