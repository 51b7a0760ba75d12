"""From tokens to vectors and back: the vocabulary table, its other use as the head, and learned positions.

The table is split between ranks by vocabulary rows: a rank looks up the tokens it holds, gives zeros for the others, and the
sum over the ranks is the embedding. As head, each rank gives the logits of its own rows and these are joined. A tied model
uses one table both ways.
"""

import torch
from torch import Tensor, nn

from minivllm.kernels.matrix import Matrix
from minivllm.layers.setup import Setup
from minivllm.layers.source import TensorSource, in_pieces
from minivllm.quant.base import LinearShape


class VocabTable(nn.Module):
    """[vocab_size, dim], this rank's rows of it. Written at loading only."""

    matrix: Matrix  # set by ``finish``

    def __init__(self, setup: Setup, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.setup, self.vocab_size, self.dim = setup, vocab_size, dim
        self.rows = -(-vocab_size // setup.comm.world)  # the last rank's may reach past the vocabulary: those stay zero
        self.first = setup.comm.rank * self.rows
        setup.method.create(self, LinearShape(self.rows, dim, setup.dtype, setup.device))

    def tensors(self) -> tuple[tuple[str, str], ...]:
        """See ``Loadable``."""
        return (("", "weight"),)

    def shape(self, part: str, tensor: str) -> tuple[int, ...]:
        """See ``Loadable``."""
        return (self.vocab_size, self.dim)

    def load(self, part: str, tensor: str, source: TensorSource) -> None:
        """See ``Loadable``."""
        stop = min(self.first + self.rows, self.vocab_size)
        for at, piece in in_pieces(source, self.first, stop):
            self.setup.method.load(self, piece, at)

    def finish(self) -> None:
        """See ``Loadable``."""
        self.matrix = self.setup.method.finish(self, self.setup.ops)

    def forward(self, ids: Tensor) -> Tensor:
        """``ids`` [num_tokens] int64 -> [num_tokens, dim]."""
        ops, comm, dtype = self.setup.ops, self.setup.comm, self.setup.dtype
        if comm.world == 1:
            return ops.lookup(ids, self.matrix, dtype)
        local = ids - self.first
        mine = (local >= 0) & (local < self.rows)
        found = ops.lookup(torch.where(mine, local, 0), self.matrix, dtype)
        return comm.all_reduce(found.masked_fill(~mine[:, None], 0))

    def logits(self, hidden: Tensor) -> Tensor:
        """``hidden`` [num_rows, dim] -> [num_rows, vocab_size] float32."""
        return self.setup.comm.all_gather(self.setup.ops.logits(hidden, self.matrix))[:, : self.vocab_size]


class LearnedPositions(nn.Module):
    """One vector per position, as in GPT-2. Written at loading only."""

    weight: Tensor

    def __init__(self, setup: Setup, max_positions: int, dim: int) -> None:
        super().__init__()
        self.ops = setup.ops
        weight = torch.empty((max_positions, dim), dtype=setup.dtype, device=setup.device)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def tensors(self) -> tuple[tuple[str, str], ...]:
        """See ``Loadable``."""
        return (("", "weight"),)

    def shape(self, part: str, tensor: str) -> tuple[int, ...]:
        """See ``Loadable``."""
        return tuple(self.weight.shape)

    def load(self, part: str, tensor: str, source: TensorSource) -> None:
        """See ``Loadable``."""
        self.weight.copy_(source.read())

    def finish(self) -> None:
        """Nothing to do."""

    def forward(self, positions: Tensor) -> Tensor:
        """``positions`` [num_tokens] int64 -> [num_tokens, dim]."""
        return self.ops.embedding(positions, self.weight)
