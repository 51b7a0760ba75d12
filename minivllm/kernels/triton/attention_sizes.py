"""The sizes of the attention kernels, and the records that pass between who plans, who launches and who asks for it.

Kept apart from the kernels: a program that will not use them can ask about them without importing Triton.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SEES_ALL = 1 << 30  # a window that no position reaches
LOG2_E = 1.4426950408889634


def padded(size: int) -> int:
    """The next power of two; tiles come in no other sizes."""
    return 1 << (size - 1).bit_length() if size > 1 else 1


@dataclass(frozen=True)
class Sizes:
    """What a rank's layers have in common."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype  # the wider of q's and the cache's
    soft_cap: float = 0.0  # scores become cap * tanh(score / cap); 0: they do not

    @property
    def factor(self) -> float:
        """What a layer's scale is multiplied by: see ``absorb`` in ``tiles.py``."""
        return 2.0 / self.soft_cap if self.soft_cap > 0 else LOG2_E


@dataclass(frozen=True)
class Shape:
    """How one of the kernels is cut."""

    tile_m: int  # rows of the matrix: queries x heads of a group
    tile_n: int  # tokens of the cache
    num_warps: int
    num_stages: int  # tiles on their way from memory at a time


@dataclass(frozen=True)
class Shapes:
    """How all are cut."""

    few: Shape
    many: Shape
    shared: Shape  # of the pass over a beginning that rows of ``few`` have in common
    programs_per_sm: int  # of ``few``
    invariant: bool  # ``many`` does all, in one way: a query's bits depend on its position alone


def usual_shapes(sizes: Sizes, invariant: bool) -> Shapes:
    """What measured best (``benchmarks/gpu/attention.py``); larger heads and wider types leave less room for tiles."""
    least_m = padded(sizes.num_heads // sizes.num_kv_heads)
    small = padded(sizes.head_dim) <= 128
    if sizes.dtype.itemsize > 2:  # no tensor cores: products are made of registers, and large tiles would not fit into them
        many = Shape(max(16, least_m), 32, 8, 2)
        return Shapes(Shape(max(16, least_m), 32, 4, 2), many, many, 2, invariant)
    few = Shape(max(16, least_m), 128 if small else 32, 4, 2)
    many = Shape(max(128, least_m), 64, 8, 3) if small else Shape(max(128, least_m), 32, 8, 2)
    shared = Shape(max(64, least_m), 64, 4, 3) if small else many
    if invariant:
        fixed = Shape(max(64, least_m), 64 if small else 32, 4, 3 if small else 2)
        return Shapes(few, fixed, shared, 2, invariant)
    return Shapes(few, many, shared, 2, invariant)


@dataclass(frozen=True)
class Tiling:
    """The sizes that a plan and the kernels that follow it share."""

    num_programs: int  # of the kernel for rows with few queries
    few_queries: int  # a row of so many queries or fewer goes to it; 0: none do
    tile_n: int  # tokens of the cache in one of its tiles
    least_tiles: int  # the shortest stretch of a program: shorter ones cost more to put together than they save
    item_queries: int  # queries of an item of the other kernel
    shared_rows: int  # rows with a common beginning in an item of the pass over that; 0: there is no such pass
    shared_grain: int  # tokens: a common beginning is whole multiples of so many


@dataclass(frozen=True)
class SharedItems:
    """Rows with a common beginning, dealt into items of up to ``shared_rows`` rows. On the device, int32 all."""

    seats: Tensor  # [R]: item * shared_rows + place in the item; -1: the row begins like no other
    items: Tensor  # [4 + 3 * most items]: how many there are, 3 unused; row of the block table, tokens, rows of each


@dataclass(frozen=True)
class SharedPass:
    """What the pass over common beginnings reads and leaves. On the device."""

    items: SharedItems
    members: Tensor  # [most items * shared_rows] int32: the step's row in each seat
    num_programs: int
    tops: Tensor  # [num_programs * tile_m] float32: running maxima, as exponents of 2
    bottoms: Tensor  # [num_programs * tile_m] float32: denominators
    totals: Tensor  # [num_programs * tile_m, head_dim padded] float32: weighted values


@dataclass(frozen=True)
class Parts:
    """One step's work under one window, on the device. int32 all; R = rows that the step may have."""

    first_query: Tensor  # [R]: index among the step's tokens
    num_queries: Tensor  # [R]: without those that a library computes
    share_starts: Tensor  # [R + 1]: tiles, of one KV head, of the rows before; the last: of all
    item_starts: Tensor  # [R + 1]: the same in items of the rows with many queries
    share_rows: Tensor  # [num_programs]: row in which a program's stretch begins


@dataclass(frozen=True)
class Step:
    """A planned step, on the device."""

    parts: dict[int, Parts]  # by window
    block_tables: Tensor  # [rows of the runner, max_blocks] int32
    rows: Tensor  # [R] int32: row of the block table
    context_lens: Tensor  # [R] int32
    single: bool  # no row has more than one query
    shared: SharedPass | None = None  # under windows that see everything
