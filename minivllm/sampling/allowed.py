"""allowed_token_ids: only these tokens may come."""

import numpy as np
from torch import Tensor

from minivllm.sampling.batch import SampleBatch
from minivllm.types import NewRow


class AllowedTokens:
    """The tokens that each row is held to. Written only by the sampler."""

    def __init__(self, max_num_seqs: int) -> None:
        self._asks = np.zeros(max_num_seqs, dtype=bool)
        self._ids: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * max_num_seqs

    def set_row(self, new: NewRow) -> None:
        """See ``Feature``."""
        allowed = new.sampling.allowed_token_ids
        self._asks[new.row] = allowed is not None
        self._ids[new.row] = np.array(allowed or (), dtype=np.int64)

    def active(self, batch: SampleBatch) -> bool:
        """See ``Feature``."""
        return bool(self._asks[batch.rows].any())

    def apply(self, logits: Tensor, batch: SampleBatch) -> None:
        """See ``Feature``."""
        where = np.flatnonzero(self._asks[batch.rows])
        at = batch.logits_of(where, [self._ids[row] for row in batch.rows[where]])
        kept = logits[at]
        logits[batch.put(where)] = float("-inf")
        logits[at] = kept
