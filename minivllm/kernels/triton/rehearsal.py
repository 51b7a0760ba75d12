"""Compiling every kernel before the first is launched, many at a time.

A kernel is compiled when it is first launched: 0.3 to 3 seconds each, one after the other, for some sixty of them. But what a
kernel is compiled for depends on types, constants and alignments alone, not on values. So a program can be *rehearsed*: it is
run on tensors without memory (torch's "meta" device) and on a chip whose ``launch`` takes note of what it is given. All that
was noted is then compiled by some threads at once, from Triton's cache where it is there, and loaded onto the device. A real
launch finds it ready.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import triton

from minivllm.kernels.triton.chip import Launch

THREADS = 16  # most of a compilation runs outside the interpreter's lock, or in another process


def compile_all(play: Callable[[Launch], None]) -> int:
    """Compile and load every kernel that ``play`` would launch with the launch it is given. Returns how many these are.

    An error of ``play`` or of a compilation is raised at the end; what could be compiled is ready all the same.
    """
    noted: dict[int, Any] = {}

    def note(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        compiled = kernel.warmup(*arguments, grid=grid, **options)
        noted[id(compiled)] = compiled

    with ThreadPoolExecutor(THREADS) as pool:
        with triton.AsyncCompileMode(pool):
            play(note)
        for loaded in [pool.submit(_load, compiled) for compiled in noted.values()]:
            loaded.result()
    return len(noted)


def _load(compiled: Any) -> None:
    """Have the kernel's launcher built and its code brought to the device, as its first launch would."""
    if hasattr(compiled, "result"):  # what stood for the kernel while it was being compiled
        compiled = compiled.result()
    compiled.run  # noqa: B018 (the property does it)
