"""How the compiled kernels come to be: once a machine, never half, and not at all where that would be unsafe."""

import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from minivllm.config import make_config
from minivllm.errors import InvalidOption
from minivllm.kernels.cpu import build
from minivllm.kernels.cpu.build import NoNativeKernels, find_or_build
from minivllm.kernels.cpu.library import NativeLibrary
from minivllm.runner.build import choose_ops

CPU = torch.device("cpu")
SMALL = 'extern "C" long answer() { return 42; }\n'


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own and a source that compiles at once."""
    if not any(build.shutil.which(name) for name in build.COMPILERS):
        pytest.skip("there is no C++ compiler")
    source = tmp_path / "native.cpp"
    source.write_text(SMALL)
    monkeypatch.setattr(build, "SOURCE", source)
    monkeypatch.setattr(build.Path, "home", lambda: tmp_path)
    return tmp_path


def test_compiled_once_and_kept_by_content(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = find_or_build()
    assert first.parent == home / ".cache" / "mini-vllm" and stat.S_IMODE(first.parent.stat().st_mode) == 0o700
    monkeypatch.setattr(build, "_compile", lambda *args: pytest.fail("it was there already"))
    assert find_or_build() == first
    monkeypatch.undo()
    assert [p.name for p in first.parent.iterdir()] == [first.name]  # nothing half-made is left


def test_another_source_or_cpu_is_another_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = find_or_build()
    build.SOURCE.write_text(SMALL + "// changed\n")
    second = find_or_build()
    monkeypatch.setattr(build, "_cpu", lambda: "another")
    third = find_or_build()
    assert len({first, second, third}) == 3 and first.exists()  # whoever uses the first still has it


def test_a_source_that_does_not_compile_says_why(home: Path) -> None:
    build.SOURCE.write_text("int broken(\n")
    with pytest.raises(NoNativeKernels, match=r"failed .*error"):
        find_or_build()
    assert list((home / ".cache" / "mini-vllm").iterdir()) == []


def test_a_folder_open_to_others_is_not_used(home: Path) -> None:
    find_or_build()
    (home / ".cache" / "mini-vllm").chmod(0o777)
    with pytest.raises(NoNativeKernels, match="written by others"):
        find_or_build()


def test_a_home_that_cannot_be_written(home: Path) -> None:
    (home / ".cache").write_text("a file")
    with pytest.raises(NoNativeKernels, match="no folder to keep them in"):
        find_or_build()


def test_a_library_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    wrong = tmp_path / "native.so"
    wrong.write_bytes(b"not a library")
    with pytest.raises(NoNativeKernels, match="could not be loaded"):
        NativeLibrary(wrong)


def test_without_a_compiler_torch_serves_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    ops, reasons = choose_ops(make_config(), torch.float32, CPU)
    assert ops.name == "torch" and ops.native is None
    assert len(reasons) == 1 and "no C++ compiler was found" in reasons[0]
    with pytest.raises(InvalidOption, match="--cpu-kernels native cannot be had here: no C"):
        choose_ops(make_config(cpu_kernels="native"), torch.float32, CPU)


def test_choices(native_table: Any) -> None:
    for options in ({}, {"cpu_kernels": "native"}, {"batch_invariant": True}):
        assert choose_ops(make_config(**options), torch.bfloat16, CPU)[0].name == "native"
    for options, name in (({}, "torch"), ({"batch_invariant": True}, "torch, batch-invariant")):
        assert choose_ops(make_config(cpu_kernels="torch", **options), torch.float32, CPU)[0].name == name
    assert choose_ops(make_config(), torch.float32, torch.device("meta"))[0].name == "torch"


def test_one_pool_has_the_threads(tiny_model: Any, make_driver: Any) -> None:
    """Two pools would fight for the cores: where the native kernels compute, torch stays on the caller's thread."""
    folder = str(tiny_model("llama-gqa")[0])
    make_driver(model=folder, num_threads=2)
    assert torch.get_num_threads() == 1
    make_driver(model=folder, num_threads=2, cpu_kernels="torch")
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
