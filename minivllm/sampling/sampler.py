"""From logits to a token. The order of the features is the definition of what is sampled:

    (grammar) -> allowed_token_ids -> bad_words -> min_tokens -> logit_bias -> penalties -> (greedy rows: most likely token)
               -> temperature -> min_p -> top_k -> top_p -> draw

which is vLLM's order. What a grammar rules out is out of the logits before they come here. Each filter sees what the ones
before left: top_p adds up probabilities among the tokens that min_p and top_k kept.

A token is a function of (its row's logits, sampling parameters, known tokens, seed, sample_index, position) and of nothing
else: not of the batch, the row's number, or what the neighbours ask for. Given the same logits a request so gets the same
tokens alone, in any batch, after a preemption and after a restart. A feature that no row asks for is not even called.

Knows nothing of models, blocks or the scheduler.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from minivllm.kernels import reference
from minivllm.sampling.batch import Feature, SampleBatch
from minivllm.sampling.gumbel import GumbelDraw
from minivllm.sampling.min_p import MinP
from minivllm.sampling.shaping import shaping
from minivllm.sampling.temperature import Temperature
from minivllm.sampling.top_k import TopK
from minivllm.sampling.top_p import TopP
from minivllm.types import NewRow

# Logits drawn from at a time. Temporaries take some 50 bytes a logit: on a CPU they stay in its caches, elsewhere small.
_HOST_LOGITS = 2**18
_DEVICE_LOGITS = 2**22


Choose = Callable[[Tensor], tuple[Tensor, Tensor]]


class Sampler:
    """Sampling state of every row, and the way from logits to tokens. Written only by the runner."""

    def __init__(
        self, max_num_seqs: int, vocab_size: int, eos_token_ids: Sequence[int], choose: Choose = reference.choose
    ) -> None:
        """``choose``: the op that finds the most likely token of each row."""
        self._choose = choose
        self._temperature = Temperature(max_num_seqs)
        self._draw = GumbelDraw(max_num_seqs)
        self._shaping = shaping(max_num_seqs, vocab_size, eos_token_ids)
        self._filters: tuple[Feature, ...] = (MinP(max_num_seqs), TopK(max_num_seqs, vocab_size), TopP(max_num_seqs))

    def set_row(self, new: NewRow) -> None:
        """A sequence takes a row."""
        states: tuple[Feature | GumbelDraw, ...] = (*self._shaping, self._temperature, *self._filters, self._draw)
        for state in states:
            state.set_row(new)

    def free_row(self, row: int) -> None:
        """A sequence left its row. Nothing to do: ``set_row`` writes every value, and no row is sampled without it."""

    def sample(self, logits: Tensor, rows: np.ndarray, positions: np.ndarray, tokens: Tensor) -> Tensor:
        """One token per row.

        logits: [num_sampled, vocab] float32, overwritten. rows, positions: [num_sampled] int64; a position is the index of the
        token being sampled. tokens: [max_num_seqs, max_model_len] int32 on the logits' device, each row's known tokens.
        Returns [num_sampled] int64. Rows that are not finite get some token.
        """
        batch = SampleBatch(rows, positions, tokens)
        for feature in self._shaping:
            if feature.active(batch):
                feature.apply(logits, batch)
        drawn = self._temperature.drawn(batch)
        if not len(drawn):
            return self._choose(logits)[0]
        size = max(1, (_HOST_LOGITS if batch.on_host else _DEVICE_LOGITS) // logits.shape[1])
        parts = [drawn[at : at + size] for at in range(0, len(drawn), size)]
        if len(drawn) == len(rows):
            return torch.cat([self._drawn(logits[part[0] : part[-1] + 1], batch.take(part)) for part in parts])
        chosen = self._choose(logits)[0]
        for part in parts:
            where = batch.put(part)
            chosen[where] = self._drawn(logits[where], batch.take(part))
        return chosen

    def _drawn(self, logits: Tensor, batch: SampleBatch) -> Tensor:
        """Tokens of rows that draw."""
        if self._temperature.active(batch):
            self._temperature.apply(logits, batch)
        wanted = [feature for feature in self._filters if feature.active(batch)]
        for feature in wanted:
            feature.apply(logits, batch)
        return self._draw.draw(logits, batch, filtered=bool(wanted))
