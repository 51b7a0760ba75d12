"""Which rows want to know logprobs, and what they are told.

Logprobs are of the raw logits: of what the model said before a temperature, a bias or a penalty was applied. So the logits of
rows that ask are set aside before the sampler works on them, and looked at once tokens are chosen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from minivllm.kernels.reference import RowLogprobs
from minivllm.types import NewRow, TokenLogprobs


@dataclass(frozen=True)
class Asking:
    """The rows of a step that ask."""

    places: npt.NDArray[np.int64]  # [num_asking]: among the rows that get a token
    counts: npt.NDArray[np.int64]  # [num_asking]: likeliest tokens each wants

    @property
    def most(self) -> int:
        """Likeliest tokens to look for."""
        return int(self.counts.max())


class LogprobRows:
    """How many likeliest tokens each row wants. Written by the runner."""

    def __init__(self, max_num_seqs: int) -> None:
        self._counts = np.full(max_num_seqs, -1, dtype=np.int64)  # -1: none, nor the chosen one's

    def set_row(self, new: NewRow) -> None:
        """A sequence takes a row."""
        wanted = new.sampling.logprobs
        self._counts[new.row] = -1 if wanted is None else wanted

    def asking(self, rows: npt.NDArray[np.int64]) -> Asking | None:
        """Who of ``rows`` [num_sampled] asks; None: nobody."""
        counts = self._counts[rows]
        places = np.flatnonzero(counts >= 0)
        return Asking(places, counts[places]) if len(places) else None


def told(found: RowLogprobs, asking: Asking) -> dict[int, TokenLogprobs]:
    """What each asking row is told, by its place; ``found`` must have arrived on the host."""
    logprobs, ranks, ids, values = (t.tolist() for t in (found.logprobs, found.ranks, found.top_ids, found.top_logprobs))
    return {
        place: TokenLogprobs(logprobs[i], ranks[i], tuple(ids[i][:count]), tuple(values[i][:count]))
        for i, (place, count) in enumerate(zip(asking.places.tolist(), asking.counts.tolist(), strict=True))
    }


def to_host(found: RowLogprobs) -> RowLogprobs:
    """Ask for a copy in pinned memory of the host, and do not wait for it."""
    if not found.logprobs.is_cuda:
        return found
    return RowLogprobs(*(_copied(t) for t in (found.logprobs, found.ranks, found.top_ids, found.top_logprobs)))


def _copied(tensor: Tensor) -> Tensor:
    """A tensor of the device, on its way to the host."""
    return tensor.new_empty(tensor.shape, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def by_work(told: Mapping[int, TokenLogprobs], works: Sequence[int], num_work: int) -> tuple[TokenLogprobs | None, ...]:
    """The same for each of a plan's works; ``works``: which of them each place is."""
    found: list[TokenLogprobs | None] = [None] * num_work
    for place, what in told.items():
        found[works[place]] = what
    return tuple(found)
