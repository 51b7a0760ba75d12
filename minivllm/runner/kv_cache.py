"""The KV cache's tensors: for each layer one pool of blocks for K and one for V.

Which block is whose is the scheduler's business. Block 0 is scratch and never handed out, so that a padded row has somewhere
to write. All memory is touched here, at start: the cache never grows, and a machine that cannot hold it says so before the
first request.
"""

from dataclasses import dataclass

import torch

from minivllm.attention.base import KVLayer


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


def allocate(shape: KVShape, num_layers: int, num_blocks: int, device: torch.device) -> tuple[KVLayer, ...]:
    """Make the pools of every layer, [num_blocks, block_size, num_kv_heads, head_dim] each, and touch them."""

    def pool() -> torch.Tensor:
        size = (num_blocks, shape.block_size, shape.num_kv_heads, shape.head_dim)
        return torch.empty(size, dtype=shape.dtype, device=device).zero_()  # zeros() would leave the pages untouched

    return tuple(KVLayer(pool(), pool()) for _ in range(num_layers))
