"""Fixtures that every test may use."""

import os
from pathlib import Path

import pytest

# These tests are about the CPU backend, also on a machine that has a GPU; the processes they start inherit it.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repo() -> Path:
    """The checkout's root."""
    return REPO


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Public data files beside the checkout; tests that need them are skipped where they are absent."""
    folder = Path(os.environ.get("MINIVLLM_TEST_DATA", REPO.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("the shared data folder is not there (set MINIVLLM_TEST_DATA)")
    return folder


@pytest.fixture(scope="session")
def bundled_model(repo: Path) -> Path:
    """The model that ships with the project."""
    return repo / "minivllm" / "assets" / "stories"
