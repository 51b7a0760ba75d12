"""Norms, activations and gathers: kernels that compute little, and so cost what their memory traffic costs.

The lesson is what such a kernel has to get right, since arithmetic is free here:

* Everything is read once and written once. torch's own norm of a sum is some eight calls over memory; here the sum, its
  rounding, the statistics and the scaling happen while the row lies in registers.
* A thread reads 16 bytes at a time, neighbours side by side. So the number of warps follows from the row's length: a warp for
  every 256 values, up to 16 warps.
* A short row (a head's 128 channels) does not fill a program: several rows share one, each reduced by itself.
* A weight is asked for before the wait for the previous kernel: no kernel of a step writes it (``chip.py``).

The meaning, and where values are rounded to their 16-bit type, is ``reference.py``'s. A row's bits depend on that row alone:
how a row is laid over threads follows from its length and from nothing else.

Inputs may be views into a wider tensor, as the parts of a fused projection are: any distance from token to token, a token's own
values side by side. Results are contiguous.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minivllm.kernels.matrix import Matrix
from minivllm.kernels.triton.bend import bend
from minivllm.kernels.triton.chip import Chip, let_next_start, wait_for_previous

_WARP_VALUES = 256  # 32 threads of 8 16-bit values, 16 bytes each
_MAX_WARPS = 16
_ROW_VALUES = 1024  # values of a program of an elementwise kernel
_SHARED_VALUES = 512  # short rows share a program up to so many values


@triton.jit(do_not_specialize=["num_rows"])
def _norm(
    x, residual, weight, bias, out, total, num_rows, x_stride, residual_stride, eps,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    CENTRED: tl.constexpr, ADD: tl.constexpr, HAS_BIAS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Norm of ROWS rows of DIM values; with ADD of x + residual, which is written to ``total``. A token has HEADS rows."""
    let_next_start(EARLY)
    columns = tl.arange(0, BLOCK)
    inside = columns < DIM
    scale = tl.load(weight + columns, mask=inside, other=0.0)
    if HAS_BIAS:
        shift = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    keep = (rows < num_rows)[:, None] & inside[None, :]
    at = (rows // HEADS).to(tl.int64) * x_stride + (rows % HEADS) * DIM
    out_at = rows.to(tl.int64)[:, None] * DIM + columns[None, :]
    wait_for_previous(EARLY)
    value = tl.load(x + at[:, None] + columns[None, :], mask=keep, other=0.0)  # [ROWS, BLOCK]
    if ADD:
        other_at = (rows // HEADS).to(tl.int64) * residual_stride + (rows % HEADS) * DIM
        other = tl.load(residual + other_at[:, None] + columns[None, :], mask=keep, other=0.0)
        value = (value.to(tl.float32) + other.to(tl.float32)).to(value.dtype)  # rounded: the next layer's residual is normed
        tl.store(total + out_at, value, mask=keep)
    wide = value.to(tl.float32)
    if CENTRED:
        wide = tl.where(inside[None, :], wide - (tl.sum(wide, 1) / DIM)[:, None], 0.0)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, 1) / DIM + eps)[:, None]
    if CENTRED:
        normed = normed * scale.to(tl.float32)[None, :]
        if HAS_BIAS:
            normed = normed + shift[None, :]
    else:
        normed = normed.to(value.dtype).to(tl.float32) * scale.to(tl.float32)[None, :]
    tl.store(out + out_at, normed.to(value.dtype), mask=keep)


@triton.jit
def _activation(
    x, out, x_stride, DIM: tl.constexpr, BLOCK: tl.constexpr, BEND: tl.constexpr, GATED: tl.constexpr, EARLY: tl.constexpr
):
    """BLOCK values of one row: bend(x), or with GATED bend(x[:DIM]) * x[DIM:]."""
    let_next_start(EARLY)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < DIM
    x += row * x_stride
    wait_for_previous(EARLY)
    value = tl.load(x + columns, mask=inside, other=0.0)
    if GATED:
        up = tl.load(x + DIM + columns, mask=inside, other=0.0)
    bent = bend(value.to(tl.float32), BEND).to(value.dtype)
    if GATED:
        bent = (bent.to(tl.float32) * up.to(tl.float32)).to(value.dtype)
    tl.store(out + row * DIM + columns, bent, mask=inside)


@triton.jit
def _gather(ids, table, scales, out, DIM: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr, EARLY: tl.constexpr):
    """BLOCK values of the row of ``table`` that one id names; with SCALED times the row's scale."""
    let_next_start(EARLY)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < DIM
    wait_for_previous(EARLY)
    taken = tl.load(ids + row).to(tl.int64)
    value = tl.load(table + taken * DIM + columns, mask=inside, other=0)
    if SCALED:
        value = value.to(tl.float32) * tl.load(scales + taken)
    tl.store(out + row * DIM + columns, value.to(out.dtype.element_ty), mask=inside)


class Elementwise:
    """The elementwise ops of ``Ops``. Holds nothing that changes."""

    def __init__(self, chip: Chip) -> None:
        self._launch, self._early, self._options = chip.launch, chip.early_launch, chip.launch_options

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See ``reference.rms_norm``."""
        return self._normed(x, weight, None, eps, centred=False)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        """See ``reference.layer_norm``."""
        return self._normed(x, weight, bias, eps, centred=True)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See ``reference.add_rms_norm``."""
        return self._added(x, residual, weight, None, eps, centred=False)

    def add_layer_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        """See ``reference.add_layer_norm``."""
        return self._added(x, residual, weight, bias, eps, centred=True)

    def activation(self, x: Tensor, name: str) -> Tensor:
        """See ``reference.activation``."""
        x, num_heads, dim, stride = _by_token(x)
        out = x.new_empty(x.shape)
        self._bent(x, out, (x.shape[0], num_heads * dim, stride), name, gated=False)
        return out

    def gated_activation(self, x: Tensor, name: str) -> Tensor:
        """See ``reference.gated_activation``."""
        x, _, both, stride = _by_token(x)
        out = x.new_empty((x.shape[0], both // 2))
        self._bent(x, out, (x.shape[0], both // 2, stride), name, gated=True)
        return out

    def embedding(self, ids: Tensor, table: Tensor) -> Tensor:
        """See ``reference.embedding``."""
        return self._gathered(ids, table, None, table.dtype)

    def lookup(self, ids: Tensor, matrix: Matrix, dtype: torch.dtype) -> Tensor:
        """See ``reference.lookup``; ``matrix.values`` as ``reference.pack`` leaves them, [num_out, num_in]."""
        return self._gathered(ids, matrix.values, matrix.scales, matrix.values.dtype if matrix.scales is None else dtype)

    def _normed(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, centred: bool) -> Tensor:
        """A norm alone."""
        x, num_heads, dim, stride = _by_token(x)
        out = x.new_empty(x.shape)
        num_rows = x.shape[0] * num_heads
        block, rows, warps = _layout(dim)
        if num_rows:
            self._launch(
                _norm, (triton.cdiv(num_rows, rows),),
                x, x, weight, bias, out, out, num_rows, stride, stride, eps, num_heads, dim, block, rows,
                centred, False, bias is not None, self._early, num_warps=warps, **self._options,
            )  # fmt: skip
        return out

    def _added(
        self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, centred: bool
    ) -> tuple[Tensor, Tensor]:
        """A norm of a sum, and the sum."""
        x, num_heads, dim, stride = _by_token(x)
        residual, _, _, residual_stride = _by_token(residual)
        out, total = x.new_empty(x.shape), x.new_empty(x.shape)
        num_rows = x.shape[0] * num_heads
        block, rows, warps = _layout(dim)
        if num_rows:
            self._launch(
                _norm, (triton.cdiv(num_rows, rows),),
                x, residual, weight, bias, out, total, num_rows, stride, residual_stride, eps, num_heads, dim, block, rows,
                centred, True, bias is not None, self._early, num_warps=warps, **self._options,
            )  # fmt: skip
        return out, total

    def _bent(self, x: Tensor, out: Tensor, shape: tuple[int, int, int], name: str, *, gated: bool) -> None:
        """An activation of rows; ``shape``: how many, their width in ``out``, the distance between them in ``x``."""
        num_rows, dim, stride = shape
        if num_rows:
            grid = (num_rows, triton.cdiv(dim, _ROW_VALUES))
            self._launch(
                _activation, grid, x, out, stride, dim, _ROW_VALUES, name, gated, self._early,
                num_warps=4, **self._options,
            )  # fmt: skip

    def _gathered(self, ids: Tensor, table: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Rows of ``table``."""
        num_rows, dim = ids.shape[0], table.shape[1]
        out = torch.empty((num_rows, dim), dtype=dtype, device=table.device)
        if num_rows:
            grid = (num_rows, triton.cdiv(dim, _ROW_VALUES))
            scaled = scales is not None
            self._launch(
                _gather, grid, ids, table, scales, out, dim, _ROW_VALUES, scaled, self._early, num_warps=4, **self._options
            )
        return out


def _layout(dim: int) -> tuple[int, int, int]:
    """How rows of ``dim`` values lie over a program: the power of two that holds a row, rows, warps."""
    block = triton.next_power_of_2(dim)
    rows = max(1, _SHARED_VALUES // block)
    return block, rows, min(max(block * rows // _WARP_VALUES, 1), _MAX_WARPS)


def _by_token(x: Tensor) -> tuple[Tensor, int, int, int]:
    """``x`` [num_tokens, dim] or [num_tokens, num_heads, dim], as given if a token's values are side by side, else copied.

    With it num_heads (1), dim, and how many values lie from token to token.
    """
    if x.dim() == 3:
        (_, num_heads, dim), (stride, of_heads, of_values) = x.shape, x.stride()
        if of_values == 1 and of_heads == dim:
            return x, num_heads, dim, stride
        return x.contiguous(), num_heads, dim, num_heads * dim
    dim, (stride, of_values) = x.shape[1], x.stride()
    return (x, 1, dim, stride) if of_values == 1 else (x.contiguous(), 1, dim, dim)
