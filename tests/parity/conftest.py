"""Models for the parity tests."""

from pathlib import Path

import pytest
from tiny_models import save_model


@pytest.fixture(scope="module")
def case_folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(request.param, folder)
    return folder
