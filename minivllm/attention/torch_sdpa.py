"""Attention with torch's own fused kernel, sequence by sequence, on any device.

A sequence whose blocks happen to lie side by side is read in place, as a view of the cache; any other is gathered, one
sequence at a time. Nothing is padded to the longest row, and only a sequence's own slots are ever read: whatever stands in
unused slots or in other sequences' blocks, NaN included, cannot reach a result.

Grouped-query heads read their KV head through a stride of zero, so K and V are never repeated in memory.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from minivllm.attention.base import Angles, AttnLayer, AttnMeta, AttnNeed, KVLayer, token_major_pools, turned
from minivllm.kernels.ops import Ops

QUERY_TILE = 256  # queries per call of a long prompt: a tile reads no keys past its last query, and its mask stays small


@dataclass(frozen=True)
class _Row:
    """One sequence's part of a step."""

    start: int  # its queries are start : stop of the step's tokens
    stop: int
    context: int  # tokens in the cache, this step's included
    first_block: int  # of a run of blocks that lie side by side; -1: they do not
    blocks: Tensor | None  # [num_blocks] int64 on the device, where they do not


@dataclass(frozen=True)
class SDPAPlan:
    """A planned step."""

    rows: tuple[_Row, ...]
    slots: Tensor  # [num_tokens] int64


class TorchAttention:
    """``scaled_dot_product_attention`` per sequence. Holds nothing that changes."""

    name = "torch-sdpa"

    def __init__(self, need: AttnNeed, ops: Ops) -> None:
        self.need, self.device, self.block_size, self.ops = need, need.device, need.block_size, ops

    @staticmethod
    def missing(need: AttnNeed, ops: Ops) -> list[str]:
        """See ``BackendClass``."""
        return ["its sums depend on the batch"] if need.batch_invariant else []

    def pool_shapes(self, num_blocks: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """See ``AttentionBackend``."""
        return token_major_pools(self.need, num_blocks)

    def plan(self, meta: AttnMeta) -> SDPAPlan:
        """Find each row's blocks and whether they lie side by side."""
        rows = []
        for i, context in enumerate(meta.context_lens.tolist()):
            num_blocks = -(-context // meta.block_size)
            ids = meta.block_tables[meta.rows[i], :num_blocks]
            side_by_side = bool((np.diff(ids) == 1).all())
            blocks = None if side_by_side else torch.from_numpy(ids.astype(np.int64)).to(self.device)
            start, stop = int(meta.query_starts[i]), int(meta.query_starts[i + 1])
            rows.append(_Row(start, stop, context, int(ids[0]) if side_by_side else -1, blocks))
        return SDPAPlan(tuple(rows), meta.slots)

    def run(self, plan: SDPAPlan, layer: AttnLayer, heads: Tensor, angles: Angles | None, cache: KVLayer) -> Tensor:
        """See ``AttentionBackend``."""
        q, k, v = turned(self.ops, layer, heads, angles)
        self.ops.kv_write(k.to(cache.k.dtype), v.to(cache.v.dtype), cache.k, cache.v, plan.slots)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)  # [num_tokens, num_heads, head_dim]
        for row in plan.rows:
            self._attend(row, layer, q, cache, out)
        return out

    def _attend(self, row: _Row, layer: AttnLayer, q: Tensor, cache: KVLayer, out: Tensor) -> None:
        """Fill the row's part of ``out``."""
        first = row.context - (row.stop - row.start)  # position of the row's first query
        low_block = 0 if layer.window is None else max(0, first - layer.window + 1) // self.block_size
        base = low_block * self.block_size  # position of the first key that is read
        keys, values = (self._read(row, low_block, pool)[: row.context - base].to(q.dtype) for pool in (cache.k, cache.v))
        for start in range(row.start, row.stop, QUERY_TILE):
            stop = min(start + QUERY_TILE, row.stop)
            at = first + start - row.start
            low = base if layer.window is None else max(base, at - layer.window + 1)
            high = at + stop - start
            seen = slice(low - base, high - base)
            out[start:stop] = _tile(q[start:stop], keys[seen], values[seen], at - low, layer)

    def _read(self, row: _Row, low_block: int, cache: Tensor) -> Tensor:
        """The row's slots from block ``low_block`` of its table on: [num_slots, num_kv_heads, head_dim]."""
        if row.blocks is None:
            count = -(-row.context // self.block_size)
            found = cache[row.first_block + low_block : row.first_block + count]
        else:
            found = cache.index_select(0, row.blocks[low_block:])
        return found.view(-1, *cache.shape[2:])


def _tile(q: Tensor, k: Tensor, v: Tensor, ahead: int, layer: AttnLayer) -> Tensor:
    """Attention of some queries; ``ahead`` is the number of keys before the one of the first query."""
    num_queries, num_keys, group = q.shape[0], k.shape[0], layer.num_heads // layer.num_kv_heads
    keys, values = k.transpose(0, 1), v.transpose(0, 1)  # [num_kv_heads, num_keys, head_dim]
    if num_queries == 1:  # a decode step: the heads of a group are the queries, and each sees every key
        folded = q.view(1, layer.num_kv_heads, group, layer.head_dim)
        return F.scaled_dot_product_attention(folded, keys[None], values[None], scale=layer.scale).reshape(q.shape)
    heads = q.view(num_queries, layer.num_kv_heads, group, layer.head_dim).permute(1, 2, 0, 3)
    mask = _mask(num_queries, num_keys, ahead, layer.window, q.device)
    masked = _plain if q.is_cuda else _fused
    found = masked(heads, keys, values, mask, layer.scale)  # [num_kv_heads, group, num_queries, head_dim]
    return found.permute(2, 0, 1, 3).reshape(q.shape)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention of queries [num_kv_heads, group, num_queries, head_dim] by torch's choice of kernel."""
    shape = (*q.shape[:2], *k.shape[1:])
    k, v = k[:, None].expand(shape), v[:, None].expand(shape)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The same by products in float32.

    On CUDA torch would choose its memory-efficient kernel, which was seen to be wrong where the queries are one more than a
    multiple of 64 (torch 2.11, float32; other faults of that kernel with a mask: pytorch/pytorch 191937 and 187227).
    """
    scores = q.flatten(1, 2).float() @ k.transpose(1, 2).float() * scale  # a group's queries side by side
    weights = scores.view(*q.shape[:3], -1).masked_fill(~mask, float("-inf")).softmax(-1)
    return (weights.flatten(1, 2) @ v.float()).view(q.shape).to(q.dtype)


def _mask(num_queries: int, num_keys: int, ahead: int, window: int | None, device: torch.device) -> Tensor:
    """True where query i may see key j: [num_queries, num_keys]."""
    everything = torch.ones((num_queries, num_keys), dtype=torch.bool, device=device)
    seen = everything.tril(ahead)
    return seen if window is None else seen & everything.triu(ahead - window + 1)
