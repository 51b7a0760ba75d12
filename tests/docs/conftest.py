"""The site of docs/, built once, and the hook that gives it its source pages."""

import importlib.util
import os
import subprocess
import sys
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


def run_mkdocs(config: Path, to: Path) -> subprocess.CompletedProcess[str]:
    """Build a site; strict: a warning is a failure."""
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--config-file", str(config), "--site-dir", str(to)],
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="session")
def site(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    folder = tmp_path_factory.mktemp("site")
    done = run_mkdocs(repo / "mkdocs.yml", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    return folder
