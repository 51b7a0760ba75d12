"""What every attention backend offers, and the records it works on.

Three questions, asked at three times: ``missing`` once at start (may it serve this model here?), ``plan`` once per step on the
host (which rows, which blocks), ``run`` once per layer. ``run`` writes the step's K and V into the cache before any query
reads it, so a row may read blocks that another row of the same step fills. The split into plan and run is flashinfer's.

How a block lies in memory is the backend's own business too (``pool_shapes``): the rest of the program allocates the pools and
copies whole blocks, and looks at nothing else in them.

A backend knows positions and block ids. It knows neither requests nor what the tokens are.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from minivllm.kernels.ops import Ops


@dataclass(frozen=True)
class AttnNeed:
    """What a model on a device asks of a backend."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]  # the different sliding windows of its layers, in tokens; None = sees everything
    block_size: int
    dtype: torch.dtype  # of q, k, v and the result
    kv_dtype: torch.dtype  # of what the cache holds
    device: torch.device
    batch_invariant: bool


@dataclass(frozen=True)
class QKNorm:
    """RMS norms of the heads of q and k, before they are turned by their positions."""

    q: Tensor  # [head_dim]
    k: Tensor  # [head_dim]
    eps: float


@dataclass(frozen=True)
class AttnLayer:
    """One layer's attention, on this rank."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None  # tokens, the query's own included; None = sees everything
    qk_norm: QKNorm | None = None


@dataclass(frozen=True)
class KVLayer:
    """One layer's cache. Written by the attention backend only, and by the runner when it copies blocks."""

    k: Tensor  # [num_blocks, ...]: the backend's ``pool_shapes``
    v: Tensor  # [num_blocks, ...]


@dataclass(frozen=True)
class AttnMeta:
    """One step as attention sees it, for one KV group. Host arrays, but for the slots.

    The block table is the runner's own, of all its rows, and is never copied: the step after this one may write to it.
    """

    query_starts: npt.NDArray[np.int64]  # [num_rows + 1]: row i's queries are query_starts[i] : query_starts[i + 1]
    context_lens: npt.NDArray[np.int64]  # [num_rows]: tokens in the cache after this step's are written
    rows: npt.NDArray[np.int64]  # [num_rows]: which row of the block table each has
    block_tables: npt.NDArray[np.int32]  # [max_num_seqs, max_blocks]; entries past a row's last block are meaningless
    block_size: int
    slots: Tensor  # [num_tokens] int64 on the device: where each token's K and V go


@dataclass(frozen=True)
class SharedShape:
    """How a backend takes decodes whose contexts begin with the same blocks: it reads these blocks once for several rows."""

    rows: int  # of an item: so many rows are served by one reading
    grain: int  # tokens: only whole multiples of so many are read together
    least_saved: int  # tokens that need not be read again; under this it is not worth the pass


@dataclass(frozen=True)
class DeviceMeta:
    """One step for a backend that plans on the device. Fixed addresses: a captured graph reads each step's values there."""

    query_starts: Tensor  # [max_rows + 1] int32; entries past the step's rows repeat the number of tokens
    context_lens: Tensor  # [max_rows] int32: tokens in the cache after this step's are written; 0 past the step's rows
    rows: Tensor  # [max_rows] int32: which row of the block table each has
    block_tables: Tensor  # [max_num_seqs + 1, max_blocks] int32; entries past a row's last block are meaningless
    slots: Tensor  # [num_tokens] int64; those of padded tokens lie in block 0, which nobody reads
    block_size: int
    decode: bool  # every row has at most one token, and row i is token i: num_tokens == max_rows
    host: AttnMeta | None  # the same as host arrays, where the step is not captured; its block_tables are not kept
    shared: tuple[Tensor, Tensor] | None = None  # seats and items of rows with a common beginning (``runner/seating.py``)


Angles = tuple[Tensor, Tensor]  # cos and sin of a step's tokens, [num_tokens, half] float32 each


class AttentionBackend(Protocol):
    """One way of computing attention over the paged cache."""

    name: str

    def pool_shapes(self, num_blocks: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of one layer's K and V tensors for ``num_blocks`` blocks; dimension 0 is the block."""

    def plan(self, meta: AttnMeta) -> Any:
        """Prepare a step; the result is opaque, frozen, and handed to ``run`` for each layer of the group."""

    def run(self, plan: Any, layer: AttnLayer, heads: Tensor, angles: Angles | None, cache: KVLayer) -> Tensor:
        """Norm and turn q and k, write k and v into the cache, attend: [num_tokens, num_heads, head_dim].

        ``heads`` [num_tokens, num_heads + 2 * num_kv_heads, head_dim] holds q, k and v side by side, as projected.
        """


class DeviceAttention(AttentionBackend, Protocol):
    """A backend whose plan is made on the device, so that a step can be captured in a graph."""

    shared_shape: SharedShape | None  # None: common beginnings are nothing to it

    def plan_on_device(self, meta: DeviceMeta) -> Any:
        """As ``plan``; launches a kernel or two and asks the device nothing."""

    def workspace_bytes(self, num_tokens: int, max_model_len: int) -> int:
        """Memory that a step of ``num_tokens`` may need over what the same step takes where it is captured."""


class BackendClass(Protocol):
    """A backend before it is made: what ``select`` asks."""

    name: str

    def __call__(self, need: AttnNeed, ops: Ops) -> AttentionBackend:
        """Make the backend for this need."""

    def missing(self, need: AttnNeed, ops: Ops) -> list[str]:
        """Every reason why it cannot serve this need with these ops; empty means it can."""


def token_major_pools(need: AttnNeed, num_blocks: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Pools [num_blocks, block_size, num_kv_heads, head_dim], K and V alike: what ``ops.kv_write`` writes to."""
    shape = (num_blocks, need.block_size, need.num_kv_heads, need.head_dim)
    return shape, shape


def turned(ops: Ops, layer: AttnLayer, heads: Tensor, angles: Angles | None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of ``heads``, which is as in ``AttentionBackend.run``; q and k normed and turned.

    [num_tokens, heads, head_dim] each. Only their last two dimensions are dense.
    """
    q, k, v = torch.split(heads, [layer.num_heads, layer.num_kv_heads, layer.num_kv_heads], dim=1)
    if (norm := layer.qk_norm) is not None:
        q, k = ops.rms_norm(q, norm.q, norm.eps), ops.rms_norm(k, norm.k, norm.eps)
    if angles is not None:
        q, k = ops.rope(q, *angles), ops.rope(k, *angles)
    return q, k, v
