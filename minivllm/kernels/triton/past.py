"""What a library's attention needs around it, so that a prompt's later chunks can use it: the past, and a sum of two parts.

A library wants keys and values side by side and not in blocks, and its causal mask starts at the first key. So a chunk asks it
twice: about its own tokens with the mask, and about all that lies before them, gathered here, without one. Each answer comes
with the logarithm of its softmax's denominator, and these say how much each answer weighs in the whole.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minivllm.kernels.triton.attention_sizes import padded
from minivllm.kernels.triton.chip import Chip, let_next_start, wait_for_previous

TOKENS = 64  # that a program of ``_gather`` copies
HEADS = 8  # that a program of ``_merge`` sums


@triton.jit(do_not_specialize=["num_tokens"])
def _gather(k_cache, v_cache, table, k_out, v_out, num_tokens,
            KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr,
            TOKENS: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """Some tokens of one head."""
    wait_for_previous(EARLY)
    let_next_start(EARLY)
    at, head, channel = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.program_id(1), tl.arange(0, DIM_PAD)
    block = tl.load(table + at // BLOCK_SIZE, mask=at < num_tokens, other=0).to(tl.int64)
    source = ((block * KV_HEADS + head) * BLOCK_SIZE + at % BLOCK_SIZE)[:, None] * HEAD_DIM + channel[None, :]
    target = (head.to(tl.int64) * num_tokens + at)[:, None] * HEAD_DIM + channel[None, :]
    mask = (at < num_tokens)[:, None] & (channel < HEAD_DIM)[None, :]
    k, v = tl.load(k_cache + source, mask=mask), tl.load(v_cache + source, mask=mask)
    tl.store(k_out + target, k.to(k_out.dtype.element_ty), mask=mask)
    tl.store(v_out + target, v.to(v_out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens", "stride_head1", "stride_token1", "stride_head2", "stride_token2"])
def _merge(out, out1, log1, stride_head1, stride_token1, out2, log2, stride_head2, stride_token2, num_tokens,
           NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PAD: tl.constexpr, HEADS: tl.constexpr,
           EARLY: tl.constexpr):  # fmt: skip
    """Some heads of one token."""
    wait_for_previous(EARLY)
    let_next_start(EARLY)
    token, channel = tl.program_id(0).to(tl.int64), tl.arange(0, DIM_PAD)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)
    real = head < NUM_HEADS
    mask = real[:, None] & (channel < HEAD_DIM)[None, :]
    a = tl.load(log1 + head * num_tokens + token, mask=real, other=0.0)
    b = tl.load(log2 + head * num_tokens + token, mask=real, other=0.0)
    of_a = 1.0 / (1.0 + tl.exp(b - a))  # the weight of the first; b - a may be large: exp is infinite then, and this is 0
    x = tl.load(out1 + (head * stride_head1 + token * stride_token1)[:, None] + channel[None, :], mask=mask, other=0.0)
    y = tl.load(out2 + (head * stride_head2 + token * stride_token2)[:, None] + channel[None, :], mask=mask, other=0.0)
    sums = x.to(tl.float32) * of_a[:, None] + y.to(tl.float32) * (1.0 - of_a)[:, None]
    target = (token * NUM_HEADS + head)[:, None] * HEAD_DIM + channel[None, :]
    tl.store(out + target, sums.to(out.dtype.element_ty), mask=mask)


class Past:
    """The two passes. Holds nothing that changes."""

    def __init__(self, chip: Chip) -> None:
        self._launch, self._early, self._options = chip.launch, chip.early_launch, {"num_warps": 4, **chip.launch_options}

    def gather(
        self, caches: tuple[Tensor, Tensor], table: Tensor, num_tokens: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """The first tokens of the row whose blocks are ``table`` [any] int32: K and V, [num_kv_heads, num_tokens, head_dim]."""
        _, num_kv_heads, block_size, head_dim = caches[0].shape
        k, v = (torch.empty((num_kv_heads, num_tokens, head_dim), dtype=dtype, device=table.device) for _ in range(2))
        self._launch(
            _gather, (-(-num_tokens // TOKENS), num_kv_heads),
            *caches, table, k, v, num_tokens, num_kv_heads, head_dim, padded(head_dim), block_size, TOKENS,
            self._early, **self._options,
        )  # fmt: skip
        return k, v

    def merge(self, out: Tensor, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> None:
        """Fill ``out`` [num_tokens, num_heads, head_dim] from attention over two sets of keys.

        Each: result [num_heads, num_tokens, head_dim], any strides but the last, and log of the denominator [num_heads,
        num_tokens] float32, dense.
        """
        num_tokens, num_heads, head_dim = out.shape
        (out1, log1), (out2, log2) = first, second
        self._launch(
            _merge, (num_tokens, -(-num_heads // HEADS)),
            out, out1, log1, out1.stride(0), out1.stride(1), out2, log2, out2.stride(0), out2.stride(1), num_tokens,
            num_heads, head_dim, padded(head_dim), HEADS, self._early, **self._options,
        )  # fmt: skip
