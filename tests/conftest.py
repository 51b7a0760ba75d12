"""Fixtures that every test may use."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# With MINIVLLM_TEST_GPU=1 (`make test-gpu`) the tests of GPU kernels run compiled, on the GPU. Without it all tests are about
# the CPU, also on a machine that has a GPU (the processes they start inherit that), and Triton's kernels run in its
# interpreter: it must know before a kernel is defined.
ON_GPU = os.environ.get("MINIVLLM_TEST_GPU") == "1"
if not ON_GPU:
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    os.environ.setdefault("TRITON_INTERPRET", "1")

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


@pytest.fixture(scope="session")
def native_table() -> Any:
    """The compiled CPU kernels as a table of ops; tests of them are skipped where there is no compiler."""
    from minivllm.kernels.cpu.build import NoNativeKernels, find_or_build
    from minivllm.kernels.cpu.library import NativeLibrary
    from minivllm.kernels.ops import native_ops

    try:
        return native_ops(NativeLibrary(find_or_build()))
    except NoNativeKernels as reason:
        pytest.skip(f"no native kernels: {reason}")


@pytest.fixture(scope="session")
def triton_device() -> Any:
    """Where Triton's kernels run in this test run: on the GPU, or in the interpreter on the CPU."""
    import torch

    pytest.importorskip("triton")
    return torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture(scope="session")
def make_driver() -> Any:
    """``make_driver(shuffle=None, **options)`` -> a driver of a new runner."""
    import model_driver

    return model_driver.make_driver


@pytest.fixture(scope="session")
def tiny_models() -> Any:
    """The module with the small random models and ``save_model``."""
    import tiny_models

    return tiny_models


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
