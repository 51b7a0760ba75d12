"""Sampling on a device that runs behind the host: the same order of features, the same draw, and nothing asked of the device.

Nearly every row wants a temperature or the most likely token. What such a row needs is six integers (``wishes``), which travel
on the step's page; one kernel then does all of it and can be captured. Rows that ask for more make the step take the long way
(``sample``): biases and penalties in torch as on the CPU, then one search for the lowest logit that min_p, top_k and top_p
leave, then the same draw among what is left.

The noise of a draw is computed in float32 here and in float64 on the CPU (``sampling/gumbel.py``): the same tokens, but where
two candidates are closer than that.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from minivllm.kernels.triton.cutoff import Cutoff
from minivllm.kernels.triton.sampling import NUM_WISHES, Draw
from minivllm.sampling.batch import SampleBatch
from minivllm.sampling.shaping import shaping
from minivllm.types import NewRow

_LOW = 0xFFFFFFFF


class DeviceSampler:
    """Sampling state of every row. Written only by the runner."""

    def __init__(self, max_num_seqs: int, vocab_size: int, eos_token_ids: Sequence[int], kernels: tuple[Draw, Cutoff]) -> None:
        (self._draw, self._cutoff), self._vocab_size = kernels, vocab_size
        self._shaping = shaping(max_num_seqs, vocab_size, eos_token_ids)
        self._wishes = np.zeros((max_num_seqs, NUM_WISHES), dtype=np.int32)
        self._wishes[:, 0] = np.arange(max_num_seqs)
        self._temperature = self._wishes.view(np.float32)[:, 2]
        self._top_k = np.zeros(max_num_seqs, dtype=np.int32)
        self._top_p = np.ones(max_num_seqs, dtype=np.float32)
        self._min_p = np.zeros(max_num_seqs, dtype=np.float32)

    def set_row(self, new: NewRow) -> None:
        """A sequence takes a row."""
        for feature in self._shaping:
            feature.set_row(new)
        row, asked = new.row, new.sampling
        words = np.array([new.seed & _LOW, new.seed >> 32 & _LOW, new.sample_index & _LOW], dtype=np.uint32)
        self._wishes[row, 3:] = words.view(np.int32)
        self._temperature[row] = asked.temperature
        self._top_k[row] = asked.top_k if asked.top_k < self._vocab_size else 0
        self._top_p[row], self._min_p[row] = asked.top_p, asked.min_p

    def free_row(self, row: int) -> None:
        """A sequence left its row. Nothing to do: ``set_row`` writes every value, and no row is sampled without it."""

    def wishes(self, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """How ``rows`` draw the tokens at ``positions``: [num_sampled, NUM_WISHES] int32, as ``Draw.draw`` takes it."""
        found: np.ndarray = self._wishes[rows]
        found[:, 1] = positions
        return found

    def plain(self, rows: np.ndarray, positions: np.ndarray) -> bool:
        """True when no row asks for more than a temperature."""
        batch = SampleBatch(rows, positions, Tensor())
        return not (self._filtering(rows) or any(feature.active(batch) for feature in self._shaping))

    def _filtering(self, rows: np.ndarray) -> bool:
        """True when a row that draws asks for a filter."""
        asks = (self._top_k[rows] != 0) | (self._top_p[rows] < 1.0) | (self._min_p[rows] > 0.0)
        return bool((asks & (self._temperature[rows] > 0.0)).any())

    def sample(self, logits: Tensor, rows: np.ndarray, positions: np.ndarray, tokens: Tensor) -> Tensor:
        """One token per row, whatever the rows ask for; see ``Sampler.sample``. ``logits`` must be finite."""
        batch = SampleBatch(rows, positions, tokens)
        for feature in self._shaping:
            if feature.active(batch):
                feature.apply(logits, batch)
        wishes = batch.put(self.wishes(rows, positions))
        return self._draw.draw(logits, wishes, self._lowest_kept(logits, batch), masked=True)[0]

    def _lowest_kept(self, logits: Tensor, batch: SampleBatch) -> Tensor | None:
        """Under which logit / temperature each row's tokens are not drawn; None: no row asks for a filter."""
        rows = batch.rows
        if not self._filtering(rows):
            return None
        asked = (
            batch.put(of[rows]) if (of[rows] != nothing).any() else None
            for of, nothing in ((self._top_k, 0), (self._top_p, 1.0), (self._min_p, 0.0))
        )
        return self._cutoff.lowest_kept(logits, batch.put(self._temperature[rows]), *asked)
