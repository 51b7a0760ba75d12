"""Linear layers: one module, told by its parts which rows and columns of which checkpoint tensors are its rank's.

Two ways to split between ranks. By outputs (``column_linear``, ``qkv_linear``): each rank holds some output rows, nothing is
said. By inputs (``row_linear``): each rank holds the columns that its part of the input meets, and the partial results are
summed. A column split followed by a row split costs one sum. Tensors that are used together (q, k, v; gate, up) are
fused into one matrix at loading, because one large product is faster than three small ones.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minivllm.kernels.matrix import Matrix
from minivllm.layers.setup import Setup
from minivllm.layers.source import ALL, TensorSource, in_pieces
from minivllm.parallel.comm import Comm
from minivllm.quant.base import LinearShape


@dataclass(frozen=True)
class Part:
    """One checkpoint tensor of a fused linear: ``num_out`` rows in all, of which this rank keeps ``start : stop``."""

    name: str
    num_out: int
    start: int
    stop: int


class Linear(nn.Module):
    """x W^T + b. Written at loading only."""

    bias: Tensor | None
    matrix: Matrix  # set by ``finish``

    def __init__(
        self, setup: Setup, num_in: int, parts: tuple[Part, ...], *, bias: bool, cols: tuple[int, int] | None = None
    ) -> None:
        """``cols``: this rank's columns of the input, where the input is what is split; results are then summed."""
        super().__init__()
        self.setup, self.num_in, self.parts, self.cols = setup, num_in, parts, cols
        self.first_row: dict[str, int] = {}
        num_out = 0
        for part in parts:
            self.first_row[part.name] = num_out
            num_out += part.stop - part.start
        local_in = num_in if cols is None else cols[1] - cols[0]
        setup.method.create(self, LinearShape(num_out, local_in, setup.dtype, setup.device))
        empty = torch.empty(num_out, dtype=setup.dtype, device=setup.device) if bias else None
        self.register_parameter("bias", None if empty is None else nn.Parameter(empty, requires_grad=False))

    def tensors(self) -> tuple[tuple[str, str], ...]:
        """See ``Loadable``."""
        kinds = ("weight",) if self.bias is None else ("weight", "bias")
        return tuple((part.name, kind) for part in self.parts for kind in kinds)

    def shape(self, part: str, tensor: str) -> tuple[int, ...]:
        """See ``Loadable``."""
        rows = self._part(part).num_out
        return (rows, self.num_in) if tensor == "weight" else (rows,)

    def load(self, part: str, tensor: str, source: TensorSource) -> None:
        """See ``Loadable``."""
        share = self._part(part)
        first = self.first_row[part]
        if tensor == "weight":
            cols = ALL if self.cols is None else slice(*self.cols)
            for at, piece in in_pieces(source, share.start, share.stop, cols):
                self.setup.method.load(self, piece, first + at)
        else:
            bias = source.read(slice(share.start, share.stop))
            self.get_parameter("bias")[first : first + len(bias)].copy_(bias)

    def finish(self) -> None:
        """See ``Loadable``."""
        self.matrix = self.setup.method.finish(self, self.setup.ops)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [num_tokens, this rank's num_in] -> [num_tokens, this rank's num_out]."""
        if self.cols is None:
            return self.setup.ops.linear(x, self.matrix, self.bias)
        bias = self.bias if self.setup.comm.rank == 0 else None  # added once, not once a rank
        return self.setup.comm.all_reduce(self.setup.ops.linear(x, self.matrix, bias))

    def gated(self, x: Tensor, activation: str) -> Tensor:
        """For a pair of gate and up: activation(gate) * up, [num_tokens, half of this rank's num_out]."""
        return self.setup.ops.gated_linear(x, self.matrix, self.bias, activation)

    def _part(self, name: str) -> Part:
        """The part of this name."""
        return next(part for part in self.parts if part.name == name)


def share(total: int, comm: Comm, what: str) -> tuple[int, int]:
    """This rank's range of ``total`` equal things; raises ``ValueError`` when they cannot be shared equally."""
    if total % comm.world:
        raise ValueError(f"{total} {what} cannot be shared equally by {comm.world} ranks")
    each = total // comm.world
    return comm.rank * each, (comm.rank + 1) * each


def column_linear(setup: Setup, num_in: int, parts: tuple[tuple[str, int], ...], *, bias: bool) -> Linear:
    """Outputs split between ranks; ``parts`` are (name, num_out) of the tensors to fuse."""
    shares = tuple(Part(name, num_out, *share(num_out, setup.comm, "outputs")) for name, num_out in parts)
    return Linear(setup, num_in, shares, bias=bias)


def row_linear(setup: Setup, num_in: int, num_out: int, *, bias: bool) -> Linear:
    """Inputs split between ranks, results summed."""
    return Linear(setup, num_in, (Part("", num_out, 0, num_out),), bias=bias, cols=share(num_in, setup.comm, "inputs"))


@dataclass(frozen=True)
class HeadShare:
    """The attention heads of one rank."""

    num_heads: int
    num_kv_heads: int


def head_share(num_heads: int, num_kv_heads: int, comm: Comm) -> HeadShare:
    """How many heads this rank has; a KV head is kept by several ranks where there are more ranks than KV heads."""
    first, stop = share(num_heads, comm, "heads")
    return HeadShare(stop - first, max(1, num_kv_heads // comm.world))


def qkv_linear(setup: Setup, num_in: int, heads: tuple[int, int], head_dim: int, *, bias: bool) -> Linear:
    """q, k and v fused and split by heads; ``heads`` are (num_heads, num_kv_heads) of the whole model."""
    num_heads, num_kv_heads = heads
    comm = setup.comm
    q = share(num_heads, comm, "heads")
    if comm.world <= num_kv_heads:
        kv = share(num_kv_heads, comm, "KV heads")
    elif comm.world % num_kv_heads:
        raise ValueError(f"{comm.world} ranks cannot share {num_kv_heads} KV heads equally")
    else:  # each KV head is kept by the neighbouring ranks whose query heads read it
        head = comm.rank // (comm.world // num_kv_heads)
        kv = (head, head + 1)
    sizes = (("q", num_heads, q), ("k", num_kv_heads, kv), ("v", num_kv_heads, kv))
    parts = tuple(Part(name, n * head_dim, a * head_dim, b * head_dim) for name, n, (a, b) in sizes)
    return Linear(setup, num_in, parts, bias=bias)
