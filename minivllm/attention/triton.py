"""Attention over the paged cache on a GPU, by Triton kernels that read a step's numbers from the device's memory.

Three launches a layer at most: one pass that norms and turns q and k and writes the cache (``kernels/triton/turn.py``), one
kernel for rows with few queries and one for the others (``kernels/triton/attention.py``). A step of decodes needs no third, or
else one for the beginnings that they have in common (``kernels/triton/shared_prefix.py``).
No launch depends on how long contexts are, so a step can be captured in a graph and replayed over other sequences.

Where a step is not captured and brings long prompts, a library may compute the bulk of these (``long_prompts.py``).

A block holds each KV head's keys side by side, so a tile of a head is a few whole blocks of memory.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from minivllm.attention.base import Angles, AttnLayer, AttnMeta, AttnNeed, DeviceMeta, KVLayer, SharedShape
from minivllm.attention.long_prompts import LongPrompts, LongStep
from minivllm.kernels.ops import Ops
from minivllm.kernels.triton.attention_sizes import SEES_ALL, SharedItems, Sizes, Step, usual_shapes

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LEAST_SAVED = 8192  # tokens of a common beginning that are not read again: what the pass over it costs, measured
MAX_HEAD_DIM = 256  # a tile of K and one of V, several times over, have to fit into a multiprocessor


@dataclass(frozen=True)
class TritonPlan:
    """A planned step."""

    step: Step
    slots: Tensor  # [num_tokens] int64
    kinds: dict[int, tuple[bool, bool]]  # by window: may there be rows with few queries, and others?
    long: LongStep | None  # what the library computes


class TritonAttention:
    """Backend ``triton``. Changed by nobody after it was made, but for the kernels' own workspace."""

    name = "triton"

    def __init__(self, need: AttnNeed, ops: Ops) -> None:
        # Imported when made: who only asks about this backend may have no Triton.
        from minivllm.kernels.triton.attention import PagedAttention
        from minivllm.kernels.triton.attention_plan import Planner
        from minivllm.kernels.triton.shared_prefix import PrefixWalk
        from minivllm.kernels.triton.turn import Turn

        if ops.chip is None:
            raise ValueError("triton attention needs ops with Triton's kernels")
        self.need, chip = need, ops.chip
        dtype = max(need.dtype, need.kv_dtype, key=lambda t: t.itemsize)
        sizes = Sizes(need.num_heads, need.num_kv_heads, need.head_dim, dtype)
        self._turn = Turn(chip, need.num_heads, need.num_kv_heads)
        shapes = usual_shapes(sizes, need.batch_invariant)
        self._kernels, self._shared = PagedAttention(chip, sizes, shapes, need.device), PrefixWalk(chip, sizes, shapes)
        tiling = self._kernels.tiling
        self._planner = Planner(chip, tiling, need.num_kv_heads, need.windows, need.device)
        usable = tiling.shared_rows and None in need.windows
        self.shared_shape = SharedShape(tiling.shared_rows, tiling.shared_grain, LEAST_SAVED) if usable else None
        self.long_prompts = LongPrompts(need, chip)

    @staticmethod
    def missing(need: AttnNeed, ops: Ops) -> list[str]:
        """See ``BackendClass``."""
        reasons = [] if ops.chip is not None else ["the Triton kernels are not in use"]
        reasons += [f"there is no kernel for {t}" for t in sorted({need.dtype, need.kv_dtype}, key=str) if t not in DTYPES]
        if need.head_dim > MAX_HEAD_DIM or need.head_dim % 8:
            reasons.append(f"head_dim={need.head_dim} is no multiple of 8 up to {MAX_HEAD_DIM}")
        if need.num_heads // need.num_kv_heads > 64:
            reasons.append(f"{need.num_heads // need.num_kv_heads} query heads share a KV head, over 64")
        return reasons

    def workspace_bytes(self, num_tokens: int, max_model_len: int) -> int:
        """See ``DeviceAttention``."""
        return self.long_prompts.workspace_bytes(num_tokens, max_model_len)

    def pool_shapes(self, num_blocks: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A head's part of a block is dense: [num_blocks, num_kv_heads, block_size, head_dim], K and V alike."""
        shape = (num_blocks, self.need.num_kv_heads, self.need.block_size, self.need.head_dim)
        return shape, shape

    def plan(self, meta: AttnMeta) -> TritonPlan:
        """``plan_on_device`` for a step whose numbers are on the host only: brings them over first."""
        device = self.need.device
        arrays = (meta.query_starts, meta.context_lens, meta.rows, meta.block_tables)
        starts, contexts, rows, tables = (torch.from_numpy(a).to(device, torch.int32, copy=True) for a in arrays)
        numbers = (starts, contexts, rows, tables, meta.slots, meta.block_size)
        return self.plan_on_device(DeviceMeta(*numbers, decode=False, host=meta))

    def plan_on_device(self, meta: DeviceMeta) -> TritonPlan:
        """See ``DeviceAttention``."""
        long = None if meta.host is None or meta.decode else self.long_prompts.plan(meta.host, meta.block_tables)
        shared = None if meta.shared is None else self._shared.prepare(SharedItems(*meta.shared))
        grain = 0 if long is None else self.long_prompts.grain
        parts = self._planner.plan(meta.query_starts, meta.context_lens, grain, shared)
        step = Step(parts, meta.block_tables, meta.rows, meta.context_lens, meta.decode, shared)
        return TritonPlan(step, meta.slots, {window: self._kinds(window, meta, long) for window in parts}, long)

    def _kinds(self, window: int, meta: DeviceMeta, long: LongStep | None) -> tuple[bool, bool]:
        """Whether a step may have rows with few queries, and others; what the library computes does not count."""
        if self.need.batch_invariant:
            return False, True
        if meta.decode or meta.host is None:
            return True, not meta.decode
        counts = meta.host.query_starts[1:] - meta.host.query_starts[:-1]  # [num_rows]
        if long is not None and window == SEES_ALL:
            counts = counts - long.taken
        few = counts <= self._kernels.tiling.few_queries
        return bool((few & (counts > 0)).any()), bool((~few).any())

    def run(self, plan: TritonPlan, layer: AttnLayer, heads: Tensor, angles: Angles | None, cache: KVLayer) -> Tensor:
        """See ``AttentionBackend``. Results of padded tokens are whatever the memory held."""
        norm, caches = layer.qk_norm, (cache.k, cache.v)
        window = SEES_ALL if layer.window is None else layer.window
        long = plan.long if window == SEES_ALL else None
        k = None if long is None else heads.new_empty((heads.shape[0], layer.num_kv_heads, layer.head_dim))
        weights = None if norm is None else (norm.q, norm.k, norm.eps)
        q = self._turn.turn_and_write(heads, weights, angles, caches, plan.slots, k)  # [num_tokens, num_heads, head_dim]
        out = q.new_empty(q.shape)
        few, many = plan.kinds[window]
        if plan.step.shared is not None and window == SEES_ALL:
            self._shared.walk(plan.step, q, caches, layer.scale)
        if few:
            self._kernels.few(plan.step, q, out, caches, layer.scale, window)
        if many:
            self._kernels.many(plan.step, q, out, caches, layer.scale, window)
        if long is not None and k is not None:
            v = heads[:, layer.num_heads + layer.num_kv_heads :]
            self.long_prompts.attend(long, (q, k, v), out, caches, layer.scale)
        return out
