"""temperature: logits / t, so that small values sharpen the distribution and large ones flatten it. 0 means greedy."""

import numpy as np
from torch import Tensor

from minivllm.sampling.batch import SampleBatch
from minivllm.types import NewRow


class Temperature:
    """The temperature by row. Written only by ``Sampler``."""

    def __init__(self, max_num_seqs: int) -> None:
        self._value = np.zeros(max_num_seqs, dtype=np.float32)

    def set_row(self, new: NewRow) -> None:
        """See ``Feature``."""
        self._value[new.row] = new.sampling.temperature

    def drawn(self, batch: SampleBatch) -> np.ndarray:
        """Places of the rows that draw a token; the others take the most likely one."""
        return np.flatnonzero(self._value[batch.rows] > 0.0)

    def active(self, batch: SampleBatch) -> bool:
        """See ``Feature``."""
        return bool((self._value[batch.rows] != 1.0).any())

    def apply(self, logits: Tensor, batch: SampleBatch) -> None:
        """See ``Feature``. Dividing by 1 changes no bit, so rows at 1 need no exception."""
        logits.div_(batch.put(self._value[batch.rows])[:, None])
