"""Matrix products of few rows: as fast as the weights can be read.

With one row, every weight is read once and used once: y = x W^T is a walk through memory, and the arithmetic is free. To read
at full speed an H100 needs some 3 MiB of reads under way at all times (3 TB/s times a microsecond until data arrives), which is
24 KiB for each of its 132 multiprocessors. Everything here serves that:

* *Small tiles of outputs*, so that there are programs for every multiprocessor, each with a long run of every row of weights.
* *Split-K* where there are too few outputs: some programs share the inputs of a tile. Their partial sums are added by the last
  to arrive, always in the same order, so that a result does not depend on who came last.
* *Reads in flight*: the ``dot`` kernel has several stages of asynchronous copies into shared memory under way; the ``vector``
  kernel, for one and two rows, holds the next tile in registers and needs no tensor cores.
* *Weights before the wait*: no kernel of a step writes weights. A program that was launched early (``chip.py``) has its first
  weights fetched while the kernel in front still runs.

A gated pair (gate above up in one matrix) is two such walks at once; activation and product are done before the sums leave the
registers. Which kernel serves a shape, and with what sizes, is looked up once per shape (``kernels/choices.py``); beyond 128
rows, and where it is as fast, the library's product serves.

One stream at a time: the counters of who has arrived belong to the instance. Each launch leaves them at zero.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from minivllm.kernels import reference
from minivllm.kernels.choices import LIBRARY, ROW_BUCKETS, ChoiceTable, ProductChoice, ProductKey, bucket_of
from minivllm.kernels.matrix import Matrix
from minivllm.kernels.triton.bend import bend
from minivllm.kernels.triton.chip import Chip, let_next_start, wait_for_previous

MAX_ROWS = ROW_BUCKETS[-1]
NUM_COUNTERS = 16384  # tiles of a split product at most
BUFFERS_BYTES = 100 * 1024  # shared memory of a program, so that two fit in a multiprocessor
BUCKET_OF = tuple(bucket_of(num_rows) for num_rows in range(MAX_ROWS + 1))


@triton.jit
def write_outputs(sums, up, rows, outs, num_rows, bias_ptr, out_ptr, N: tl.constexpr, BEND: tl.constexpr):
    """Add the bias to ``sums`` [rows, outs] float32, gate ``up`` if there is a ``BEND``, round and store in [num_rows, N]."""
    dtype = out_ptr.dtype.element_ty
    inside = outs < N
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + outs, mask=inside, other=0.0).to(tl.float32)[None, :]
    if BEND != "":
        if bias_ptr is not None:
            up += tl.load(bias_ptr + N + outs, mask=inside, other=0.0).to(tl.float32)[None, :]
        # Rounded where a linear, an activation and a product in a row would round.
        gate = bend(sums.to(dtype).to(tl.float32), BEND).to(dtype).to(tl.float32)
        sums = gate * up.to(dtype).to(tl.float32)
    where = rows.to(tl.int64)[:, None] * N + outs[None, :]
    tl.store(out_ptr + where, sums.to(dtype), mask=(rows < num_rows)[:, None] & inside[None, :])


@triton.jit
def _fetch_ahead(weights, K: tl.constexpr, BLOCK_N: tl.constexpr, AHEAD: tl.constexpr):
    """Have ``AHEAD`` inputs of ``BLOCK_N`` rows, from ``weights`` on, brought into the L2 cache; waits for nothing."""
    THREADS: tl.constexpr = tl.extra.cuda.num_threads()
    PIECES: tl.constexpr = THREADS // BLOCK_N if THREADS > BLOCK_N and AHEAD % (8 * (THREADS // BLOCK_N)) == 0 else 1
    PIECE: tl.constexpr = AHEAD // PIECES
    BYTES: tl.constexpr = PIECE * weights.dtype.element_ty.primitive_bitwidth // 8
    piece = tl.arange(0, BLOCK_N * PIECES)  # one a thread
    start = weights + (piece // PIECES) * K + (piece % PIECES) * PIECE
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
        "=r,l,r",
        [start.to(tl.int64, bitcast=True), tl.full([BLOCK_N * PIECES], BYTES, tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _finish(
    sums, up, rows, outs, num_rows, bias_ptr, out_ptr, partial_ptr, counter_ptr,
    N: tl.constexpr, BEND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Write a tile's sums; of a split product, leave them for the last of the tile's programs, which adds and writes all."""
    if SPLIT == 1:
        write_outputs(sums, up, rows, outs, num_rows, bias_ptr, out_ptr, N, BEND)
    else:
        HALVES: tl.constexpr = 1 if BEND == "" else 2
        mask = (rows < num_rows)[:, None] & (outs < N)[None, :]
        mine = partial_ptr + rows[:, None] * N + outs[None, :]  # partial sums are [SPLIT, HALVES, BLOCK_M, N] float32
        part = tl.program_id(1)
        tl.store(mine + part * (HALVES * BLOCK_M * N), sums, mask=mask)
        if HALVES == 2:
            tl.store(mine + part * (HALVES * BLOCK_M * N) + BLOCK_M * N, up, mask=mask)
        tl.debug_barrier()  # every thread has stored before one of them says so
        arrived = tl.atomic_add(counter_ptr + tl.program_id(0), 1, sem="acq_rel", scope="gpu")
        if arrived == SPLIT - 1:
            total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            total_up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for other in tl.static_range(SPLIT):
                theirs = mine + other * (HALVES * BLOCK_M * N)
                total += tl.load(theirs, mask=mask, other=0.0, cache_modifier=".cg")
                if HALVES == 2:
                    total_up += tl.load(theirs + BLOCK_M * N, mask=mask, other=0.0, cache_modifier=".cg")
            write_outputs(total, total_up, rows, outs, num_rows, bias_ptr, out_ptr, N, BEND)
            tl.store(counter_ptr + tl.program_id(0), 0)


@triton.jit(do_not_specialize=["num_rows"])
def dot_kernel(
    x_ptr, x_stride, weight_ptr, bias_ptr, out_ptr, partial_ptr, counter_ptr, num_rows,
    N: tl.constexpr, K: tl.constexpr, BEND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, AHEAD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A tile [BLOCK_M, BLOCK_N] of the outputs with tensor cores, over this program's share of the inputs."""
    STEPS: tl.constexpr = (K + BLOCK_K * SPLIT - 1) // (BLOCK_K * SPLIT)
    EVEN: tl.constexpr = K % (BLOCK_K * SPLIT) == 0
    outs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * (STEPS * BLOCK_K)
    if EARLY and AHEAD > 0 and EVEN and N % BLOCK_N == 0:
        corner = weight_ptr + (tl.program_id(0) * BLOCK_N).to(tl.int64) * K + first
        _fetch_ahead(corner, K, BLOCK_N, AHEAD)
        if BEND != "":
            _fetch_ahead(corner + N * K, K, BLOCK_N, AHEAD)
    let_next_start(EARLY)
    wait_for_previous(EARLY)
    inputs = first + tl.arange(0, BLOCK_K)
    rows = tl.arange(0, BLOCK_M)
    live = (rows < num_rows)[:, None]
    xs = x_ptr + rows.to(tl.int64)[:, None] * x_stride + inputs[None, :]  # [BLOCK_M, BLOCK_K]
    # Outputs beyond the last are computed as the last once more, and not stored.
    weights = weight_ptr + tl.minimum(outs, N - 1).to(tl.int64)[None, :] * K + inputs[:, None]  # [BLOCK_K, BLOCK_N]
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(STEPS):
        if EVEN:
            x = tl.load(xs, mask=live, other=0.0)
            weight = tl.load(weights, eviction_policy="evict_first")
            if BEND != "":
                weight_up = tl.load(weights + N * K, eviction_policy="evict_first")
        else:
            left = K - step * BLOCK_K
            x = tl.load(xs, mask=live & (inputs < left)[None, :], other=0.0)
            weight = tl.load(weights, mask=(inputs < left)[:, None], other=0.0)
            if BEND != "":
                weight_up = tl.load(weights + N * K, mask=(inputs < left)[:, None], other=0.0)
        sums = tl.dot(x, weight, sums, input_precision="ieee")
        if BEND != "":
            up = tl.dot(x, weight_up, up, input_precision="ieee")
        xs += BLOCK_K
        weights += BLOCK_K
    _finish(sums, up, rows, outs, num_rows, bias_ptr, out_ptr, partial_ptr, counter_ptr, N, BEND, BLOCK_M, BLOCK_N, SPLIT)


@triton.jit
def _read(pointers, inputs, wanted, K: tl.constexpr, EVEN: tl.constexpr, POLICY: tl.constexpr):
    """Values of some inputs, zero beyond the last of them; if they are ``wanted`` at all."""
    return tl.load(pointers, mask=wanted if EVEN else wanted & (inputs < K), other=0.0, eviction_policy=POLICY)


@triton.jit(do_not_specialize=["num_rows"])
def vector_kernel(
    x_ptr, x_stride, weight_ptr, bias_ptr, out_ptr, partial_ptr, counter_ptr, num_rows,
    N: tl.constexpr, K: tl.constexpr, BEND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, AHEAD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """``BLOCK_N`` outputs of one or two rows (``BLOCK_M``) by multiplying and adding, the next weights always being read."""
    STEPS: tl.constexpr = (K + BLOCK_K * SPLIT - 1) // (BLOCK_K * SPLIT)
    EVEN: tl.constexpr = K % (BLOCK_K * SPLIT) == 0
    tl.static_assert(BLOCK_M <= 2)
    outs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * (STEPS * BLOCK_K)
    at = first + tl.arange(0, BLOCK_K)
    at_weights = at[None, :]
    weights = weight_ptr + tl.minimum(outs, N - 1).to(tl.int64)[:, None] * K + at_weights  # [BLOCK_N, BLOCK_K]
    weight = _read(weights, at_weights, True, K, EVEN, "evict_first")
    weight_up = weight
    if BEND != "":
        weight_up = _read(weights + N * K, at_weights, True, K, EVEN, "evict_first")
    if EARLY and AHEAD > 0 and EVEN and N % BLOCK_N == 0:
        corner = weight_ptr + (tl.program_id(0) * BLOCK_N).to(tl.int64) * K + first
        _fetch_ahead(corner, K, BLOCK_N, AHEAD)
        if BEND != "":
            _fetch_ahead(corner + N * K, K, BLOCK_N, AHEAD)
    let_next_start(EARLY)
    wait_for_previous(EARLY)
    xs = x_ptr + at
    seconds = xs + tl.minimum(num_rows - 1, 1) * x_stride  # the second row; where there is but one, that
    x, second = _read(xs, at, True, K, EVEN, ""), _read(seconds, at, True, K, EVEN, "")
    # [BLOCK_N, BLOCK_K] for each row of x, gate and up: added over the inputs only at the end. What is unused costs nothing.
    sums = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    sums_up, sums_second, sums_second_up = sums, sums, sums
    for step in range(STEPS):
        more = step + 1 < STEPS
        offset = (step + 1) * BLOCK_K
        next_weight = _read(weights + offset, at_weights + offset, more, K, EVEN, "evict_first")
        next_x = _read(xs + offset, at + offset, more, K, EVEN, "")
        next_up, next_second = next_weight, next_x
        if BEND != "":
            next_up = _read(weights + N * K + offset, at_weights + offset, more, K, EVEN, "evict_first")
        sums += weight.to(tl.float32) * x.to(tl.float32)[None, :]
        if BEND != "":
            sums_up += weight_up.to(tl.float32) * x.to(tl.float32)[None, :]
        if BLOCK_M == 2:
            next_second = _read(seconds + offset, at + offset, more, K, EVEN, "")
            sums_second += weight.to(tl.float32) * second.to(tl.float32)[None, :]
            if BEND != "":
                sums_second_up += weight_up.to(tl.float32) * second.to(tl.float32)[None, :]
        weight, weight_up, x, second = next_weight, next_up, next_x, next_second
    rows = tl.arange(0, BLOCK_M)
    total = tl.sum(sums, 1)[None, :] + tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = total
    if BEND != "":
        up = tl.sum(sums_up, 1)[None, :] + tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if BLOCK_M == 2:
        total = tl.where(rows[:, None] == 0, total, tl.sum(sums_second, 1)[None, :])
        if BEND != "":
            up = tl.where(rows[:, None] == 0, up, tl.sum(sums_second_up, 1)[None, :])
    _finish(total, up, rows, outs, num_rows, bias_ptr, out_ptr, partial_ptr, counter_ptr, N, BEND, BLOCK_M, BLOCK_N, SPLIT)


@dataclass(frozen=True)
class _Plan:
    """A kernel with all that does not change from call to call."""

    kernel: Any
    grid: tuple[int, int]
    sizes: dict[str, Any]  # keyword arguments: the constants of the kernel, and how to launch it
    num_in: int
    num_out: int  # columns of the result
    partial_shape: tuple[int, ...] | None  # of a split product

    @staticmethod
    def of(chip: Chip, choice: ProductChoice, matrix: Matrix, bend_name: str) -> "_Plan":
        """The plan for ``choice``; with a ``bend_name`` the matrix is a gated pair."""
        num_out, c = matrix.num_out // 2 if bend_name else matrix.num_out, choice
        num_tiles = triton.cdiv(num_out, c.block_n)
        if c.split_k > 1 and num_tiles > NUM_COUNTERS:
            raise ValueError(f"{num_tiles} tiles of a split product need more than {NUM_COUNTERS} counters")
        sizes = {"N": num_out, "K": matrix.num_in, "BEND": bend_name, "BLOCK_M": c.block_m, "BLOCK_N": c.block_n}
        sizes |= {"BLOCK_K": c.block_k, "SPLIT": c.split_k, "AHEAD": c.ahead, "EARLY": chip.early_launch}
        sizes |= {"num_warps": c.warps, "num_stages": c.stages, **chip.launch_options}
        shape = (c.split_k, 2 if bend_name else 1, c.block_m, num_out)
        kernel = {"dot": dot_kernel, "vector": vector_kernel}[c.kernel]
        grid, partial_shape = (num_tiles, c.split_k), shape if c.split_k > 1 else None
        return _Plan(kernel, grid, sizes, matrix.num_in, num_out, partial_shape)


class Products:
    """The products of ``Ops``. Writes its own counters and the plans it has made; a launch leaves the counters as they were."""

    def __init__(
        self,
        chip: Chip,
        table: ChoiceTable,
        gated_activation: Callable[[Tensor, str], Tensor] = reference.gated_activation,
    ) -> None:
        """``gated_activation`` serves behind a gated product of the library."""
        self._chip, self._table, self._gated_activation = chip, table, gated_activation
        self._plans: dict[tuple[str, str, int | None, int, int, torch.dtype], _Plan | None] = {}
        self._counters: Tensor | None = None

    def pack(self, values: Tensor, scales: Tensor | None) -> Matrix:
        """See ``reference.pack``. The matrices of an instance are on one device."""
        if self._counters is None and scales is None:
            self._counters = torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=values.device)
        values = values.contiguous()
        return reference.pack(values.clone() if values.data_ptr() % 16 else values, scales)  # fetching ahead reads in 16 bytes

    def linear(self, x: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
        """See ``reference.linear``."""
        if matrix.scales is not None:
            return reference.linear(x, matrix, bias)
        plan = self._plan_for("linear", "", x, matrix) if x.shape[0] <= MAX_ROWS else None
        return library_product(x, matrix.values, bias) if plan is None else self.run(plan, x, matrix, bias, x.dtype)

    def logits(self, x: Tensor, matrix: Matrix) -> Tensor:
        """See ``reference.logits``; here they are the sums themselves, not rounded to the type of ``x``."""
        if matrix.scales is not None:
            return reference.logits(x, matrix)
        plan = self._plan_for("logits", "", x, matrix) if x.shape[0] <= MAX_ROWS else None
        return wide_product(x, matrix.values) if plan is None else self.run(plan, x, matrix, None, torch.float32)

    def gated_linear(self, x: Tensor, matrix: Matrix, bias: Tensor | None, name: str) -> Tensor:
        """See ``reference.gated_linear``."""
        if matrix.scales is not None:
            return self._gated_activation(reference.linear(x, matrix, bias), name)
        plan = self._plan_for("gated_linear", name, x, matrix) if x.shape[0] <= MAX_ROWS else None
        if plan is None:
            return self._gated_activation(library_product(x, matrix.values, bias), name)
        return self.run(plan, x, matrix, bias, x.dtype)

    def lookup(self, ids: Tensor, matrix: Matrix, dtype: torch.dtype) -> Tensor:
        """See ``reference.lookup``."""
        return reference.lookup(ids, matrix, dtype)

    def plan_as(self, choice: ProductChoice, matrix: Matrix, bend_name: str = "") -> _Plan:
        """What ``choice`` means for ``matrix``, for measuring it."""
        return _Plan.of(self._chip, choice, matrix, bend_name)

    def run(self, plan: _Plan, x: Tensor, matrix: Matrix, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Launch ``plan``: [num_rows, num_out] in ``dtype``."""
        num_rows, num_in = x.shape
        if num_in != plan.num_in or num_in != matrix.num_in:
            raise ValueError(f"x has {num_in} columns, the matrix is [{matrix.num_out}, {matrix.num_in}]")
        if x.stride(1) != 1:
            x = x.contiguous()
        out = torch.empty((num_rows, plan.num_out), dtype=dtype, device=x.device)
        partial = None
        if plan.partial_shape is not None:
            partial = torch.empty(plan.partial_shape, dtype=torch.float32, device=x.device)
        tensors = (matrix.values, bias, out, partial, self._counters)
        self._chip.launch(plan.kernel, plan.grid, x, x.stride(0), *tensors, num_rows, **plan.sizes)
        return out

    def _plan_for(self, op: str, bend_name: str, x: Tensor, matrix: Matrix) -> _Plan | None:
        """The plan for a product of at most ``MAX_ROWS`` rows; None where the library serves."""
        bucket = BUCKET_OF[x.shape[0]]
        key = (op, bend_name, bucket, matrix.num_out, matrix.num_in, x.dtype)
        try:
            return self._plans[key]
        except KeyError:
            plan = self._plans[key] = self._decide(op, bend_name, bucket, x.dtype, matrix)
            return plan

    def _decide(self, op: str, bend_name: str, bucket: int | None, dtype: torch.dtype, matrix: Matrix) -> _Plan | None:
        """Look a product up in the table; ask the rule about one that is not there."""
        if bucket is None:
            return None
        key = ProductKey(op, str(dtype).removeprefix("torch."), matrix.num_out, matrix.num_in, bucket)
        choice = self._table.product(key) or rule(key, self._chip.num_sms)
        return None if choice == LIBRARY else _Plan.of(self._chip, choice, matrix, bend_name)


def library_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """torch's ``x`` times ``weight`` transposed, plus ``bias``."""
    if x.is_meta:  # in a rehearsal; torch would import its compiler to say the same
        return x.new_empty((x.shape[0], weight.shape[0]))
    return F.linear(x, weight, bias)


def wide_product(x: Tensor, weight: Tensor) -> Tensor:
    """The library's ``x`` times ``weight`` transposed, as float32 sums that were never rounded to 16 bits where it has them."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return library_product(x, weight, None).float()


def rule(key: ProductKey, num_sms: int) -> ProductChoice:
    """The choice for what no table lists: our kernels for up to 16 rows of 16-bit numbers in usual sizes, else the library."""
    gated = key.op == "gated_linear"
    num_out = key.num_out // 2 if gated else key.num_out
    if key.dtype not in ("bfloat16", "float16") or key.num_rows > 16 or key.num_in % 256 or num_out % 16:
        return LIBRARY
    block_n = 16
    while block_n < 64 and num_out % (2 * block_n) == 0 and num_out // (2 * block_n) >= 4 * num_sms:
        block_n *= 2
    split_k = 1
    while split_k < 8 and key.num_in % (512 * split_k) == 0 and num_out // block_n * split_k < num_sms:
        split_k *= 2
    stage_bytes = (16 + block_n * (2 if gated else 1)) * 256 * 2
    stages = max(2, min(5, BUFFERS_BYTES // stage_bytes, key.num_in // (256 * split_k) + 1))
    ahead = min(key.num_in // split_k, 32 * 1024 // block_n)
    return ProductChoice("dot", 16, block_n, 256, split_k, 4, stages, ahead)
