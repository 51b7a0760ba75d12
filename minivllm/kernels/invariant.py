"""Ops whose result for a row does not depend on the other rows, to the last bit.

Floating-point sums depend on their order, and libraries choose the order (and the number of threads) by the shape of the whole
call. So the same token gives other bits alone than in a batch. The cure: only ever make calls of one shape.

* A linear runs in tiles of 32 rows, the last one padded with zeros. The library then always takes the same path, and one row's
  sums never touch another's. On the CPUs tried (MKL for float32, oneDNN for bfloat16 and float16, 1 to 8 threads, 18
  layer-shaped sizes) a row's bits depend neither on its neighbours nor on its place in the tile. Sizes where neither side is
  a multiple of 16 bytes can fail (33 x 65 float32 did, with 4 threads); ``check_linear`` finds out at start.
* An activation with an exponential runs in pieces that are a multiple of the vector width: torch computes whole vectors with
  one routine and the odd elements at the end of a thread's share with another, and the two differ in the last bit.

The idea and its name: https://thinkingmachines.ai/blog/defeating-nondeterminism-in-llm-inference/
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from minivllm.kernels import reference
from minivllm.kernels.matrix import Matrix

ROW_TILE = 32  # rows per matmul; 64 is faster for long prompts and twice as slow for one token
PIECE = 16384  # elements per activation call: under the 32,768 from which torch splits a call among threads
VECTOR = 64  # elements; a multiple of every vector width (two AVX-512 registers of 16-bit values)


def linear(x: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
    """``reference.linear`` in tiles of ``ROW_TILE`` rows. int8 needs none: sums are exact, and each row has its own scale."""
    if matrix.scales is not None:
        return reference.linear(x, matrix, bias)
    num_rows = x.shape[0]
    out = x.new_empty((num_rows, matrix.num_out))
    whole = num_rows - num_rows % ROW_TILE
    x = x.contiguous()
    for start in range(0, whole, ROW_TILE):
        out[start : start + ROW_TILE] = F.linear(x[start : start + ROW_TILE], matrix.values, bias)
    if whole < num_rows:
        tile = x.new_zeros((ROW_TILE, x.shape[1]))
        tile[: num_rows - whole] = x[whole:]
        out[whole:] = F.linear(tile, matrix.values, bias)[: num_rows - whole]
    return out


def logits(x: Tensor, matrix: Matrix) -> Tensor:
    """``reference.logits`` in tiles of rows."""
    return linear(x, matrix, None).float()


def activation(x: Tensor, name: str) -> Tensor:
    """``reference.activation`` in pieces of a fixed length."""
    flat = x.reshape(-1)
    num_elements = flat.numel()
    padded = flat.new_zeros(-(-num_elements // VECTOR) * VECTOR)
    padded[:num_elements] = flat
    for start in range(0, padded.numel(), PIECE):
        padded[start : start + PIECE] = reference.activation(padded[start : start + PIECE], name)
    return padded[:num_elements].view(x.shape)


def gated_activation(x: Tensor, name: str) -> Tensor:
    """``reference.gated_activation`` in pieces of a fixed length."""
    gate, up = x.chunk(2, dim=-1)
    return activation(gate, name) * up


def check_linear(weight: Tensor) -> bool:
    """Tell whether a row's result for ``weight`` [num_out, num_in] is free of its place and neighbours here and now."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn((ROW_TILE, weight.shape[1]), generator=generator).to(weight)
    together = F.linear(rows, weight)
    for shift in (1, 6, 19):
        moved = rows.roll(shift, 0)
        moved[:shift] *= 2  # these rows are other neighbours now
        if not torch.equal(F.linear(moved, weight)[shift:], together[:-shift]):
            return False
    return True
