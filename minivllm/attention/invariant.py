"""Attention whose result for a token is bitwise the same alone, batched, chunked, cached or recomputed.

The order of every sum is fixed by absolute position alone. Queries are computed in tiles of 16 positions (0-15, 16-31,
...) with places of absent tokens left zero, so a token always has the same place in a call of the same shape, whether it
arrives alone (decode) or in a prompt. Keys are read in tiles of 256 positions, combined in order by the online softmax
(https://arxiv.org/abs/1805.02867): how many there are follows from the query tile's positions. Slots past the context are
zeros, never what stands in the cache. Everything is computed in float32.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minivllm.attention.base import Angles, AttnLayer, AttnMeta, AttnNeed, KVLayer, token_major_pools, turned
from minivllm.kernels.ops import Ops

QUERY_TILE = 16  # positions
KEY_TILE = 256  # positions; a multiple of QUERY_TILE, so that all queries of a tile see the same number of key tiles


@dataclass(frozen=True)
class _Row:
    """One sequence's part of a step."""

    start: int  # its queries are start : stop of the step's tokens
    stop: int
    context: int  # tokens in the cache, this step's included
    slots: Tensor  # [context] int64 on the device: the KV slot of each position


@dataclass(frozen=True)
class TiledPlan:
    """A planned step."""

    rows: tuple[_Row, ...]
    slots: Tensor  # [num_tokens] int64


class InvariantAttention:
    """Fixed tiles at absolute positions. Holds nothing that changes."""

    name = "batch-invariant"

    def __init__(self, need: AttnNeed, ops: Ops) -> None:
        self.need, self.device, self.ops = need, need.device, ops

    @staticmethod
    def missing(need: AttnNeed, ops: Ops) -> list[str]:
        """See ``BackendClass``; it can serve anything, slowly."""
        return []

    def pool_shapes(self, num_blocks: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """See ``AttentionBackend``."""
        return token_major_pools(self.need, num_blocks)

    def plan(self, meta: AttnMeta) -> TiledPlan:
        """List the KV slots of each row's positions."""
        rows = []
        for i, context in enumerate(meta.context_lens.tolist()):
            at = np.arange(context)
            blocks = meta.block_tables[meta.rows[i], at // meta.block_size].astype(np.int64)
            slots = blocks * meta.block_size + at % meta.block_size
            start, stop = int(meta.query_starts[i]), int(meta.query_starts[i + 1])
            rows.append(_Row(start, stop, context, torch.from_numpy(slots).to(self.device)))
        return TiledPlan(tuple(rows), meta.slots)

    def run(self, plan: TiledPlan, layer: AttnLayer, heads: Tensor, angles: Angles | None, cache: KVLayer) -> Tensor:
        """See ``AttentionBackend``."""
        q, k, v = turned(self.ops, layer, heads, angles)
        self.ops.kv_write(k.to(cache.k.dtype), v.to(cache.v.dtype), cache.k, cache.v, plan.slots)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)  # [num_tokens, num_heads, head_dim]
        for row in plan.rows:
            first = row.context - (row.stop - row.start)
            base = 0 if layer.window is None else _first_key_tile(first, layer.window) * KEY_TILE
            keys, values = _read(row, base, cache.k), _read(row, base, cache.v)
            at = first
            while at < row.context:
                tile_start = at - at % QUERY_TILE
                end = min(tile_start + QUERY_TILE, row.context)
                flat = slice(row.start + at - first, row.start + end - first)
                tile = q.new_zeros((QUERY_TILE, layer.num_heads, layer.head_dim), dtype=torch.float32)
                tile[at - tile_start : end - tile_start] = q[flat]
                found = _tile(tile, keys, values, tile_start, base, layer)
                out[flat] = found[at - tile_start : end - tile_start].to(q.dtype)
                at = end
        return out


def _first_key_tile(position: int, window: int) -> int:
    """The first key tile that any query in the tile of ``position`` can see."""
    return max(0, position - position % QUERY_TILE - window + 1) // KEY_TILE


def _read(row: _Row, base: int, cache: Tensor) -> Tensor:
    """The row's keys or values from position ``base`` on, zeros past its context: [whole key tiles, num_kv_heads, head_dim]."""
    slots = row.slots[base:]
    padded = cache.new_zeros((-(-len(slots) // KEY_TILE) * KEY_TILE, *cache.shape[2:]), dtype=torch.float32)
    padded[: len(slots)] = cache.view(-1, *cache.shape[2:]).index_select(0, slots)
    return padded


def _tile(q: Tensor, keys: Tensor, values: Tensor, at: int, base: int, layer: AttnLayer) -> Tensor:
    """Attention of the query tile that begins at position ``at``; keys begin at ``base``. Shapes as ``q``: [16, heads, dim]."""
    group = layer.num_heads // layer.num_kv_heads
    folded = q.view(QUERY_TILE, layer.num_kv_heads, group, layer.head_dim).permute(1, 2, 0, 3)
    folded = folded.reshape(layer.num_kv_heads, group * QUERY_TILE, layer.head_dim)
    low = 0 if layer.window is None else _first_key_tile(at, layer.window)
    peak = total = summed = torch.empty(0)
    for index in range(low, at // KEY_TILE + 1):
        here = slice(index * KEY_TILE - base, (index + 1) * KEY_TILE - base)
        scores = torch.bmm(folded, keys[here].permute(1, 2, 0)) * layer.scale  # [num_kv_heads, group * 16, 256]
        hidden = _hidden(at, index * KEY_TILE, layer.window, q.device)
        if hidden is not None:
            scores = scores.view(-1, QUERY_TILE, KEY_TILE).masked_fill_(hidden, float("-inf")).view(scores.shape)
        top = scores.amax(-1, keepdim=True)
        if index > low:
            top = torch.maximum(top, peak)
        floor = top.clamp(min=-3e38)  # a query that sees no key of this tile has -inf here, and -inf - -inf is NaN
        weights = torch.exp(scores - floor)
        part = torch.bmm(weights, values[here].transpose(0, 1))  # [num_kv_heads, group * 16, head_dim]
        if index == low:
            total, summed = weights.sum(-1, keepdim=True), part
        else:
            shrink = torch.exp(peak - floor)
            total, summed = total * shrink + weights.sum(-1, keepdim=True), summed * shrink + part
        peak = top
    found = (summed / total).view(layer.num_kv_heads, group, QUERY_TILE, layer.head_dim)
    return found.permute(2, 0, 1, 3).reshape(q.shape)


def _hidden(at: int, key_at: int, window: int | None, device: torch.device) -> Tensor | None:
    """True where a query of the tile at ``at`` may not see a key of the tile at ``key_at``; None if it sees them all."""
    all_past = key_at + KEY_TILE <= at + 1
    all_inside = window is None or key_at > at + QUERY_TILE - 1 - window
    if all_past and all_inside:
        return None
    queries = torch.arange(at, at + QUERY_TILE, device=device)[:, None]
    keys = torch.arange(key_at, key_at + KEY_TILE, device=device)[None, :]
    return (keys > queries) if window is None else (keys > queries) | (keys <= queries - window)
