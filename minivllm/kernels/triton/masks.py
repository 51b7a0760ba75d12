"""Grammar masks: rule tokens out of some rows of the logits.

A mask says of each token, in one bit, whether it may come next. It is made on the host (a grammar is no work for a GPU) and
travels as bits, a 32nd of what as many logits take. Only logits that are ruled out are written, and none is read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minivllm.kernels.triton.chip import Chip, let_next_start, wait_for_previous

_BLOCK = 4096  # tokens of one program


@triton.jit
def _rule_out(logits, places, masks, stride, words, VOCAB: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """One part of one mask."""
    let_next_start(EARLY)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < VOCAB
    wait_for_previous(EARLY)
    word = tl.load(masks + tl.program_id(0).to(tl.int64) * words + token // 32, mask=inside, other=-1)
    out = inside & (((word >> (token % 32)) & 1) == 0)
    row = tl.load(places + tl.program_id(0))
    tl.store(logits + row * stride + token, float("-inf"), mask=out)


class Masks:
    """The kernel. Holds nothing that changes."""

    def __init__(self, chip: Chip) -> None:
        self._launch, self._early, self._options = chip.launch, chip.early_launch, chip.launch_options

    def rule_out(self, logits: Tensor, places: Tensor, masks: Tensor) -> None:
        """See ``reference.rule_out``."""
        vocab_size = logits.shape[1]
        if masks.dtype != torch.int32 or masks.shape != (len(places), triton.cdiv(vocab_size, 32)):
            raise ValueError(f"masks of shape {tuple(masks.shape)} do not fit {len(places)} rows of {vocab_size} logits")
        if len(places):
            grid = (len(places), triton.cdiv(vocab_size, _BLOCK))
            self._launch(
                _rule_out, grid, logits, places, masks, logits.stride(0), masks.stride(0), vocab_size, _BLOCK, self._early,
                num_warps=8, **self._options,
            )  # fmt: skip
