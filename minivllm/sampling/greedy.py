"""Greedy choice: the most likely token, the lowest id among equals."""

from torch import Tensor


def greedy(logits: Tensor) -> Tensor:
    """[num_sampled, vocab] float32 -> [num_sampled] int64. A row that is not finite gives some id; the runner reports it."""
    return logits.argmax(dim=-1)
