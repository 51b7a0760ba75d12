"""top_k: only the k most likely tokens, and those as likely as the k-th, as in vLLM: a cut among equals would be arbitrary."""

import numpy as np
import torch
from torch import Tensor

from minivllm.sampling.batch import SampleBatch, mask_below
from minivllm.types import NewRow


class TopK:
    """k by row; 0 keeps everything. Written only by ``Sampler``."""

    def __init__(self, max_num_seqs: int, vocab_size: int) -> None:
        self._value = np.zeros(max_num_seqs, dtype=np.int64)
        self._vocab_size = vocab_size

    def set_row(self, new: NewRow) -> None:
        """See ``Feature``."""
        self._value[new.row] = new.sampling.top_k if new.sampling.top_k < self._vocab_size else 0

    def active(self, batch: SampleBatch) -> bool:
        """See ``Feature``."""
        return bool(self._value[batch.rows].any())

    def apply(self, logits: Tensor, batch: SampleBatch) -> None:
        """See ``Feature``. The k-th largest value is the same whatever the other rows' k."""
        k = self._value[batch.rows]
        best = logits.topk(int(k.max()), dim=-1).values  # [num_sampled, max k], falling
        kth = best.gather(1, batch.put(np.maximum(k - 1, 0))[:, None])[:, 0]
        mask_below(logits, kth.masked_fill(batch.put(k == 0), -torch.inf))
