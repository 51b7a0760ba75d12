"""A tile of keys at a time: the loop that all attention kernels have in common.

The softmax over a context is corrected as larger scores appear (https://arxiv.org/abs/2205.14135): what a walk knows of a query
is the largest score so far, the sum of exponents relative to it, and the values weighted by them. Two such states of different
keys can be put together in the same way, so a context may be cut anywhere. Exponents are of 2: a multiplication is saved.
"""

import triton
import triton.language as tl


@triton.jit
def _block(table, tile, context, TILE_N: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """The blocks that hold a tile's tokens, one for each token."""
    return tl.load(table + tl.minimum(tile * TILE_N + tl.arange(0, TILE_N), context - 1) // BLOCK_SIZE)


@triton.jit
def absorb(q, k, v, visible, top, bottom, total, scale, MASKED: tl.constexpr, SOFT_CAP: tl.constexpr):
    """Add a tile of keys to the running maximum, denominator and weighted values of each query. Exponents are of 2."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if SOFT_CAP > 0.0:  # cap * tanh(score / cap): ``scale`` holds 2 / cap, and the tanh's e is written as 2
        scores = SOFT_CAP * 1.4426950408889634 * (1.0 - 2.0 / (tl.exp2(scores * 1.4426950408889634) + 1.0))
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    safe = tl.where(higher == float("-inf"), 0.0, higher) if MASKED else higher  # nothing seen yet: no inf - inf
    weights = tl.exp2(scores - safe[:, None])
    fade = tl.exp2(top - safe)
    bottom = bottom * fade + tl.sum(weights, 1)
    total = tl.dot(weights.to(v.dtype), v, total * fade[:, None], input_precision="ieee")
    return higher, bottom, total


@triton.jit
def walk(q, query_at, lo, hi, context, window, head, table, k_cache, v_cache, top, bottom, total, scale,
          KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr,
          TILE_N: tl.constexpr, MASKED: tl.constexpr, SOFT_CAP: tl.constexpr):  # fmt: skip
    """Absorb the tiles ``lo`` to ``hi`` of a row's context."""
    channel = tl.arange(0, DIM_PAD)
    block = _block(table, lo, context, TILE_N, BLOCK_SIZE)
    for tile in range(lo, hi):
        key_at = tile * TILE_N + tl.arange(0, TILE_N)
        at = tl.minimum(key_at, context - 1) if MASKED else key_at
        slot = (block.to(tl.int64) * KV_HEADS + head) * BLOCK_SIZE + at % BLOCK_SIZE
        place = slot[:, None] * HEAD_DIM + channel[None, :]
        k_from, v_from = k_cache + place, v_cache + place
        block = _block(table, tile + 1, context, TILE_N, BLOCK_SIZE)  # on its way while this tile is computed
        if HEAD_DIM == DIM_PAD:
            k, v = tl.load(k_from), tl.load(v_from)
        else:
            inside = channel[None, :] < HEAD_DIM
            k, v = tl.load(k_from, mask=inside, other=0.0), tl.load(v_from, mask=inside, other=0.0)
        away = query_at[:, None] - key_at[None, :]
        visible = (away >= 0) & (away < window)
        top, bottom, total = absorb(q, k.to(q.dtype), v.to(q.dtype), visible, top, bottom, total, scale, MASKED, SOFT_CAP)
    return top, bottom, total


@triton.jit
def add_parts(top, bottom, total, place, mask, tops, bottoms, totals, DIM_PAD: tl.constexpr):
    """Add what other programs left at ``place`` [parts, rows] to the running sums of [rows]. A row without any stays so."""
    part_top = tl.load(tops + place, mask=mask, other=float("-inf"), cache_modifier=".cg")
    part_bottom = tl.load(bottoms + place, mask=mask, other=0.0, cache_modifier=".cg")
    offset = place[:, :, None] * DIM_PAD + tl.arange(0, DIM_PAD)[None, None, :]
    part_total = tl.load(totals + offset, mask=mask[:, :, None], other=0.0, cache_modifier=".cg")
    higher = tl.maximum(top, tl.max(part_top, 0))
    safe = tl.where(higher == float("-inf"), 0.0, higher)
    weight, fade = tl.exp2(part_top - safe[None, :]), tl.exp2(top - safe)
    bottom = bottom * fade + tl.sum(weight * part_bottom, 0)
    total = total * fade[:, None] + tl.sum(weight[:, :, None] * part_total, 0)
    return higher, bottom, total


@triton.jit
def num_splits(num_items, KV_HEADS: tl.constexpr, NUM_PROGRAMS: tl.constexpr):
    """How many programs share the tokens of an item's beginning: as many as there are, but no more than are worth adding up."""
    return tl.minimum(tl.maximum(NUM_PROGRAMS // (tl.maximum(num_items, 1) * KV_HEADS), 1), 16)
