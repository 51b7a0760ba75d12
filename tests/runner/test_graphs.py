"""When a piece of a step is captured, what serves until then, what a failed capture costs. Graphs are faked: no GPU needed."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import pytest
import torch

from minivllm.runner.graphs import MISSES, PAUSE, Graphs, Part, ladder

SIZES = (1, 2, 4, 8, 16)


class FakeGraph:
    """Remembers what ran while it was capturing, and runs it again."""

    current: "FakeGraph | None" = None
    fails = False

    def __init__(self) -> None:
        self.ran: list[tuple[str, int]] = []

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        if FakeGraph.fails:
            raise RuntimeError("the driver refused")
        FakeGraph.current = self

    def capture_end(self) -> None:
        FakeGraph.current = None

    def replay(self) -> None:
        LOG.extend(self.ran)


LOG: list[tuple[str, int]] = []


class Clock:
    """Every look at it takes half a second."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 0.5
        return self.now_s


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(FakeGraph, "fails", False)

    def part(name: str) -> Callable[[int], None]:
        return lambda size: FakeGraph.current.ran.append((name, size)) if FakeGraph.current else None

    parts = {name: Part(part(name), SIZES) for name in ("body", "head")} | {"rare": Part(part("rare"), SIZES, when_idle=False)}
    made = Graphs(parts, lambda: None, torch.device("cpu"), Clock())
    monkeypatch.setattr(made, "_stream", object())
    LOG.clear()
    yield made
    LOG.clear()


def test_a_piece_is_captured_after_it_was_missed_twice(graphs: Graphs) -> None:
    for _ in range(MISSES):
        graphs.capture_missed()
        assert graphs.num_captured == 0
        assert not graphs.run("body", 3)
    graphs.capture_missed()
    assert graphs.num_captured == 1
    assert graphs.run("body", 3) and graphs.run("body", 4) and LOG == [("body", 4), ("body", 4)]
    assert not graphs.run("head", 3)


def test_a_larger_piece_serves_until_the_right_one_is_there(graphs: Graphs) -> None:
    for _ in range(MISSES):
        graphs.run("body", 8)
    graphs.capture_missed()
    assert graphs.run("body", 5) and LOG == [("body", 8)]
    assert graphs.run("body", 1), "a few rows more cost nothing"
    assert not graphs.run("body", 9) and not graphs.run("body", 17)


def test_idle_time_captures_everything_the_largest_first_then_the_smallest(graphs: Graphs) -> None:
    turns, order = 1, []
    while graphs.capture_next():
        turns += 1
        order.append(list(graphs._graphs)[-1].size)
    assert order == [16, 16, 1, 1, 2, 2, 4, 4, 8]
    assert turns == graphs.num_captured == 2 * len(SIZES) and graphs.num_pieces == 3 * len(SIZES)
    assert all(graphs.run("body", size) for size in range(1, 17)) and LOG[0] == ("body", 1) and LOG[-1] == ("body", 16)
    assert graphs.largest == 16


def test_what_may_never_come_is_captured_when_it_comes(graphs: Graphs) -> None:
    while graphs.capture_next():
        pass
    for _ in range(MISSES):
        assert not graphs.run("rare", 4)
    graphs.capture_missed()
    assert graphs.run("rare", 4) and LOG == [("rare", 4)]


def test_captures_under_traffic_leave_time_for_requests(graphs: Graphs) -> None:
    for _ in range(MISSES):
        assert not graphs.run("body", 1) and not graphs.run("body", 16)
    graphs.capture_missed()
    assert graphs.num_captured == 1  # it took half a second
    waited = 0
    while graphs.num_captured == 1:
        graphs.capture_missed()
        waited += 1
    assert waited == PAUSE


def test_a_capture_that_fails_is_not_tried_again_and_nothing_else_is_lost(
    graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeGraph, "fails", True)
    for _ in range(MISSES):
        graphs.run("body", 4)
    graphs.capture_missed()
    monkeypatch.setattr(FakeGraph, "fails", False)
    while graphs.capture_next():
        pass
    assert graphs.num_captured == 2 * len(SIZES) - 1
    assert graphs.run("body", 4) and LOG == [("body", 8)]  # the next one serves
    assert graphs.run("head", 4)


def test_without_a_gpu_nothing_is_captured() -> None:
    graphs = Graphs({"body": Part(lambda size: None, SIZES)}, lambda: None, torch.device("cpu"))
    assert not graphs.run("body", 1) and not graphs.capture_next()
    graphs.capture_missed()
    assert graphs.num_captured == 0


@pytest.mark.parametrize("largest", [1, 3, 8, 100, 256, 1000, 2048])
def test_sizes_waste_little(largest: int) -> None:
    sizes = ladder(largest)
    assert sizes[-1] == largest and list(sizes) == sorted(set(sizes))
    assert all(b - a <= max(8, a / 8) for a, b in pairwise(sizes))
