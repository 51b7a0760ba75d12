"""Captured pieces of a step: launched as one, where launching kernel by kernel would take longer than computing.

A small decode step is some two hundred kernels of a few microseconds, and a host needs 5 to 20 microseconds to launch one. A
CUDA graph (https://developer.nvidia.com/blog/cuda-graphs/) holds them all and is launched by one call. It computes with the
addresses it was captured with, at the sizes it was captured with. So a step is padded up to the next size that there is, and
everything that changes stands at fixed addresses (``runner/stage.py``).

Nothing waits for a capture. A piece that has not been captured runs kernel by kernel, with the same results; it is captured
after it was missed twice, while the device is busy with what was launched already, or when nothing else is to be done. A
capture that fails is noted, and its piece stays as it is.
"""

import logging
import math
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

log = logging.getLogger("minivllm")
MISSES = 2  # of a size before it is captured under traffic: a capture costs some ten uncaptured steps
PAUSE = 4  # times as long as a capture took, before the next one under traffic
NEAR = 1.3  # a captured size at most this much larger serves instead


class Piece(NamedTuple):
    """One of a step's parts at one size."""

    part: str
    size: int


def ladder(largest: int) -> tuple[int, ...]:
    """Sizes worth a graph: steps of at most an eighth, so that at most that much is computed in vain."""
    sizes, size = [1, 2, 4], 8
    while size < largest:
        sizes.append(size)
        size += max(8, 1 << max(0, size.bit_length() - 4))
    return tuple(sorted({s for s in sizes if s < largest} | {largest}))


class Part(NamedTuple):
    """A part of a step that may be captured."""

    run: Callable[[int], None]  # runs it at a padded size
    sizes: Sequence[int]  # that may be captured, rising
    when_idle: bool = True  # capture sizes that nobody asked for yet


class Graphs:
    """The graphs there are, by piece. Written by the thread that drives the runner."""

    def __init__(
        self,
        parts: Mapping[str, Part],
        blank: Callable[[], None],
        device: torch.device,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``blank`` makes the next run of a part one over padding alone. ``clock`` gives seconds."""
        self._blank, self._clock, self._rest_until_s = blank, clock, -math.inf
        self._run = {name: part.run for name, part in parts.items()}
        self._sizes = {name: tuple(part.sizes) for name, part in parts.items()}
        self._when_idle = {name: tuple(part.sizes) for name, part in parts.items() if part.when_idle}
        self._device = device
        self._graphs: dict[Piece, torch.cuda.CUDAGraph] = {}
        self._captured: dict[str, list[int]] = {part: [] for part in parts}  # rising
        self._misses: dict[Piece, int] = {}
        self._failed: set[Piece] = set()
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def run(self, part: str, size: int) -> bool:
        """Run a part at ``size`` or a little more, if it was captured; False: nothing was done."""
        sizes, captured = self._sizes[part], self._captured[part]
        if size > (sizes[-1] if sizes else 0):
            return False
        wanted = Piece(part, sizes[bisect_left(sizes, size)])
        graph = self._graphs.get(wanted)
        if graph is None:
            self._misses[wanted] = self._misses.get(wanted, 0) + 1
            at = bisect_left(captured, size)
            if at == len(captured) or captured[at] > size * NEAR + 8:
                return False
            graph = self._graphs[Piece(part, captured[at])]
        graph.replay()
        return True

    def capture_missed(self) -> None:
        """Capture the piece that was missed most, if it was missed often enough. One at a time, with pauses: requests wait."""
        if self._stream is None or not self._misses or (begin_s := self._clock()) < self._rest_until_s:
            return
        if due := [p for p, misses in self._misses.items() if misses >= MISSES and p not in self._failed]:
            self._capture(max(due, key=lambda piece: self._misses[piece]))
            end_s = self._clock()
            self._rest_until_s = end_s + PAUSE * (end_s - begin_s)

    def capture_next(self) -> bool:
        """Capture the piece from which most is gained of those left: the smallest. False: there is none.

        The largest of each part go first: they share one pool of memory, and what the largest needed serves all others. (From
        small to large, each would find the pool's pieces too small and add its own: 3.1 GiB instead of one piece's share.)
        """
        if self._stream is None:
            return False
        left = [
            Piece(part, size)
            for part, sizes in self._when_idle.items()
            for size in sizes
            if (piece := Piece(part, size)) not in self._graphs and piece not in self._failed
        ]
        if left:
            largest = [piece for piece in left if piece.size == self._sizes[piece.part][-1]]
            self._capture(largest[0] if largest else min(left, key=lambda piece: piece.size))
        return len(left) > 1

    @property
    def num_captured(self) -> int:
        """How many graphs there are."""
        return len(self._graphs)

    @property
    def num_pieces(self) -> int:
        """How many graphs there may come to be."""
        return sum(map(len, self._sizes.values()))

    @property
    def largest(self) -> int:
        """The largest size of any piece."""
        return max((size for sizes in self._sizes.values() for size in sizes), default=0)

    def _capture(self, piece: Piece) -> None:
        """Capture ``piece``; the device is not asked and goes on with what it has.

        It is run once as it is, over padding: kernels that were never launched are loaded, which a capture must not do.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            self._blank()
            self._run[piece.part](piece.size)
            with torch.cuda.stream(self._stream):
                graph.capture_begin(self._pool, capture_error_mode="thread_local")
                try:
                    self._run[piece.part](piece.size)
                finally:
                    graph.capture_end()
        except Exception as error:
            self._failed.add(piece)
            log.warning("%s steps of size %d stay uncaptured: %s", piece.part, piece.size, error)
        else:
            self._graphs[piece] = graph
            captured = self._captured[piece.part]
            captured.insert(bisect_left(captured, piece.size), piece.size)
        self._misses.pop(piece, None)
