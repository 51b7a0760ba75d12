"""Linears in few shapes, for 16-bit weights on a CPU.

oneDNN compiles a kernel for every shape it meets and keeps up to 1,024 of them; the number of rows of a step is a new shape
almost every time. Serving mixed lengths, the engine grew by 210 MiB and was still growing (docs/log.md). So rows are padded to
a few sizes: the kernels are soon all there, and memory stays what was said at start.
"""

import torch
from torch import Tensor

from minivllm.kernels import reference
from minivllm.kernels.matrix import Matrix


def padded_rows(num_rows: int) -> int:
    """The next of the sizes 1 .. 4, multiples of 8 up to 128, multiples of 64."""
    if num_rows <= 4:
        return num_rows
    step = 8 if num_rows <= 128 else 64
    return -(-num_rows // step) * step


def linear(x: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
    """``reference.linear``, its rows padded to one of few sizes."""
    num_rows = x.shape[0]
    size = padded_rows(num_rows)
    if size == num_rows:
        return reference.linear(x, matrix, bias)
    padded = torch.zeros((size, x.shape[1]), dtype=x.dtype, device=x.device)
    padded[:num_rows] = x
    return reference.linear(padded, matrix, bias)[:num_rows]


def logits(x: Tensor, matrix: Matrix) -> Tensor:
    """``reference.logits``, its rows padded likewise."""
    return linear(x, matrix, None).float()
