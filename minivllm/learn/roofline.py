"""What this machine can do at most: floating-point operations and bytes in a second, by two short tests.

One large product of matrices says how fast the arithmetic is, a copy how fast memory is. The copy is as large as the model's
weights (within bounds), because that is what every step reads: weights that fit into a CPU's cache really are read faster.
The best of several tries counts: a roof is what can be had, not what is had on average beside others.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

LEAST_COPY_BYTES, MOST_COPY_BYTES = 4 * 2**20, 512 * 2**20


@dataclass(frozen=True)
class Roofline:
    """The machine's two limits."""

    flops_per_s: float
    bytes_per_s: float

    @property
    def ridge(self) -> float:
        """Operations for each byte moved from which on arithmetic is the limit."""
        return self.flops_per_s / self.bytes_per_s

    def least_s(self, flops: float, num_bytes: float) -> float:
        """The least time for so many operations and so many bytes, which overlap."""
        return max(flops / self.flops_per_s, num_bytes / self.bytes_per_s)

    def best(self, other: "Roofline | None") -> "Roofline":
        """The higher of two measured roofs."""
        if other is None:
            return self
        return Roofline(max(self.flops_per_s, other.flops_per_s), max(self.bytes_per_s, other.bytes_per_s))


def measure(device: torch.device, dtype: torch.dtype, weight_bytes: int, seconds: float = 0.5) -> Roofline:
    """Measure for ``seconds`` each."""
    size = 1024 if device.type == "cpu" else 4096
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product_s = _best_s(lambda: a @ b, device, seconds)
    count = min(max(weight_bytes, LEAST_COPY_BYTES), MOST_COPY_BYTES)
    source = torch.zeros(count, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    copy_s = _best_s(lambda: target.copy_(source), device, seconds)
    return Roofline(2 * size**3 / product_s, 2 * count / copy_s)


def _best_s(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The shortest time that ``work`` took, of those that fit into ``seconds``, and of three at least."""
    times: list[float] = []
    end_s = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end_s:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin_s = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin_s)
    return min(times)
