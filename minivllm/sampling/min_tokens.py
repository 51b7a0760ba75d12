"""min_tokens: no token that would end the sequence, before it has that many output tokens.

The tokens that end it are the model's eos ids and the request's own stop ids. ``ignore_eos`` changes nothing here: it only
keeps eos from ending the sequence, while min_tokens keeps it from being sampled (the meaning it has in vLLM).
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from minivllm.sampling.batch import SampleBatch
from minivllm.types import NewRow


class MinTokens:
    """Until which position each row may not end. Written only by ``Sampler``."""

    def __init__(self, max_num_seqs: int, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._until = np.zeros(max_num_seqs, dtype=np.int64)
        self._vocab_size = vocab_size
        self._eos = tuple(eos_token_ids)
        self._enders: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * max_num_seqs

    def set_row(self, new: NewRow) -> None:
        """See ``Feature``."""
        wanted = new.sampling.min_tokens
        self._until[new.row] = new.num_prompt + wanted if wanted else 0
        if wanted:
            ids = {i for i in (*self._eos, *new.sampling.stop_token_ids) if i < self._vocab_size}
            self._enders[new.row] = np.array(sorted(ids), dtype=np.int64)

    def active(self, batch: SampleBatch) -> bool:
        """See ``Feature``."""
        return bool((batch.positions < self._until[batch.rows]).any())

    def apply(self, logits: Tensor, batch: SampleBatch) -> None:
        """See ``Feature``."""
        where = np.flatnonzero(batch.positions < self._until[batch.rows])
        logits[batch.logits_of(where, [self._enders[row] for row in batch.rows[where]])] = float("-inf")
