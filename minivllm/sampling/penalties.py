"""Penalties for tokens that the sequence holds already.

* ``repetition_penalty`` r (Keskar et al., 2019): tokens of prompt or output; a positive logit is divided by r, a negative one
  multiplied with it.
* ``frequency_penalty`` f and ``presence_penalty`` p (OpenAI): tokens of the output only; the logit loses f times the token's
  count, and p once.

In that order. The counts are not kept: they are read off the sequence's own tokens when a row asks, so they survive preemption
and replay by themselves, and a batch without penalties pays nothing. Only the logits of tokens that occur are touched: memory
is [rows asking, tokens known], never rows x vocabulary.
"""

import numpy as np
import torch
from torch import Tensor

from minivllm.sampling.batch import SampleBatch
from minivllm.types import NewRow


class Penalties:
    """The three penalties by row. Written only by ``Sampler``."""

    def __init__(self, max_num_seqs: int) -> None:
        self._repetition = np.ones(max_num_seqs, dtype=np.float32)
        self._presence = np.zeros(max_num_seqs, dtype=np.float32)
        self._frequency = np.zeros(max_num_seqs, dtype=np.float32)
        self._num_prompt = np.zeros(max_num_seqs, dtype=np.int64)

    def set_row(self, new: NewRow) -> None:
        """See ``Feature``."""
        self._repetition[new.row] = new.sampling.repetition_penalty
        self._presence[new.row] = new.sampling.presence_penalty
        self._frequency[new.row] = new.sampling.frequency_penalty
        self._num_prompt[new.row] = new.num_prompt

    def _repeating(self, batch: SampleBatch) -> np.ndarray:
        """Places of rows with a repetition penalty."""
        return np.flatnonzero(self._repetition[batch.rows] != 1.0)

    def _counting(self, batch: SampleBatch) -> np.ndarray:
        """Places of rows with a penalty on output tokens that have some."""
        asks = (self._presence[batch.rows] != 0.0) | (self._frequency[batch.rows] != 0.0)
        return np.flatnonzero(asks & (batch.positions > self._num_prompt[batch.rows]))

    def active(self, batch: SampleBatch) -> bool:
        """See ``Feature``."""
        return bool(len(self._repeating(batch)) or len(self._counting(batch)))

    def apply(self, logits: Tensor, batch: SampleBatch) -> None:
        """See ``Feature``."""
        where = self._repeating(batch)
        if len(where):
            part = batch.take(where)
            _repetition(logits, batch.put(where), part, part.put(self._repetition[part.rows]))
        where = self._counting(batch)
        if len(where):
            part = batch.take(where)
            values = np.stack([self._frequency[part.rows], self._presence[part.rows]])
            _counts(logits, batch.put(where), part, self._num_prompt[part.rows], part.put(values))


def _known(part: SampleBatch, begins: np.ndarray) -> tuple[Tensor, Tensor]:
    """Each row's tokens from ``begins`` to its position, as ids and a mask of what is really its own, both [rows, width].

    Places outside hold the row's last known token, which the caller treats anyhow: writing a value twice changes nothing.
    """
    first, last = int(begins.min()), int(part.positions.max())
    places = torch.arange(first, last, device=part.tokens.device)  # [width]
    edges = part.put(np.stack([begins, part.positions]))[:, :, None]  # [2, rows, 1]
    own = (places >= edges[0]) & (places < edges[1])
    index = places.where(own, edges[1] - 1)
    return part.tokens[part.put(part.rows)[:, None], index].long(), own


def _repetition(logits: Tensor, where: Tensor, part: SampleBatch, penalty: Tensor) -> None:
    """Divide or multiply the logits of all known tokens."""
    ids, _ = _known(part, np.zeros_like(part.positions))
    seen = logits[where[:, None], ids]
    factor = penalty[:, None]
    logits[where[:, None], ids] = torch.where(seen > 0, seen / factor, seen * factor)


def _counts(logits: Tensor, where: Tensor, part: SampleBatch, num_prompt: np.ndarray, values: Tensor) -> None:
    """Lower the logits of output tokens by frequency x count + presence. ``values``: [2, rows] float32."""
    ids, own = _known(part, num_prompt)
    in_order = ids.masked_fill(~own, logits.shape[1]).sort(dim=1).values  # what is not the row's own stands last
    count = torch.searchsorted(in_order, ids, right=True) - torch.searchsorted(in_order, ids)
    seen = logits[where[:, None], ids]
    logits[where[:, None], ids] = seen - values[0][:, None] * count - values[1][:, None]
