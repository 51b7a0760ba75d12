"""A weight matrix in the order in which one table of kernels reads it.

A checkpoint has rows of outputs. Kernels want something else: panels of outputs side by side, pairs of inputs in one lane, int8
with scales. Whoever owns a matrix (a linear layer, the vocabulary's table) packs it once, when its weights are complete, with
the ``pack`` of its table, and then only hands it back to the same table's ``linear``, ``logits`` and ``lookup``. One copy.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Matrix:
    """A matrix [num_out, num_in]. What ``values`` looks like only its table knows."""

    values: Tensor
    num_out: int
    num_in: int
    scales: Tensor | None = None  # [num_out] float32, for int8 values: values * scales are the weights
    sums: Tensor | None = None  # int32, for kernels that need each output's sum of int8 values

    @property
    def nbytes(self) -> int:
        """Memory of all of it."""
        return sum(t.nbytes for t in (self.values, self.scales, self.sums) if t is not None)
