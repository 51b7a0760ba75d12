"""What is compiled before the first request is all that requests will launch."""

import inspect
from collections.abc import Callable, Hashable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minivllm.config import Config
from minivllm.llm import LLM
from minivllm.types import SamplingParams

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # the interpreter computes with -inf and NaN as asked

OPTIONS: dict[str, Any] = {
    "dtype": "float32", "num_threads": 1, "max_num_seqs": 5, "max_num_batched_tokens": 24, "num_gpu_blocks_override": 40,
    "gpu_kernels": "triton",
}  # fmt: skip


def variant(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Hashable:
    """What Triton compiles ``kernel`` for when it is launched so: types, constants, and which numbers are 1 or divide by 16."""
    import triton.language as tl

    parameters = inspect.signature(kernel.fn).parameters
    unspecialized = kernel.kwargs.get("do_not_specialize") or ()
    given = dict(zip(parameters, arguments, strict=False)) | options
    key: list[Hashable] = [kernel.fn.__name__]
    for name, value in given.items():
        if isinstance(value, torch.Tensor):
            key.append((name, value.dtype, value.data_ptr() % 16 == 0))
        elif name not in parameters or parameters[name].annotation is tl.constexpr or not isinstance(value, int):
            key.append((name, type(value) if isinstance(value, float) else value))
        else:
            key.append((name, "int" if name in unspecialized else (value == 1, value % 16 == 0)))
    return tuple(key)


def generate_all_kinds(llm: LLM) -> None:
    """Prompts in chunks, decodes of every number of rows, every way to sample."""
    prompts = [[(7 * i + j) % 50 for j in range(n)] for i, n in enumerate((2, 9, 30))]
    for more in ({}, {"top_k": 9, "top_p": 0.9, "min_p": 0.02}, {"min_p": 0.1}):
        llm.generate(prompts, [SamplingParams(seed=i, max_tokens=1 + i, ignore_eos=True, **more) for i in range(3)])
    for count in (0, 3):
        llm.generate(prompts[:1], SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, logprobs=count))
    llm.generate(prompts[:1], SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True))


@pytest.mark.parametrize(("case", "invariant"), [("qwen3", False), ("llama-gqa", True)])
def test_nothing_is_launched_that_was_not_rehearsed(
    tiny_model: Callable[[str], tuple[Path, Any]],
    bundled_model: Path,
    triton_device: Any,
    monkeypatch: pytest.MonkeyPatch,
    case: str,
    invariant: bool,
) -> None:
    if triton_device.type == "cuda":
        pytest.skip("on a GPU Triton itself is asked, below")
    from minivllm.kernels.triton import chip as chips
    from minivllm.runner.build_device import RunnerSizes, play, title_of

    launched: dict[Hashable, None] = {}
    rehearsed: dict[Hashable, None] = {}
    settled: list[Any] = []

    def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        launched[variant(kernel, arguments, options)] = None
        kernel[grid](*arguments, **options)

    def note(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        rehearsed[variant(kernel, arguments, options)] = None

    def keep(config: Config, spec: Any, setup: Any, need: Any, kv: Any, sizes: Any) -> Callable[[], None]:
        settled.append((spec, setup, need, kv, RunnerSizes.of(config, sizes)))
        return lambda: None

    real = chips.this_chip
    monkeypatch.setattr(chips, "this_chip", lambda device: replace(real(device), launch=launch))
    monkeypatch.setattr("minivllm.runner.build._rehearse", keep)
    llm = LLM(str(tiny_model(case)[0]), tokenizer=str(bundled_model), device="cpu", batch_invariant=invariant, **OPTIONS)
    generate_all_kinds(llm)
    play(*settled[0], note)
    assert "0x" not in title_of(*settled[0])  # an address would be another at every start
    assert len(launched) > 15
    assert not [key for key in launched if key not in rehearsed]


@pytest.mark.parametrize("invariant", [False, True])
def test_a_gpu_compiles_nothing_more(
    tiny_model: Callable[[str], tuple[Path, Any]],
    bundled_model: Path,
    triton_device: Any,
    monkeypatch: pytest.MonkeyPatch,
    invariant: bool,
) -> None:
    if triton_device.type != "cuda":
        pytest.skip("there is no GPU")
    import triton

    llm = LLM(str(tiny_model("qwen3")[0]), tokenizer=str(bundled_model), device="cuda", batch_invariant=invariant, **OPTIONS)
    compiled: list[str] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda **given: compiled.append(given["repr"]) and None)
    generate_all_kinds(llm)
    assert compiled == []


def test_an_error_in_a_rehearsal_is_told_and_survived(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minivllm.runner import build_device

    def fail(*given: Any) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(build_device, "compile_all", fail)
    monkeypatch.setattr(build_device, "fork_helpers", lambda: None)
    monkeypatch.setattr(build_device, "title_of", lambda *given: "")
    nothing: Any = None
    with caplog.at_level("WARNING", logger="minivllm"):
        build_device.Rehearsal(nothing, nothing, nothing, nothing, nothing).wait()
    assert "no such luck" in caplog.text
