"""The KV cache's tensors: for each layer one pool of blocks for K and one for V.

Which block is whose is the scheduler's business, and how a block looks inside is the attention backend's: only it reads and
writes there. Here the first dimension is blocks, and a block takes the same memory however it is laid out. Block 0 is scratch
and never handed out, so that a padded row has somewhere to write. All memory is touched here, at start: the cache never grows,
and a machine that cannot hold it says so before the first request.
"""

from dataclasses import dataclass

import torch

from minivllm.attention.base import AttentionBackend, KVLayer


@dataclass(frozen=True)
class KVShape:
    """One layer's pools."""

    block_size: int  # KV slots per block
    num_kv_heads: int  # of this rank
    head_dim: int
    dtype: torch.dtype

    def block_bytes(self, num_layers: int) -> int:
        """Memory of one block, K and V, in all layers."""
        return 2 * num_layers * self.block_size * self.num_kv_heads * self.head_dim * self.dtype.itemsize


def allocate(
    backend: AttentionBackend, dtype: torch.dtype, num_layers: int, num_blocks: int, device: torch.device
) -> tuple[KVLayer, ...]:
    """Make the pools of every layer in the backend's layout, and touch them."""
    k_shape, v_shape = backend.pool_shapes(num_blocks)

    def pool(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device).zero_()  # zeros() would leave the pages untouched

    return tuple(KVLayer(pool(k_shape), pool(v_shape)) for _ in range(num_layers))
