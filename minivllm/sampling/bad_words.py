"""bad_words: sequences of tokens that must not come in the output.

Only a word's last token can be forbidden, and only where the output ends with all that stands before it in the word; a word
of one token is always forbidden. Which tokens a word is written with was settled when the request was accepted (``door.py``).
The output is looked up beside the logits: a device that runs behind the host knows tokens that the host does not.
"""

import numpy as np
import torch
from torch import Tensor

from minivllm.sampling.batch import SampleBatch
from minivllm.types import NewRow


class BadWords:
    """Each row's forbidden words. Written only by the sampler."""

    def __init__(self, max_num_seqs: int) -> None:
        self._asks = np.zeros(max_num_seqs, dtype=bool)
        self._num_prompt = np.zeros(max_num_seqs, dtype=np.int64)
        self._words: list[tuple[tuple[int, ...], ...]] = [()] * max_num_seqs

    def set_row(self, new: NewRow) -> None:
        """See ``Feature``."""
        self._asks[new.row] = bool(new.sampling.bad_word_ids)
        self._num_prompt[new.row] = new.num_prompt
        self._words[new.row] = new.sampling.bad_word_ids

    def active(self, batch: SampleBatch) -> bool:
        """See ``Feature``."""
        return bool(self._asks[batch.rows].any())

    def apply(self, logits: Tensor, batch: SampleBatch) -> None:
        """See ``Feature``. Memory is [words, longest word]."""
        asked = [(place, word) for place, row in enumerate(batch.rows.tolist()) for word in self._words[row]]
        width = max(len(word) for _, word in asked) - 1
        before = np.full((len(asked), width), -1, dtype=np.int64)  # what must stand before the last token; -1: anything
        for i, (_, word) in enumerate(asked):
            before[i, width - len(word) + 1 :] = word[:-1]
        places = np.array([place for place, _ in asked])
        rows, ends, starts = batch.rows[places], batch.positions[places], self._num_prompt[batch.rows[places]]
        index = ends[:, None] - width + np.arange(width)[None, :]  # [words, width]
        wanted, in_output = batch.put(before), batch.put(index >= starts[:, None])
        found = batch.tokens[batch.put(rows)[:, None], batch.put(np.maximum(index, 0))]
        complete = ((wanted < 0) | ((found == wanted) & in_output)).all(1)  # [words]
        last = batch.put(np.array([word[-1] for _, word in asked]))
        # Added, since several words may end with the same token, and whoever wrote last would decide.
        logits.index_put_((batch.put(places), last), torch.where(complete, -torch.inf, 0.0), accumulate=True)
