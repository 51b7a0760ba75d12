"""top_p (nucleus sampling, Holtzman et al., 2019): the fewest most likely tokens whose probabilities add up to at least p.

Sums of floats depend on their order, and so on the batch's shape. Here each token's weight exp(logit - best) is a whole number
of 2^-40, so all sums are integers: the same in any order and width. That also allows to look at the most likely 128 tokens
first, at more only where these do not suffice, and to get the same answer as from sorting everything.

Tokens as likely as the last one kept are kept too.
"""

import numpy as np
import torch
from torch import Tensor

from minivllm.sampling.batch import SampleBatch, mask_below
from minivllm.types import NewRow

_UNIT = 2.0**40  # a weight is at most this; 2^22 of them still fit into 63 bits


class TopP:
    """p by row; 1 keeps everything. Written only by ``Sampler``."""

    def __init__(self, max_num_seqs: int) -> None:
        self._value = np.ones(max_num_seqs, dtype=np.float64)

    def set_row(self, new: NewRow) -> None:
        """See ``Feature``."""
        self._value[new.row] = new.sampling.top_p

    def active(self, batch: SampleBatch) -> bool:
        """See ``Feature``."""
        return bool((self._value[batch.rows] < 1.0).any())

    def apply(self, logits: Tensor, batch: SampleBatch) -> None:
        """See ``Feature``."""
        p = self._value[batch.rows]
        where = np.flatnonzero(p < 1.0)
        part = logits if len(where) == len(p) else logits[batch.put(where)]
        lowest = logits.new_full((len(p),), -torch.inf)
        lowest[batch.put(where)] = _lowest_kept(part, batch.put(p[where]), batch.on_host)
        mask_below(logits, lowest)


def _lowest_kept(logits: Tensor, p: Tensor, on_host: bool) -> Tensor:
    """The logit of the last token of each row's nucleus. logits [rows, vocab] float32, p [rows] float64 -> [rows] float32."""
    vocab_size = logits.shape[1]
    best = logits.amax(dim=-1, keepdim=True)
    total = _weights(logits, best).sum(dim=-1)
    needed = (p * total.double()).ceil().long().clamp(min=1)[:, None]
    # Where asking costs a wait, everything is sorted at once.
    looks = [w for w in (128, 1024, 8192) if w < vocab_size] if on_host else []
    for width in (*looks, vocab_size):
        top = logits.topk(width, dim=-1).values  # falling
        reached = _weights(top, best).cumsum(dim=-1)
        if width == vocab_size or bool((reached[:, -1:] >= needed).all()):
            break
    last = (reached < needed).sum(dim=-1, keepdim=True).clamp(max=width - 1)
    return top.gather(1, last)[:, 0]


def _weights(logits: Tensor, best: Tensor) -> Tensor:
    """exp(logit - best) as whole numbers of 2^-40, int64."""
    return (logits - best).double().exp_().mul_(_UNIT).long()
