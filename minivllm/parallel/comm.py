"""What a rank says to the other ranks that share its model.

Tensor parallelism (https://arxiv.org/abs/1909.08053) splits every linear between ``world`` ranks: those that split their
outputs need nothing, those that split their inputs sum the partial results (``all_reduce``), and the head joins its columns
(``all_gather``). A layer is given a ``Comm`` and never asks who else is there.
"""

from typing import Protocol

from torch import Tensor


class Comm(Protocol):
    """The ranks of one model."""

    rank: int
    world: int

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum ``x`` over the ranks; each gets the sum."""

    def all_gather(self, x: Tensor) -> Tensor:
        """Join the ranks' ``x`` along the last dimension, in order of rank; each gets the whole."""


class SoloComm:
    """One rank alone; nothing to say. Holds nothing that changes."""

    rank = 0
    world = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return ``x``."""
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """Return ``x``."""
        return x
