"""Matrix products in which a row's bits do not depend on the other rows: each sum is taken in one order, always.

An output is a sum over the inputs. A library chooses by the number of rows how to take it: which instruction, how many inputs
at a time, split among how many programs. So the same token gives other bits alone than in a batch. Here an output is one chain
of tensor-core instructions of one kind, each adding the next 16 inputs to one float32 sum, from the first input to the last.
Nothing is split, and the chain is a function of (num_in, dtype) alone.

What the number of rows may change is the *size* of a tile: how many outputs a program computes side by side. An output does
not notice that: whether the instruction computes 64 x 32 or 64 x 256 of them, each sum is the same function of its own row and
column (shown on the chip by ``benchmarks/gpu/products.py`` and the tests, bit by bit). Rows beyond the last are zeros and part
of nobody's sum. Large tiles use what was read more often; small ones give every multiprocessor something to do when rows are
few. float32 is no work for tensor cores; it has one tile.

Programs take the tiles in groups of some tiles of rows by all outputs, so that those which run at the same time share what they
read through the L2 cache. The idea and its name: https://thinkingmachines.ai/blog/defeating-nondeterminism-in-llm-inference/
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minivllm.kernels import reference
from minivllm.kernels.matrix import Matrix
from minivllm.kernels.triton.chip import Chip, let_next_start, wait_for_previous
from minivllm.kernels.triton.products import write_outputs


@dataclass(frozen=True)
class Tile:
    """The outputs of a program, and how it goes about them."""

    block_m: int  # rows; 64 of them are one instruction's
    block_n: int  # outputs; of a gated product, gates and ups together
    block_k: int
    warps: int
    stages: int


# From large to small.
TILES = (
    Tile(128, 256, 64, 8, 3),
    Tile(128, 128, 64, 8, 4),
    Tile(64, 128, 64, 4, 4),
    Tile(64, 64, 128, 4, 4),
    Tile(64, 32, 128, 4, 4),
    Tile(64, 16, 256, 4, 4),
)
FLOAT32_TILE = Tile(32, 32, 32, 4, 2)
GROUP_M = 8  # tiles of rows in a group
FILLED = 0.7  # of the chip's multiprocessors must get a tile, or the next smaller tile is taken


def tile_for(num_rows: int, num_out: int, dtype: torch.dtype, *, gated: bool, num_sms: int) -> Tile:
    """The largest tile of which there are enough. ``num_out`` counts gates and ups."""
    if dtype == torch.float32:
        return FLOAT32_TILE
    for tile in TILES:
        if gated and tile.block_n == TILES[-1].block_n:
            break  # half of it would be less than an instruction takes
        if triton.cdiv(num_rows, tile.block_m) * triton.cdiv(num_out, tile.block_n) >= FILLED * num_sms:
            return tile
    return TILES[-2] if gated else TILES[-1]


@triton.jit(do_not_specialize=["num_rows"])
def tiles_kernel(
    x_ptr, x_stride, weight_ptr, bias_ptr, out_ptr, num_rows,
    N: tl.constexpr, K: tl.constexpr, BEND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A tile [BLOCK_M, BLOCK_N] of x [num_rows, K] times weights [N, K] transposed; with ``BEND`` also that of the N below."""
    EVEN: tl.constexpr = K % BLOCK_K == 0
    tiles_n = tl.cdiv(N, BLOCK_N)
    in_group = GROUP * tiles_n
    first_m = tl.program_id(0) // in_group * GROUP
    group_m = tl.minimum(tl.cdiv(num_rows, BLOCK_M) - first_m, GROUP)
    tile_m = first_m + tl.program_id(0) % in_group % group_m
    tile_n = tl.program_id(0) % in_group // group_m
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    outs = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inputs = tl.arange(0, BLOCK_K)
    live = (rows < num_rows)[:, None]
    xs = x_ptr + rows.to(tl.int64)[:, None] * x_stride + inputs[None, :]  # [BLOCK_M, BLOCK_K]
    # Outputs beyond the last are computed as the last once more, and not stored.
    weights = weight_ptr + tl.minimum(outs, N - 1).to(tl.int64)[None, :] * K + inputs[:, None]  # [BLOCK_K, BLOCK_N]
    let_next_start(EARLY)
    wait_for_previous(EARLY)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        left = inputs < K - start
        if EVEN:
            x = tl.load(xs, mask=live, other=0.0)
            weight = tl.load(weights)
            if BEND != "":
                weight_up = tl.load(weights + N * K)
        else:
            x = tl.load(xs, mask=live & left[None, :], other=0.0)
            weight = tl.load(weights, mask=left[:, None], other=0.0)
            if BEND != "":
                weight_up = tl.load(weights + N * K, mask=left[:, None], other=0.0)
        sums = tl.dot(x, weight, sums, input_precision="ieee")
        if BEND != "":
            up = tl.dot(x, weight_up, up, input_precision="ieee")
        xs += BLOCK_K
        weights += BLOCK_K
    write_outputs(sums, up, rows, outs, num_rows, bias_ptr, out_ptr, N, BEND)


class FixedTiles:
    """The products of ``Ops`` for the batch-invariant mode. Writes only what it remembers of its tiles."""

    def __init__(
        self,
        chip: Chip,
        gated_activation: Callable[[Tensor, str], Tensor] = reference.gated_activation,
    ) -> None:
        """``gated_activation`` serves behind a product in int8; a row's result must be its own there too."""
        self._chip, self._gated_activation = chip, gated_activation
        self._sizes: dict[tuple[Tile, int, int, str], dict[str, Any]] = {}

    def linear(self, x: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
        """See ``reference.linear``. int8 needs no tiles: sums are exact, and each row has its own scale."""
        if matrix.scales is not None:
            return reference.linear(x, matrix, bias)
        return self._multiply(x, matrix, bias, x.dtype, "")

    def logits(self, x: Tensor, matrix: Matrix) -> Tensor:
        """See ``reference.logits``; here they are the sums themselves, not rounded to the type of ``x``."""
        if matrix.scales is not None:
            return reference.logits(x, matrix)
        return self._multiply(x, matrix, None, torch.float32, "")

    def gated_linear(self, x: Tensor, matrix: Matrix, bias: Tensor | None, name: str) -> Tensor:
        """See ``reference.gated_linear``."""
        if matrix.scales is not None:
            return self._gated_activation(reference.linear(x, matrix, bias), name)
        return self._multiply(x, matrix, bias, x.dtype, name)

    def multiply_in(self, tile: Tile, x: Tensor, matrix: Matrix, bias: Tensor | None = None, name: str = "") -> Tensor:
        """A product in tiles of a given size, for measuring it and for showing that the size changes no bit."""
        return self._launch(tile, x, matrix, bias, x.dtype, name)

    def _multiply(self, x: Tensor, matrix: Matrix, bias: Tensor | None, dtype: torch.dtype, name: str) -> Tensor:
        """The product in tiles of the size that suits its shape."""
        tile = tile_for(x.shape[0], matrix.num_out, x.dtype, gated=name != "", num_sms=self._chip.num_sms)
        return self._launch(tile, x, matrix, bias, dtype, name)

    def _launch(
        self, tile: Tile, x: Tensor, matrix: Matrix, bias: Tensor | None, dtype: torch.dtype, name: str
    ) -> Tensor:
        """One launch; ``name`` is a gated product's activation."""
        (num_rows, num_in), num_out = x.shape, matrix.num_out // 2 if name else matrix.num_out
        if num_in != matrix.num_in or x.dtype != matrix.values.dtype:
            raise ValueError(f"x {x.dtype} {tuple(x.shape)} does not meet a matrix [{matrix.num_out}, {matrix.num_in}]")
        if x.stride(1) != 1:
            x = x.contiguous()
        out = torch.empty((num_rows, num_out), dtype=dtype, device=x.device)
        if num_rows == 0:
            return out
        key = (tile, num_out, num_in, name)
        sizes = self._sizes.get(key)
        if sizes is None:
            sizes = self._sizes[key] = self._sizes_of(*key, self._most_stages(tile, x))
        grid = (triton.cdiv(num_rows, tile.block_m) * triton.cdiv(num_out, sizes["BLOCK_N"]),)
        self._chip.launch(tiles_kernel, grid, x, x.stride(0), matrix.values, bias, out, num_rows, **sizes)
        return out

    def _sizes_of(self, tile: Tile, num_out: int, num_in: int, name: str, stages: int) -> dict[str, Any]:
        """The kernel's constants, and how to launch it. Half of a gated product's tile are gates."""
        block_n = tile.block_n // 2 if name else tile.block_n
        sizes = {"N": num_out, "K": num_in, "BEND": name, "BLOCK_M": tile.block_m, "BLOCK_N": block_n}
        sizes |= {"BLOCK_K": tile.block_k, "GROUP": GROUP_M, "EARLY": self._chip.early_launch}
        return sizes | {"num_warps": tile.warps, "num_stages": stages, **self._chip.launch_options}

    def _most_stages(self, tile: Tile, x: Tensor) -> int:
        """How many stages of ``tile`` fit in shared memory: smaller chips of a generation have half of the largest's."""
        stage_bytes = (tile.block_m + tile.block_n) * tile.block_k * x.element_size()
        return max(2, min(tile.stages, self._chip.shared_bytes // stage_bytes))
