"""logit_bias: a number added to the logits of some tokens (OpenAI). -100 all but forbids a token, 100 all but forces it."""

import numpy as np
from torch import Tensor

from minivllm.sampling.batch import SampleBatch
from minivllm.types import NewRow


class LogitBias:
    """Each row's tokens and what is added to them. Written only by the sampler."""

    def __init__(self, max_num_seqs: int) -> None:
        self._asks = np.zeros(max_num_seqs, dtype=bool)
        self._ids: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * max_num_seqs
        self._values: list[np.ndarray] = [np.empty(0, dtype=np.float32)] * max_num_seqs

    def set_row(self, new: NewRow) -> None:
        """See ``Feature``."""
        pairs = new.sampling.logit_bias
        self._asks[new.row] = bool(pairs)
        self._ids[new.row] = np.array([token for token, _ in pairs], dtype=np.int64)
        self._values[new.row] = np.array([value for _, value in pairs], dtype=np.float32)

    def active(self, batch: SampleBatch) -> bool:
        """See ``Feature``."""
        return bool(self._asks[batch.rows].any())

    def apply(self, logits: Tensor, batch: SampleBatch) -> None:
        """See ``Feature``."""
        where = np.flatnonzero(self._asks[batch.rows])
        at = batch.logits_of(where, [self._ids[row] for row in batch.rows[where]])
        values = batch.put(np.concatenate([self._values[row] for row in batch.rows[where]]))
        logits[at] = logits[at] + values  # a row names a token once
