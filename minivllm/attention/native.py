"""Attention over the paged cache by the compiled kernel: read in place, nothing gathered, nothing padded.

One call a layer writes the step's K and V and attends. How it computes is told in ``kernels/cpu/native.cpp``; here is what it
is given. The plan is one block of integers that the kernel reads as it stands: sizes, and for each row where its queries begin,
its context and its row of the block table. It is made from whole arrays, and its length does not depend on contexts.

A query's result is bitwise the same alone, in a batch, in chunks and with any number of threads, so this backend also serves
the batch-invariant mode.
"""

from dataclasses import dataclass
from struct import Struct

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from minivllm.attention.base import Angles, AttnLayer, AttnMeta, AttnNeed, KVLayer, turned
from minivllm.kernels.cpu.library import KINDS
from minivllm.kernels.ops import Ops

MAX_HEAD_DIM = 256  # as in native.cpp
SEES_ALL = 1 << 60  # a window that no position reaches


@dataclass(frozen=True)
class NativePlan:
    """A planned step."""

    step: npt.NDArray[np.int64]  # the kernel's Step and the arrays behind it
    address: int  # of ``step``
    meta: AttnMeta  # ``step`` points to its block tables and slots


class NativeAttention:
    """The kernel ``attention`` of the native library. Holds nothing that changes."""

    name = "native"

    def __init__(self, need: AttnNeed, ops: Ops) -> None:
        if ops.native is None:
            raise ValueError("native attention needs ops with the native library")
        self.need, self.ops, self._attention = need, ops, ops.native.attention
        self._words = Struct("11qd").pack  # a ``Layer`` of native.cpp; twelve arguments take three times as long
        self._item_rows = ops.native.item_rows()  # queries x heads that share a work item
        kinds = (KINDS[need.dtype], KINDS[need.kv_dtype])
        self._side_by_side = (need.head_dim, 1)
        self._shape = (need.num_heads, need.num_kv_heads, need.head_dim, need.block_size, *kinds)

    @staticmethod
    def missing(need: AttnNeed, ops: Ops) -> list[str]:
        """See ``BackendClass``."""
        if need.device.type != "cpu":
            return [f"it runs on the CPU, not on {need.device.type}"]
        if ops.native is None:
            return ["the native kernels are not in use"]
        width, reasons = ops.native.vector_width(), []
        if need.block_size % width:
            reasons.append(f"block_size={need.block_size} is no multiple of the {width} floats of a vector")
        if need.head_dim % width or need.head_dim > MAX_HEAD_DIM:
            reasons.append(f"head_dim={need.head_dim} is no multiple of {width} up to {MAX_HEAD_DIM}")
        reasons += [f"there is no kernel for {dtype}" for dtype in {need.dtype, need.kv_dtype} if dtype not in KINDS]
        return reasons

    def pool_shapes(self, num_blocks: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Keys stand transposed within a block, so that the scores of neighbouring slots are one vector. See ``native.cpp``."""
        need = self.need
        place = (num_blocks, need.num_kv_heads)
        return (*place, need.head_dim, need.block_size), (*place, need.block_size, need.head_dim)

    def plan(self, meta: AttnMeta) -> NativePlan:
        """Pack the step's numbers; the order is that of ``Step`` in ``native.cpp``."""
        num_rows, group = len(meta.rows), self.need.num_heads // self.need.num_kv_heads
        num_queries = meta.query_starts[1:] - meta.query_starts[:-1]  # [num_rows]
        first_items = np.zeros(num_rows + 1, dtype=np.int64)  # work items of one KV head
        np.cumsum((num_queries * group + (self._item_rows - 1)) // self._item_rows, out=first_items[1:])
        row_of_item = np.repeat(np.arange(num_rows), first_items[1:] - first_items[:-1])
        num_visits = int(num_queries @ meta.context_lens)
        tables = (torch.from_numpy(meta.block_tables).data_ptr(), meta.block_tables.shape[1], meta.slots.data_ptr())
        sizes = (len(meta.slots), num_rows, len(row_of_item), num_visits, *tables, *self._shape)
        arrays = (meta.query_starts, meta.context_lens, meta.rows, first_items, row_of_item)
        step = np.concatenate((sizes, *arrays), dtype=np.int64)
        return NativePlan(step, torch.from_numpy(step).data_ptr(), meta)

    def run(self, plan: NativePlan, layer: AttnLayer, heads: Tensor, angles: Angles | None, cache: KVLayer) -> Tensor:
        """See ``AttentionBackend``."""
        q, k, v = turned(self.ops, layer, heads, angles)
        (q, of_q), (k, of_k), (v, of_v) = self._dense(q), self._dense(k), self._dense(v)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)  # [num_tokens, num_heads, head_dim]
        tokens = (q.data_ptr(), k.data_ptr(), v.data_ptr())
        window = SEES_ALL if layer.window is None else layer.window
        memory = (cache.k.data_ptr(), cache.v.data_ptr(), out.data_ptr())
        self._attention(self._words(plan.address, *tokens, *memory, of_q, of_k, of_v, window, layer.scale))
        return out

    def _dense(self, x: Tensor) -> tuple[Tensor, int]:
        """``x`` [num_tokens, heads, head_dim] or, if a token's values are apart, a copy; and its stride from token to token."""
        stride = x.stride()
        if stride[1:] != self._side_by_side:
            x = x.contiguous()
            stride = x.stride()
        return x, stride[0]
