"""A histogram that costs little enough to be fed in every step.

The metrics libraries' own histograms take a lock and several calls for each value; a step of 128 rows would pay that 128
times inside the event loop. Here a batch of values is a loop of one bisection each, and the cumulative form that
Prometheus wants is made only when somebody asks. It knows no names and no labels.
"""

from bisect import bisect_left
from collections.abc import Iterable

# Bounds of contracts that dashboards of this field already draw; +Inf is implied.
TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
          640.0, 2560.0)  # fmt: skip
TOKEN_TIME_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
REQUEST_TIME_S = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
                  1920.0, 7680.0)  # fmt: skip
STEP_TOKENS = (1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0)


def one_two_five(highest: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50 ... up to ``highest``."""
    bounds: list[float] = []
    power = 1
    while True:
        for digit in (1, 2, 5):
            if digit * power > highest:
                return tuple(bounds)
            bounds.append(float(digit * power))
        power *= 10


class Histogram:
    """Written by ``Metrics`` alone. ``bounds`` are upper bounds that belong to their bucket, ascending, without infinity."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # not cumulative; the last one is over every bound
        self.total = 0.0  # sum of all values

    def add(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def add_all(self, values: Iterable[float]) -> None:
        """Count several values."""
        counts, bounds, total = self.counts, self.bounds, self.total
        for value in values:
            counts[bisect_left(bounds, value)] += 1
            total += value
        self.total = total

    def cumulative(self) -> list[tuple[str, float]]:
        """``(upper bound as text, values up to it)`` as the exposition format has it, "+Inf" last."""
        rows: list[tuple[str, float]] = []
        seen = 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            seen += count
            rows.append((bound, seen))
        return rows
