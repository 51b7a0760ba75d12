"""A step in which a kernel is compiled is announced, so that nobody takes it for a hang."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from minivllm.engine.process import _on_compile

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")


@triton.jit
def add_one(pointer: Any) -> None:
    place = pointer + tl.program_id(0)
    tl.store(place, tl.load(place) + 1)


@pytest.fixture
def begun() -> Iterator[list[str]]:
    """Grows with every announcement."""
    before = triton.knobs.runtime.jit_cache_hook
    found: list[str] = []
    _on_compile(lambda: found.append("compiling"))
    yield found
    triton.knobs.runtime.jit_cache_hook = before


def test_the_hook_announces_and_lets_triton_go_on(begun: list[str]) -> None:
    assert triton.knobs.runtime.jit_cache_hook(key="", repr="", fn=None, compile={}) is False
    assert begun == ["compiling"]


@pytest.mark.skipif(os.environ.get("MINIVLLM_TEST_GPU") != "1" or not torch.cuda.is_available(), reason="there is no GPU")
def test_a_kernel_is_announced_when_it_is_compiled_and_not_when_it_is_there(begun: list[str]) -> None:
    values = torch.zeros(4, device="cuda")
    add_one[(4,)](values)
    assert begun, "the first launch compiles"
    count = len(begun)
    add_one[(4,)](values)
    assert len(begun) == count and values.tolist() == [2.0] * 4
