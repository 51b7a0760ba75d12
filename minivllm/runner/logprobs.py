"""Which rows want to know logprobs, and what they are told.

Logprobs are of the raw logits: of what the model said before a temperature, a bias or a penalty was applied. So the logits of
rows that ask are set aside before the sampler works on them, and looked at once tokens are chosen.

Of a prompt, each hidden state tells the logprob of the token that follows it, which is known. Logits of all positions at once
would be as large as nothing else in a step (2.5 GiB of 4,096 tokens over 150,000 words), so they are made a slice at a time.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from minivllm.kernels.ops import Ops
from minivllm.kernels.reference import RowLogprobs
from minivllm.models.decoder import Decoder
from minivllm.runner.batch import to_device
from minivllm.runner.rows import Int64, RowStep
from minivllm.types import NewRow, TokenLogprobs

LEAST_SLICE, LARGEST_SLICE = 16, 256


class Model(Protocol):
    """What makes hidden states into logprobs."""

    decoder: Decoder
    ops: Ops


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
        self._of_prompt = np.zeros(max_num_seqs, dtype=np.int64)
        self._slice = slice_rows(max_num_seqs)

    def set_row(self, new: NewRow) -> None:
        """A sequence takes a row."""
        wanted = new.sampling.logprobs
        self._counts[new.row] = -1 if wanted is None else wanted
        self._of_prompt[new.row] = new.sampling.prompt_logprobs or 0

    def asking(self, rows: npt.NDArray[np.int64]) -> Asking | None:
        """Who of ``rows`` [num_sampled] asks; None: nobody."""
        counts = self._counts[rows]
        places = np.flatnonzero(counts >= 0)
        return Asking(places, counts[places]) if len(places) else None

    def of_prompts(
        self, step: RowStep, num_prompt: Int64, hidden: Tensor, tokens: Tensor, model: "Model"
    ) -> "PromptLogprobs | None":
        """Logprobs of the prompts' tokens that follow those of the step, for the rows that want them; None: no row does.
        ``hidden`` [num_tokens, hidden], ``tokens`` [rows, columns] on the device. Waits for nothing."""
        if not len(step.telling):
            return None
        rows, counts = step.rows[step.telling], self._of_prompt[step.rows[step.telling]]
        begins = step.ends[step.telling] - step.lengths[step.telling]  # in their sequences
        lengths = np.minimum(step.ends[step.telling], num_prompt[rows] - 1) - begins
        in_step = (np.cumsum(step.lengths) - step.lengths)[step.telling]
        index = np.concatenate([np.arange(length) for length in lengths])
        pages = np.stack([np.repeat(in_step, lengths), np.repeat(rows, lengths), np.repeat(begins + 1, lengths)])
        pages += index * np.array([[1], [0], [1]])
        places, of_row, columns = to_device(pages, hidden.device)
        chosen = tokens[of_row, columns].long()
        found = [
            model.ops.logprobs(model.decoder.head(hidden[part]), token, int(counts.max()))
            for part, token in zip(torch.split(places, self._slice), torch.split(chosen, self._slice), strict=True)
        ]
        whole = RowLogprobs(*(torch.cat([getattr(f, name) for f in found]) for name in RowLogprobs.__annotations__))
        return PromptLogprobs(step.telling, lengths, counts, whole)


class PromptLogprobs:
    """Logprobs of prompts' tokens on their way to the host. Never changes."""

    def __init__(self, works: Int64, lengths: Int64, counts: Int64, found: RowLogprobs) -> None:
        """``works`` [n]: places in the plan; ``lengths`` [n] tokens each; ``counts`` [n]: likeliest tokens each wants."""
        self._works, self._lengths, self._counts = works, lengths, counts
        self._found, self._arrived = to_host(found), None
        if found.logprobs.is_cuda:
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def by_work(self, num_work: int) -> tuple[tuple[TokenLogprobs, ...], ...]:
        """Wait for them: those of each of a plan's works."""
        if self._arrived is not None:
            self._arrived.synchronize()
        places = np.arange(self._lengths.sum())
        every = told(self._found, Asking(places, np.repeat(self._counts, self._lengths)))
        shares: list[tuple[TokenLogprobs, ...]] = [()] * num_work
        ends = np.cumsum(self._lengths)
        for work, end, length in zip(self._works.tolist(), ends.tolist(), self._lengths.tolist(), strict=True):
            shares[work] = tuple(every[place] for place in range(end - length, end))
        return tuple(shares)


def by_prompt(found: PromptLogprobs | None, num_work: int) -> tuple[tuple[tuple[TokenLogprobs, ...], ...], frozenset[int]]:
    """What is told of the prompts of each of a plan's works, and the works in which it is not finite."""
    if found is None:
        return (), frozenset()
    shares = found.by_work(num_work)
    return shares, frozenset(i for i, share in enumerate(shares) if not all(math.isfinite(t.logprob) for t in share))


def slice_rows(max_num_seqs: int) -> int:
    """Positions of prompts whose logits are made at once. Those of as many rows as a step may sample have their memory; fewer
    than ``LEAST_SLICE`` would read the head's weights too often."""
    return min(max(max_num_seqs, LEAST_SLICE), LARGEST_SLICE)


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
