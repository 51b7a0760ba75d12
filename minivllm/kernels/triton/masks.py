"""Grammar masks: rule tokens out of some rows of the logits.

A mask says of each token, in one bit, whether it may come next. It is made on the host (a grammar is no work for a GPU) and
travels as bits, a 32nd of what as many logits take. Only logits that are ruled out are written, and none is read. Its first
word says more shortly that any token may come, or one alone. Each place finds its mask by its row: a step can be captured.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minivllm.kernels.triton.chip import Chip, let_next_start, wait_for_previous
from minivllm.types import ANY_TOKEN, BY_BITS

_BLOCK = 4096  # tokens of one program


@triton.jit
def _rule_out(
    logits, rows, masks, stride, row_stride, words,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, ANY: tl.constexpr, BITS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One part of one place's mask."""
    let_next_start(EARLY)
    place = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < VOCAB
    wait_for_previous(EARLY)
    mask = masks + tl.load(rows + place * row_stride).to(tl.int64) * words
    says = tl.load(mask)
    by_bits = says == BITS
    word = tl.load(mask + 1 + token // 32, mask=inside & by_bits, other=0)
    may_come = (((word >> (token % 32)) & 1) != 0) | (token == says) | (says == ANY)
    tl.store(logits + place * stride + token, float("-inf"), mask=inside & (may_come == 0))


class Masks:
    """The kernel. Holds nothing that changes."""

    def __init__(self, chip: Chip) -> None:
        self._launch, self._early, self._options = chip.launch, chip.early_launch, chip.launch_options

    def rule_out(self, logits: Tensor, rows: Tensor, masks: Tensor) -> None:
        """See ``reference.rule_out``."""
        num_places, vocab_size = logits.shape
        if masks.dtype != torch.int32 or masks.shape[1] != 1 + triton.cdiv(vocab_size, 32) or len(rows) != num_places:
            raise ValueError(f"masks of shape {tuple(masks.shape)} do not fit {len(rows)} rows of {vocab_size} logits")
        if num_places:
            self._launch(
                _rule_out, (num_places, triton.cdiv(vocab_size, _BLOCK)),
                logits, rows, masks, logits.stride(0), rows.stride(0), masks.stride(0),
                vocab_size, _BLOCK, ANY_TOKEN, BY_BITS, self._early, num_warps=8, **self._options,
            )  # fmt: skip
