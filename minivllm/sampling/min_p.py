"""min_p (Nguyen et al., 2024): only tokens at least min_p times as likely as the most likely one.

p(i) >= min_p * p(best) is logit(i) >= logit(best) + ln(min_p): no softmax needed.
"""

import numpy as np
from torch import Tensor

from minivllm.sampling.batch import SampleBatch, mask_below
from minivllm.types import NewRow


class MinP:
    """ln(min_p) by row; minus infinity keeps everything. Written only by ``Sampler``."""

    def __init__(self, max_num_seqs: int) -> None:
        self._log = np.full(max_num_seqs, -np.inf, dtype=np.float32)

    def set_row(self, new: NewRow) -> None:
        """See ``Feature``."""
        self._log[new.row] = np.log(new.sampling.min_p) if new.sampling.min_p > 0.0 else -np.inf

    def active(self, batch: SampleBatch) -> bool:
        """See ``Feature``."""
        return bool(np.isfinite(self._log[batch.rows]).any())

    def apply(self, logits: Tensor, batch: SampleBatch) -> None:
        """See ``Feature``."""
        mask_below(logits, logits.amax(dim=-1) + batch.put(self._log[batch.rows]))
