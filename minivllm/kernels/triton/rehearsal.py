"""Compiling every kernel before the first is launched, many at a time.

A kernel is compiled when it is first launched: 0.3 to 3 seconds each, one after the other, for some eighty of them. But what a
kernel is compiled for depends on types, constants and alignments alone, not on values. So a program can be *rehearsed*: it is
run on tensors without memory (torch's "meta" device) and on a chip whose ``launch`` takes note of what it is given. All that
was noted is then compiled at once and loaded onto the device. A real launch finds it ready.

Compiling is half Python, so threads alone gain little. The first start of a model is helped by processes: forked from this one,
which has imported all they need, they compile into Triton's cache on disk and never touch the device. Later starts read that
cache; a file in it says that it is complete.
"""

import ctypes
import hashlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton

from minivllm.kernels.triton.chip import Launch

THREADS = 16  # they wait for the disk, for the C compiler that makes launchers, and for the driver
MAX_PROCESSES = 12
_PR_SET_PDEATHSIG = 1
Play = Callable[[Launch], None]


def compile_all(play: Play, title: str, helpers: Executor | None) -> int:
    """Compile and load every kernel that ``play`` would launch with the launch it is given. Returns how many these are.

    ``title`` names all that these kernels depend on but for their source. ``helpers``: from ``fork_helpers``. An error of
    ``play`` or of a compilation is raised at the end; what could be compiled is ready all the same.
    """
    done = Path(triton.knobs.cache.dir) / f"rehearsed-{_digest(title)}"
    if helpers is not None and not done.exists():
        for job in [helpers.submit(_compile, *job) for job in _jobs(play)]:
            job.exception()  # what one cannot do is tried below, and said there
    noted: dict[int, Any] = {}

    def note(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        compiled = kernel.warmup(*arguments, grid=grid, **options)
        noted[id(compiled)] = compiled

    with ThreadPoolExecutor(THREADS) as pool:
        with triton.AsyncCompileMode(pool):
            play(note)
        for loaded in [pool.submit(_load, compiled) for compiled in noted.values()]:
            loaded.result()
    done.touch()
    return len(noted)


def fork_helpers() -> Executor | None:
    """Processes for ``compile_all``; None where forking is not safe, because other threads may hold locks, or gains nothing.

    To be called before this process starts threads, and shut down by the caller.
    """
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    if num_cores < 4 or threading.active_count() > 1:
        return None
    target = triton.runtime.driver.active.get_current_target()
    pool = ProcessPoolExecutor(min(num_cores, MAX_PROCESSES), get_context("fork"), _without_device, (target,))
    with warnings.catch_warnings():  # that the driver has threads: a helper has no business with it
        warnings.simplefilter("ignore", DeprecationWarning)
        pool.submit(int).result()  # forks all of them
    return pool


class _NoDevice:
    """In place of Triton's driver: says what to compile for, and nothing else."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self._target


def _without_device(target: Any) -> None:
    """What a helper does first. It ends with the process that forked it, however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    triton.runtime.driver.set_active(_NoDevice(target))


def _compile(module: str, name: str, specialization: str) -> None:
    """Compile one kernel into the cache."""
    getattr(import_module(module), name).preload(specialization)


def _jobs(play: Play) -> list[tuple[str, str, str]]:
    """What ``play`` would have compiled: for each kernel its module, its name, and what it is specialized for."""
    found: dict[tuple[str, str, str], None] = {}
    thread = threading.get_ident()

    def keep(**told: Any) -> bool:
        if threading.get_ident() != thread:
            return False
        found[told["fn"].module, told["fn"].name, told["compile"]["specialization_data"]] = None
        return True  # do not compile

    def note(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        kernel.warmup(*arguments, grid=grid, **options)

    knobs = triton.knobs.runtime
    before, knobs.jit_cache_hook = knobs.jit_cache_hook, keep
    try:
        play(note)
    finally:
        knobs.jit_cache_hook = before
    return list(found)


def _digest(title: str) -> str:
    """A name for what is compiled, with these sources and this Triton."""
    found = hashlib.sha256(f"{triton.__version__} {title}".encode())
    for path in sorted(Path(__file__).parent.rglob("*.*")):
        if path.suffix in (".py", ".json"):
            found.update(path.read_bytes())
    return found.hexdigest()


def _load(compiled: Any) -> None:
    """Have the kernel's launcher built and its code brought to the device, as its first launch would."""
    if hasattr(compiled, "result"):  # what stood for the kernel while it was being compiled
        compiled = compiled.result()
    compiled.run  # noqa: B018 (the property does it)
