"""Where weights come from, as layers see it: a tensor of known shape from which any slice can be read.

A layer knows which rows and columns belong to its rank and asks for those only, so a rank never reads what it does not keep.
Whether the tensor is in a file, stored transposed, part of a fused tensor or random, the layer does not know.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

ALL = slice(None)
PIECE_VALUES = 4 * 2**20


class TensorSource(Protocol):
    """A tensor of one or two dimensions, not read yet."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole tensor's shape."""

    def read(self, rows: slice = ALL, cols: slice = ALL) -> Tensor:
        """Read a part; ``cols`` must be ``ALL`` for a vector."""


def in_pieces(source: TensorSource, start: int, stop: int, cols: slice = ALL) -> Iterator[tuple[int, Tensor]]:
    """Read rows ``start : stop`` of a matrix a piece at a time: (rows before it, the piece).

    So a checkpoint in float32 that becomes int8 passes through a few megabytes, not through a copy of its largest matrix.
    """
    rows = max(1, PIECE_VALUES // max(1, source.shape[1]))
    for at in range(start, stop, rows):
        yield at - start, source.read(slice(at, min(at + rows, stop)), cols)


class Loadable(Protocol):
    """A layer with weights. ``part`` names one of several tensors that it fuses ("q", "gate"; "" where it fuses none)."""

    def tensors(self) -> tuple[tuple[str, str], ...]:
        """Every (part, tensor) that must be loaded, such as ("q", "weight")."""

    def shape(self, part: str, tensor: str) -> tuple[int, ...]:
        """The shape that the whole tensor, of all ranks, must have."""

    def load(self, part: str, tensor: str, source: TensorSource) -> None:
        """Read this rank's share of a tensor into the parameter."""

    def finish(self) -> None:
        """Everything is loaded: bring the weights into the form that they are used in."""


@dataclass(frozen=True)
class Transposed:
    """A matrix stored as [num_in, num_out] (GPT-2's Conv1D), read as [num_out, num_in]."""

    inner: TensorSource

    @property
    def shape(self) -> tuple[int, ...]:
        """See ``TensorSource``."""
        return self.inner.shape[::-1]

    def read(self, rows: slice = ALL, cols: slice = ALL) -> Tensor:
        """See ``TensorSource``."""
        return self.inner.read(cols, rows).t()


@dataclass(frozen=True)
class RowRange:
    """Rows ``start : stop`` of a fused tensor, as if they were a tensor of their own."""

    inner: TensorSource
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        """See ``TensorSource``."""
        return (min(self.stop, self.inner.shape[0]) - self.start, *self.inner.shape[1:])

    def read(self, rows: slice = ALL, cols: slice = ALL) -> Tensor:
        """See ``TensorSource``."""
        start, stop, _ = rows.indices(self.stop - self.start)
        return self.inner.read(slice(self.start + start, self.start + stop), cols)
