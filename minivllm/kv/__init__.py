"""The paged KV cache's bookkeeping: which block is whose. Pure Python; blocks are ids, never tensors."""
