"""Matrix products over packed weights: linears, the head's logits, and the vocabulary's rows.

A checkpoint stores a matrix output by output. A product wants to read memory once, from its beginning to its end, and to use
each vector of weights for several rows of x while it is in a register. So a matrix is packed into panels of some outputs side
by side, with as many inputs of each as one 32-bit lane takes (``STEPS``): [num_panels, num_steps, panel, step], filled up with
zeros. Its one copy serves one token and a thousand; the vocabulary's rows are gathered out of it too.

An output is one sum over the inputs in order, whatever else is in the call, so a row's bits depend on that row alone. Every sum
is float32 (int32 for int8) and rounded once, after the bias. It knows nothing of layers.
"""

from collections.abc import Mapping
from struct import Struct
from types import MappingProxyType

import torch
from torch import Tensor

from minivllm.kernels.cpu.library import KINDS, NativeLibrary
from minivllm.kernels.matrix import Matrix

# Inputs that stand together, by the kind of weights.
STEPS: Mapping[torch.dtype, int] = MappingProxyType({torch.float32: 1, torch.float16: 1, torch.bfloat16: 2, torch.int8: 4})
INT8 = 3  # beside KINDS: only a matrix can be of it


class Products:
    """The products of ``Ops``. Holds nothing that changes."""

    def __init__(self, library: NativeLibrary) -> None:
        self._panel: int = library.panel_width()
        self._words = Struct("13q").pack  # a ``Product`` of native.cpp; thirteen arguments take twice as long
        self._pack, self._linear, self._lookup = library.pack, library.linear, library.lookup

    def pack(self, values: Tensor, scales: Tensor | None) -> Matrix:
        """See ``reference.pack``. The copy is the caller's only one once it lets go of ``values``."""
        (num_out, num_in), step = values.shape, STEPS[values.dtype]
        values, num_panels = values.contiguous(), -(-num_out // self._panel)
        packed = torch.empty((num_panels, -(-num_in // step), self._panel, step), dtype=values.dtype)
        pointers = (values.data_ptr(), packed.data_ptr())
        if scales is None:
            self._pack(*pointers, None, num_out, num_in, KINDS[values.dtype])
            return Matrix(packed, num_out, num_in)
        sums = torch.empty(num_panels * self._panel, dtype=torch.int32)
        self._pack(*pointers, sums.data_ptr(), num_out, num_in, INT8)
        return Matrix(packed, num_out, num_in, scales.contiguous(), sums)

    def linear(self, x: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
        """See ``reference.linear``. The rows of ``x`` may lie apart, as in a view of some columns."""
        return self._multiply(x, matrix, bias, x.dtype)

    def logits(self, x: Tensor, matrix: Matrix) -> Tensor:
        """See ``reference.logits``; here they are the sums themselves, not rounded to the type of ``x``."""
        return self._multiply(x, matrix, None, torch.float32)

    def lookup(self, ids: Tensor, matrix: Matrix, dtype: torch.dtype) -> Tensor:
        """See ``reference.lookup``."""
        ids, values, scales = ids.contiguous(), matrix.values, matrix.scales
        out = torch.empty((ids.shape[0], matrix.num_in), dtype=dtype)
        kinds = (KINDS[values.dtype] if scales is None else INT8, KINDS[dtype])
        pointers = (ids.data_ptr(), values.data_ptr(), None if scales is None else scales.data_ptr(), out.data_ptr())
        if self._lookup(*pointers, ids.shape[0], matrix.num_out, matrix.num_in, *kinds):
            raise IndexError(f"a row beyond the matrix's {matrix.num_out} was looked up")
        return out

    def _multiply(self, x: Tensor, matrix: Matrix, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """``x`` [num_rows, num_in] times the matrix: [num_rows, num_out] in ``dtype``."""
        (num_rows, num_in), (stride, of_values) = x.shape, x.stride()
        num_out, values, scales, sums, kind = matrix.num_out, matrix.values, matrix.scales, matrix.sums, KINDS[x.dtype]
        if num_in != matrix.num_in or (scales is None and x.dtype != values.dtype):
            raise TypeError(f"x {x.dtype} {tuple(x.shape)} does not meet a matrix {values.dtype} ({num_out}, {matrix.num_in})")
        if of_values != 1:
            x, stride = x.contiguous(), num_in
        out = torch.empty(num_rows, num_out, dtype=dtype)
        pointers = (
            x.data_ptr(),
            values.data_ptr(),
            0 if scales is None else scales.data_ptr(),
            0 if sums is None else sums.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            out.data_ptr(),
        )
        kinds = (kind, kind if scales is None else INT8, KINDS[dtype])
        if self._linear(self._words(*pointers, num_rows, stride, num_out, num_in, *kinds)):
            raise MemoryError("no memory for the activations of a linear")
        return out
