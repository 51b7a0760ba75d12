"""A beginning that many decodes have in common, read once for all of them.

Requests behind one system prompt hold the same blocks. A decode has one query for each head, so by itself it reads all of K and
V for a handful of rows of a matrix; 256 decodes read the same two megabytes a layer 256 times. Together they are the rows of a
full matrix: the beginning is read once for each ``shared_rows`` of them, and tensor cores do what they are made for. (The idea
is known as cascade attention: https://flashinfer.ai/2024/02/02/cascade-inference.html.)

What is found (maximum, denominator, weighted values of each query) is left in memory. ``_few`` (``attention.py``) takes it as
the beginning of a row's walk, and goes on with the tokens that are the row's own.

Which rows begin alike is said by the step plan. The host deals them into items; how many programs share the tokens of an item
follows from how many items there are, so that one group fills the chip as well as twenty. The grid is fixed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minivllm.kernels.triton.attention_sizes import SEES_ALL, Shapes, SharedItems, SharedPass, Sizes, Step, padded
from minivllm.kernels.triton.chip import Chip, let_next_start, wait_for_previous
from minivllm.kernels.triton.tiles import num_splits, walk

PROGRAMS_PER_SM = 2


@triton.jit
def _shared(q, k_cache, v_cache, block_tables, table_stride, items, members, first_query, tops, bottoms, totals, scale,
            HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PAD: tl.constexpr,
            BLOCK_SIZE: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, NUM_PROGRAMS: tl.constexpr,
            SEES_ALL: tl.constexpr, SOFT_CAP: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """One program's tiles of one item's beginning and KV head."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    ROWS: tl.constexpr = TILE_M // GROUP
    wait_for_previous(EARLY)
    let_next_start(EARLY)  # only now: the next kernel takes it that what came before this one has ended
    program, num_items = tl.program_id(0), tl.load(items)
    splits = num_splits(num_items, KV_HEADS, NUM_PROGRAMS)
    pair, split = program // splits, program % splits
    item, head = pair // KV_HEADS, pair % KV_HEADS
    if item < num_items:
        table = block_tables + tl.load(items + 4 + item * 3).to(tl.int64) * table_stride
        context, num_rows = tl.load(items + 5 + item * 3), tl.load(items + 6 + item * 3)
        tiles = context // TILE_N
        lo, hi = tiles * split // splits, tiles * (split + 1) // splits
        m, channel = tl.arange(0, TILE_M), tl.arange(0, DIM_PAD)
        real = (m // GROUP < num_rows) & (m < ROWS * GROUP)
        row = tl.load(members + item * ROWS + m // GROUP, mask=real, other=0)
        token = tl.load(first_query + row, mask=real, other=0).to(tl.int64)
        at_q = (token * HEADS + head * GROUP + m % GROUP)[:, None] * HEAD_DIM + channel[None, :]
        tile_q = tl.load(q + at_q, mask=real[:, None] & (channel < HEAD_DIM)[None, :], other=0.0)
        top = tl.full((TILE_M,), float("-inf"), tl.float32)
        bottom, total = tl.zeros((TILE_M,), tl.float32), tl.zeros((TILE_M, DIM_PAD), tl.float32)
        top, bottom, total = walk(
            tile_q, m, lo, hi, context, SEES_ALL, head, table, k_cache, v_cache, top, bottom, total, scale,
            KV_HEADS, HEAD_DIM, DIM_PAD, BLOCK_SIZE, TILE_N, False, SOFT_CAP)  # fmt: skip
        place = program * TILE_M + m
        tl.store(tops + place, top, mask=real)
        tl.store(bottoms + place, bottom, mask=real)
        tl.store(totals + place[:, None] * DIM_PAD + channel[None, :], total, mask=real[:, None])


class PrefixWalk:
    """The pass, for layers of one size. Holds nothing that changes."""

    def __init__(self, chip: Chip, sizes: Sizes, shapes: Shapes) -> None:
        self._sizes, self._shape, self._num_sms = sizes, shapes.shared, chip.num_sms
        self._rows = shapes.shared.tile_m // (sizes.num_heads // sizes.num_kv_heads)
        self._dim_pad = padded(sizes.head_dim)
        self._launch, self._early = chip.launch, chip.early_launch
        self._options = {"num_warps": self._shape.num_warps, "num_stages": self._shape.num_stages, **chip.launch_options}

    def prepare(self, items: SharedItems) -> SharedPass:
        """Room for what a step's passes leave; a layer's means nothing to the next."""
        device, most_items = items.items.device, (items.items.shape[0] - 4) // 3
        num_programs = max(PROGRAMS_PER_SM * self._num_sms, most_items * self._sizes.num_kv_heads)
        places = num_programs * self._shape.tile_m
        members = torch.empty(most_items * self._rows, dtype=torch.int32, device=device)
        tops, bottoms, totals = (torch.empty(places * n, dtype=torch.float32, device=device) for n in (1, 1, self._dim_pad))
        return SharedPass(items, members, num_programs, tops, bottoms, totals)

    def walk(self, step: Step, q: Tensor, caches: tuple[Tensor, Tensor], scale: float) -> None:
        """Walk the common beginnings of a step that has some, for ``q`` [num_tokens, num_heads, head_dim]."""
        if (shared := step.shared) is None:
            raise ValueError("this step has no common beginnings")
        sizes, shape = self._sizes, self._shape
        self._launch(
            _shared, (shared.num_programs,),
            q, *caches, step.block_tables, step.block_tables.stride(0), shared.items.items, shared.members,
            step.parts[SEES_ALL].first_query, shared.tops, shared.bottoms, shared.totals, scale * sizes.factor,
            sizes.num_heads, sizes.num_kv_heads, sizes.head_dim, self._dim_pad, caches[0].shape[2], shape.tile_m, shape.tile_n,
            shared.num_programs, SEES_ALL, sizes.soft_cap, self._early, **self._options,
        )  # fmt: skip
