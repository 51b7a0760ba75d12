"""Order and victim: who is admitted next, and who gives way when blocks run out.

A policy owns the waiting queue and puts a number on a request's claim; it decides nothing else. What a step may hold
(``batching_policy``) is the scheduler's matter. To add a policy: write a class with the methods of ``Policy`` and name it in
``POLICIES``; the option's values are those names.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

from minivllm.scheduler.request import Request, RequestView


class Policy(Protocol):
    """Order of the waiting requests and of those that run."""

    def claim(self, request: RequestView) -> tuple[float, ...]:
        """How strong a request's claim is: lower runs earlier and is preempted later. Asked once, on arrival."""
        ...

    def add(self, request: Request) -> None:
        """Queue a request."""
        ...

    def remove(self, request: Request) -> None:
        """Take a request out of the queue."""
        ...

    def in_order(self) -> Iterator[Request]:
        """The waiting requests, strongest claim first; the queue is not changed while this is walked."""
        ...

    def victim(self, candidates: Sequence[Request]) -> Request:
        """Which of these gives its blocks back. ``candidates`` are sorted by claim and not empty."""
        ...

    def let_ahead(self, request: Request, running: Sequence[Request]) -> Sequence[Request]:
        """Those who run, though they came later than this waiting request."""
        ...

    def __len__(self) -> int: ...


def by_claim(request: Request) -> tuple[float, ...]:
    """Sort key of requests."""
    return request.claim


class FirstComeFirstServed:
    """Arrival decides. Owns the waiting queue; written by the ``Scheduler`` alone."""

    def __init__(self) -> None:
        self._queue: list[Request] = []  # sorted by claim: a preempted request is in front again

    def claim(self, request: RequestView) -> tuple[float, ...]:
        """The order of arrival."""
        return (request.uid,)

    def add(self, request: Request) -> None:
        """Queue a request in its place: a search and one move of the list's tail."""
        insort(self._queue, request, key=by_claim)

    def remove(self, request: Request) -> None:
        """Take a request out."""
        index = bisect_left(self._queue, request.claim, key=by_claim)
        if index >= len(self._queue) or self._queue[index] is not request:
            raise ValueError(f"request {request.uid} is not in the queue")
        del self._queue[index]

    def in_order(self) -> Iterator[Request]:
        """Strongest claim first."""
        return iter(self._queue)

    def victim(self, candidates: Sequence[Request]) -> Request:
        """The least claim gives way, so the oldest always gets on: nobody starves."""
        return candidates[-1]

    def let_ahead(self, request: Request, running: Sequence[Request]) -> Sequence[Request]:
        """Nobody is let ahead; who passes by one that does not fit (``planner.py``) is not in its way."""
        return ()

    def __len__(self) -> int:
        return len(self._queue)


class ByPriority(FirstComeFirstServed):
    """The request's ``priority`` decides (lower is earlier), arrival among equals."""

    def claim(self, request: RequestView) -> tuple[float, ...]:
        """Priority, then order of arrival."""
        return (request.spec.priority, request.uid)

    def let_ahead(self, request: Request, running: Sequence[Request]) -> Sequence[Request]:
        """Whose priority is better."""
        return [r for r in running if r.spec.priority < request.spec.priority and r.arrival_s > request.arrival_s]


POLICIES: Mapping[str, type[FirstComeFirstServed]] = MappingProxyType({"fcfs": FirstComeFirstServed, "priority": ByPriority})
