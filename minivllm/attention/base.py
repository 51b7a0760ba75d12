"""What every attention backend offers, and the records it works on.

Three questions, asked at three times: ``missing`` once at start (may it serve this model here?), ``plan`` once per step on the
host (which rows, which blocks), ``run`` once per layer. ``run`` writes the step's K and V into the cache before any query
reads it, so a row may read blocks that another row of the same step fills. The split into plan and run is flashinfer's.

A backend knows positions and block ids. It knows neither requests nor what the tokens are.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True)
class AttnNeed:
    """What a model on a device asks of a backend."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]  # the different sliding windows of its layers, in tokens; None = sees everything
    block_size: int
    dtype: torch.dtype
    device: torch.device
    batch_invariant: bool


@dataclass(frozen=True)
class AttnLayer:
    """The numbers of one layer's attention, on this rank."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None  # tokens, the query's own included; None = sees everything


@dataclass(frozen=True)
class KVLayer:
    """One layer's cache. Written by the attention backend only, and by the runner when it copies blocks."""

    k: Tensor  # [num_blocks, block_size, num_kv_heads, head_dim]
    v: Tensor  # [num_blocks, block_size, num_kv_heads, head_dim]


@dataclass(frozen=True)
class AttnMeta:
    """One step as attention sees it, for one KV group. Host arrays, but for the slots."""

    query_starts: npt.NDArray[np.int64]  # [num_rows + 1]: row i's queries are query_starts[i] : query_starts[i + 1]
    context_lens: npt.NDArray[np.int64]  # [num_rows]: tokens in the cache after this step's are written
    block_tables: npt.NDArray[np.int32]  # [num_rows, max_blocks]; entries past a row's last block are meaningless
    block_size: int
    slots: Tensor  # [num_tokens] int64 on the device: where each token's K and V go


class AttentionBackend(Protocol):
    """One way of computing attention over the paged cache."""

    name: str

    def plan(self, meta: AttnMeta) -> Any:
        """Prepare a step; the result is opaque, frozen, and handed to ``run`` for each layer of the group."""

    def run(self, plan: Any, layer: AttnLayer, q: Tensor, k: Tensor, v: Tensor, cache: KVLayer) -> Tensor:
        """Write ``k``, ``v`` [num_tokens, num_kv_heads, head_dim] and attend: [num_tokens, num_heads, head_dim] like ``q``."""


class BackendClass(Protocol):
    """A backend before it is made: what ``select`` asks."""

    name: str

    def __call__(self, need: AttnNeed, ops: Any) -> AttentionBackend:
        """Make the backend for this need."""

    def missing(self, need: AttnNeed) -> list[str]:
        """Every reason why it cannot serve this need; empty means it can."""
