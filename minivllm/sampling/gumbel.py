"""Drawing a token: the Gumbel-max trick, with noise that is a function.

argmax(logit + g), each g = -ln(-ln u) of its own uniform u, draws from softmax(logits) (Gumbel, 1954; Maddison et al., 2014):
one pass, no sum over the vocabulary and so no rounding that depends on the batch. The uniform of a token is word (id mod 4)
of Philox with key = the request's seed and counter = (id div 4, position, sample_index, purpose): it does not depend on batch,
row, rank or on which other tokens are candidates. So a draw among few candidates needs to compute only their noise.

u = (x + 0.5) * 2^-32 is never 0 nor 1. Logarithms and the comparison are in float64. Ties go to the lowest id.
"""

import numpy as np
import torch
from torch import Tensor

from minivllm.sampling.batch import SampleBatch
from minivllm.sampling.philox import PURPOSE_SAMPLE, philox4x32
from minivllm.types import NewRow

_LOW = 0xFFFFFFFF
_FEW = 8  # a draw is narrowed to its candidates when they are less than a vocabulary's 1/8


class GumbelDraw:
    """Seed and sample index by row. Written only by ``Sampler``."""

    def __init__(self, max_num_seqs: int) -> None:
        self._words = np.zeros((3, max_num_seqs), dtype=np.int64)  # the seed's low and high half, the sample index

    def set_row(self, new: NewRow) -> None:
        """Take over the seed of a sequence that got a row."""
        self._words[:, new.row] = (new.seed & _LOW, new.seed >> 32 & _LOW, new.sample_index)

    def draw(self, logits: Tensor, batch: SampleBatch, filtered: bool) -> Tensor:
        """One id per row from softmax(logits) over its finite logits; [num_sampled] int64.

        logits: [num_sampled, vocab] float32. ``filtered``: logits were masked, so that there may be few candidates.
        """
        words = np.concatenate([self._words[:, batch.rows], batch.positions[None] & _LOW])
        key0, key1, sample_index, position = batch.put(words)[:, :, None]  # [num_sampled, 1] each
        vocab_size = logits.shape[1]
        if filtered and batch.on_host:
            num_kept = int((logits > -torch.inf).sum(dim=-1).amax())
            if num_kept < vocab_size // _FEW:
                logits, ids = logits.topk(max(num_kept, 1), dim=-1)
                words4 = torch.stack(_noise_words(ids >> 2, position, sample_index, key0, key1), dim=-1)
                bits = words4.gather(2, (ids & 3)[:, :, None])[:, :, 0]
                score = _score(logits, bits)
                tied = score == score.amax(dim=-1, keepdim=True)
                return ids.where(tied, vocab_size - 1).amin(dim=-1)
        blocks = torch.arange((vocab_size + 3) // 4, device=logits.device)
        words4 = torch.stack(_noise_words(blocks, position, sample_index, key0, key1), dim=-1)  # [num_sampled, blocks, 4]
        return _score(logits, words4.flatten(1)[:, :vocab_size]).argmax(dim=-1)


def _noise_words(
    block: Tensor, position: Tensor, sample_index: Tensor, key0: Tensor, key1: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The noise of four neighbouring ids as 32-bit words."""
    purpose = torch.full_like(position, PURPOSE_SAMPLE)
    return philox4x32((block, position, sample_index, purpose), (key0, key1))


def _score(logits: Tensor, bits: Tensor) -> Tensor:
    """logit + Gumbel noise in float64; tokens whose logit is not finite take no part."""
    noise = bits.double().add_(0.5).mul_(2.0**-32).log_().neg_().log_()  # ln(-ln u) = -g
    return (logits - noise).masked_fill_(~logits.isfinite(), -torch.inf)
