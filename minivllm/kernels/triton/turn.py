"""From a projection to attention's inputs in one pass: q and k normed and turned, k and v put into the paged cache.

Done one after the other these are two norms, two rotations and two scattered writes: six launches that each read and write what
the one before has just written. None of them mixes tokens or heads, so one program takes a few heads of one token through all
of them while they are in registers, and memory sees each value once.

Where values are rounded to their 16-bit type is as in ``reference.py``: a normed head before and after its weight, a turned
one once. A head's bits depend on that head alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minivllm.kernels.triton.attention_sizes import padded
from minivllm.kernels.triton.chip import Chip, let_next_start, wait_for_previous

HEADS_PER_PROGRAM = 8


@triton.jit
def _weight(of_q, of_k, is_q, at, mask):
    """What a channel of a head is multiplied with: q's heads have other weights than k's."""
    q = tl.load(of_q + at, mask=mask, other=0.0)
    k = tl.load(of_k + at, mask=mask, other=0.0)
    return tl.where(is_q[:, None], q[None, :], k[None, :]).to(tl.float32)


@triton.jit
def _put(x, head, channel, mask, token, slot, q, k_cache, v_cache, k_dense,
         HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
         DENSE: tl.constexpr):  # fmt: skip
    """Store some channels of some heads where each belongs. ``x`` [heads, channels] is of the type of q."""
    is_q, is_v = head < HEADS, head >= HEADS + KV_HEADS
    tl.store(q + (token * HEADS + head)[:, None] * HEAD_DIM + channel[None, :], x, mask=mask & is_q[:, None])
    kv_head = tl.where(is_v, head - HEADS - KV_HEADS, head - HEADS)
    place = ((slot // BLOCK_SIZE) * KV_HEADS + kv_head) * BLOCK_SIZE + slot % BLOCK_SIZE  # [heads], in the cache
    offset = place[:, None] * HEAD_DIM + channel[None, :]
    is_k = (head >= HEADS) & (head < HEADS + KV_HEADS)
    tl.store(k_cache + offset, x.to(k_cache.dtype.element_ty), mask=mask & is_k[:, None])
    tl.store(v_cache + offset, x.to(v_cache.dtype.element_ty), mask=mask & is_v[:, None])
    if DENSE:
        tl.store(k_dense + (token * KV_HEADS + kv_head)[:, None] * HEAD_DIM + channel[None, :], x, mask=mask & is_k[:, None])


@triton.jit
def _turn(heads, q, k_cache, v_cache, k_dense, slots, cos, sin, q_weight, k_weight, eps,
          HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr,
          REST_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEADS_BLOCK: tl.constexpr, NORMED: tl.constexpr,
          DENSE: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """Some heads of one token. Channels 0 to HALF pair with HALF to 2 * HALF; those from 2 * HALF on are not turned."""
    REST: tl.constexpr = HEAD_DIM - 2 * HALF
    ALL_HEADS: tl.constexpr = HEADS + 2 * KV_HEADS
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK)
    real, is_q, turns = head < ALL_HEADS, head < HEADS, (head < HEADS + KV_HEADS)[:, None]
    half, rest = tl.arange(0, HALF_PAD), 2 * HALF + tl.arange(0, REST_PAD)
    of_half, of_rest = half < HALF, rest < HEAD_DIM
    half_mask, rest_mask = real[:, None] & of_half[None, :], real[:, None] & of_rest[None, :]
    if NORMED:  # weights are written by no kernel of a step: they may be on their way before the wait
        if HALF > 0:
            w1 = _weight(q_weight, k_weight, is_q, half, of_half)
            w2 = _weight(q_weight, k_weight, is_q, half + HALF, of_half)
        if REST > 0:
            w3 = _weight(q_weight, k_weight, is_q, rest, of_rest)
    wait_for_previous(EARLY)
    let_next_start(EARLY)  # after the wait, not before: attention relies on it (see ``_decode``)
    slot = tl.load(slots + token)
    source = heads + (token * ALL_HEADS + head)[:, None] * HEAD_DIM
    KIND: tl.constexpr = heads.dtype.element_ty
    if HALF > 0:
        x1 = tl.load(source + half[None, :], mask=half_mask, other=0.0)
        x2 = tl.load(source + half[None, :] + HALF, mask=half_mask, other=0.0)
        c = tl.load(cos + token * HALF + half, mask=of_half, other=0.0)[None, :]
        s = tl.load(sin + token * HALF + half, mask=of_half, other=0.0)[None, :]
    if REST > 0:
        x3 = tl.load(source + rest[None, :], mask=rest_mask, other=0.0)
    if NORMED:
        squares = tl.zeros((HEADS_BLOCK,), tl.float32)
        if HALF > 0:
            wide1, wide2 = x1.to(tl.float32), x2.to(tl.float32)
            squares += tl.sum(wide1 * wide1 + wide2 * wide2, 1)
        if REST > 0:
            wide3 = x3.to(tl.float32)
            squares += tl.sum(wide3 * wide3, 1)
        inverse = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
        if HALF > 0:
            x1 = tl.where(turns, ((wide1 * inverse).to(KIND).to(tl.float32) * w1).to(KIND), x1)
            x2 = tl.where(turns, ((wide2 * inverse).to(KIND).to(tl.float32) * w2).to(KIND), x2)
        if REST > 0:
            x3 = tl.where(turns, ((wide3 * inverse).to(KIND).to(tl.float32) * w3).to(KIND), x3)
    if HALF > 0:
        wide1, wide2 = x1.to(tl.float32), x2.to(tl.float32)
        turned1 = tl.where(turns, (wide1 * c - wide2 * s).to(KIND), x1)
        turned2 = tl.where(turns, (wide2 * c + wide1 * s).to(KIND), x2)
        _put(turned1, head, half, half_mask, token, slot, q, k_cache, v_cache, k_dense,
             HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE, DENSE)  # fmt: skip
        _put(turned2, head, half + HALF, half_mask, token, slot, q, k_cache, v_cache, k_dense,
             HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE, DENSE)  # fmt: skip
    if REST > 0:
        _put(x3, head, rest, rest_mask, token, slot, q, k_cache, v_cache, k_dense,
             HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE, DENSE)  # fmt: skip


class Turn:
    """The pass in front of attention. Holds nothing that changes."""

    def __init__(self, chip: Chip, num_heads: int, num_kv_heads: int) -> None:
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self._programs = -(-(num_heads + 2 * num_kv_heads) // HEADS_PER_PROGRAM)  # of one token
        self._launch, self._early, self._options = chip.launch, chip.early_launch, {"num_warps": 2, **chip.launch_options}

    def turn_and_write(
        self,
        heads: Tensor,
        norm: tuple[Tensor, Tensor, float] | None,
        angles: tuple[Tensor, Tensor] | None,
        caches: tuple[Tensor, Tensor],
        slots: Tensor,
        k_out: Tensor | None = None,
    ) -> Tensor:
        """Write the step's K and V to ``slots`` [num_tokens] of ``caches`` and return q [num_tokens, num_heads, head_dim].

        ``caches``: [num_blocks, num_kv_heads, block_size, head_dim] each. ``heads`` [num_tokens, num_heads + 2 * num_kv_heads,
        head_dim], dense. ``norm``: weights [head_dim] for q and for k, and epsilon. ``angles``: cos and sin [num_tokens, half]
        float32. ``k_out`` [num_tokens, num_kv_heads, head_dim], if given, receives k as attention sees it, for those who attend
        without the cache.
        """
        num_tokens, _, head_dim = heads.shape
        q = torch.empty((num_tokens, self.num_heads, head_dim), dtype=heads.dtype, device=heads.device)
        if num_tokens == 0:
            return q
        cos, sin = (heads, heads) if angles is None else angles
        half = 0 if angles is None else cos.shape[1]
        q_weight, k_weight, eps = (heads, heads, 0.0) if norm is None else norm
        k_cache, v_cache = caches
        self._launch(
            _turn, (num_tokens, self._programs),
            heads, q, k_cache, v_cache, q if k_out is None else k_out, slots, cos, sin, q_weight, k_weight, eps,
            self.num_heads, self.num_kv_heads, head_dim, half, padded(half), padded(head_dim - 2 * half),
            k_cache.shape[2], HEADS_PER_PROGRAM, norm is not None, k_out is not None, self._early, **self._options,
        )  # fmt: skip
        return q
