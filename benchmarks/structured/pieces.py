"""Where the time of the host's loop goes, by piece: methods are wrapped in clocks while something runs.

Pieces lie inside each other (``Engine.step`` holds nearly all), and a clock costs about half a microsecond a call.
"""

import functools
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from minivllm.engine.engine import Engine
from minivllm.engine.grammars import Grammars
from minivllm.engine.guide_pool import GuidePool, Worker
from minivllm.runner.device_runner import DevicePending, DeviceRunner
from minivllm.runner.graphs import Graphs
from minivllm.runner.stage import Stage
from minivllm.scheduler.scheduler import Scheduler
from minivllm.text.outputs import OutputProcessor

PIECES: Final = (
    (Engine, "step"), (Scheduler, "schedule"), (Scheduler, "apply"), (GuidePool, "gather"), (Worker, "send"),
    (Worker, "read_answer"), (Scheduler, "guides"), (Grammars, "masks"), (GuidePool, "finish"), (DevicePending, "sample"),
    (Stage, "send_masks"), (DeviceRunner, "sample"), (DeviceRunner, "launch"), (Stage, "send"), (Graphs, "run"),
    (DevicePending, "result"), (OutputProcessor, "process"),
)  # fmt: skip


class Clocks:
    """Seconds and calls by piece. Written by the wrapped methods."""

    def __init__(self) -> None:
        self.taken_s: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)

    def wrapped(self, name: str, method: Any) -> Any:
        """The method, timed."""

        @functools.wraps(method)
        def timed(*args: Any, **named: Any) -> Any:
            begin_s = time.perf_counter()
            try:
                return method(*args, **named)
            finally:
                self.taken_s[name] += time.perf_counter() - begin_s
                self.calls[name] += 1

        return timed

    def report(self, steps: int) -> None:
        """Print each piece's share of a step."""
        for name, taken_s in self.taken_s.items():
            print(f"    {name:<24} {taken_s / steps * 1e3:7.3f} ms a step {self.calls[name] / steps:6.1f} calls")


@contextmanager
def timed_pieces(pieces: Any = PIECES) -> Iterator[Clocks]:
    """Time the pieces meanwhile."""
    clocks, before = Clocks(), [(cls, name, vars(cls)[name]) for cls, name in pieces]
    for cls, name, method in before:
        setattr(cls, name, clocks.wrapped(f"{cls.__name__}.{name}", method))
    try:
        yield clocks
    finally:
        for cls, name, method in before:
            setattr(cls, name, method)
