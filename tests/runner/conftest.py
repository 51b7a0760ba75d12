"""Small random models and a driver of the runner, for tests of whole models."""

import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

SUPPORT = Path(__file__).resolve().parent.parent / "support"


def _support(name: str) -> Any:
    """Load a file of tests/support, which is no package."""
    key = f"tests_support_{name}"
    if key not in sys.modules:
        spec = spec_from_file_location(key, SUPPORT / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[key] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[key])
    return sys.modules[key]


@pytest.fixture(scope="session")
def make_driver() -> Any:
    """``make_driver(shuffle=None, **options)`` -> a driver of a new runner."""
    return _support("model_driver").make_driver


@pytest.fixture(scope="session")
def tiny_models() -> Any:
    """The module with the cases and ``save_model``."""
    return _support("tiny_models")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tiny_models: Any) -> Callable[[str], tuple[Path, Any]]:
    """``tiny_model(case)`` -> folder and transformers' model, made once a session."""
    made: dict[str, tuple[Path, Any]] = {}

    def get(case: str) -> tuple[Path, Any]:
        if case not in made:
            folder = tmp_path_factory.mktemp(case)
            made[case] = (folder, tiny_models.save_model(case, folder))
        return made[case]

    return get
