"""Attention over the paged cache: one definition, and two kernels that differ in what they wait for.

Both walk a context in tiles of ``tile_n`` tokens with a softmax that is corrected as larger scores appear
(https://arxiv.org/abs/2205.14135). The query heads that share a KV head stand above each other in the rows of one matrix, next
to the row's other queries: a tile of K and V is read once for all of them, and a tensor core, which has at least 16 rows to
fill, has something to do. Which program does what was dealt out by ``attention_plan.py``.

``_few`` (decodes): each program walks its stretch of all the tiles of the step. Where a stretch ends in the middle of a context
it leaves its sums (maximum, denominator, weighted values) in memory, and whoever of that context comes last puts them
together in the order of positions: which one that is changes nothing in the result. ``_many`` (prompts): a program holds more
queries and walks all that they see, so nothing is put together.

Decodes that begin alike have that beginning walked for all of them (``shared_prefix.py``); ``_few`` goes on from there.

A cache slot that nobody owns may hold anything, NaN too. No kernel reads one: positions past a context's end are replaced by
its last one, and their scores by minus infinity.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minivllm.kernels.triton.attention_sizes import SEES_ALL, Shapes, Sizes, Step, Tiling, padded
from minivllm.kernels.triton.chip import Chip, let_next_start, wait_for_previous
from minivllm.kernels.triton.tiles import add_parts, num_splits, walk


@triton.jit
def _join(first, last, tops, bottoms, totals, TILE_M: tl.constexpr, USED: tl.constexpr, DIM_PAD: tl.constexpr,
          AT_ONCE: tl.constexpr):  # fmt: skip
    """What programs ``first`` to ``last`` left of one context, put together in their order: [USED, DIM_PAD]."""
    used = tl.arange(0, USED)
    top = tl.full((USED,), float("-inf"), tl.float32)
    bottom, total = tl.zeros((USED,), tl.float32), tl.zeros((USED, DIM_PAD), tl.float32)
    for program in range(first, last + 1, AT_ONCE):
        programs = program + tl.arange(0, AT_ONCE)
        theirs = programs <= last
        place = (2 * programs + tl.where(programs == first, 1, 0))[:, None] * TILE_M + used[None, :]  # [AT_ONCE, USED]
        mask = theirs[:, None] & (used[None, :] < USED)
        top, bottom, total = add_parts(top, bottom, total, place, mask, tops, bottoms, totals, DIM_PAD)
    return total / bottom[:, None]


@triton.jit
def _hand_over(out, counters, tops, bottoms, totals, top, bottom, total, program, first, last, skipped, count, token, head,
               HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PAD: tl.constexpr, TILE_M: tl.constexpr,
               USED: tl.constexpr, AT_ONCE: tl.constexpr):  # fmt: skip
    """Leave a part of a context that programs ``first`` to ``last`` share; if all the others have, put them together."""
    m, used, channel = tl.arange(0, TILE_M), tl.arange(0, USED), tl.arange(0, DIM_PAD)
    place = (2 * program + tl.where(skipped == 0, 1, 0)) * TILE_M + m
    tl.store(tops + place, top, mask=m < USED)
    tl.store(bottoms + place, bottom, mask=m < USED)
    tl.store(totals + place[:, None] * DIM_PAD + channel[None, :], total, mask=(m < USED)[:, None])
    tl.debug_barrier()  # every thread's part is on its way before the count says so
    if tl.atomic_add(counters + first, 1, sem="acq_rel") == last - first:
        tl.store(counters + first, 0)  # for the next layer
        joined = _join(first, last, tops, bottoms, totals, TILE_M, USED, DIM_PAD, AT_ONCE)
        at_out = ((token + used // GROUP) * HEADS + head * GROUP + used % GROUP)[:, None] * HEAD_DIM + channel[None, :]
        mask = (used < count * GROUP)[:, None] & (channel < HEAD_DIM)[None, :]
        tl.store(out + at_out, joined.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _begun(seat, head, num_items, tops, bottoms, totals, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, TILE_M: tl.constexpr,
           DIM_PAD: tl.constexpr, SHARED_M: tl.constexpr, SHARED_PROGRAMS: tl.constexpr):  # fmt: skip
    """What the pass over common beginnings found for the row in ``seat``: maximum, denominator, weighted values."""
    SHARED_ROWS: tl.constexpr = SHARED_M // GROUP
    m, channel = tl.arange(0, TILE_M), tl.arange(0, DIM_PAD)
    top = tl.full((TILE_M,), float("-inf"), tl.float32)
    bottom, total = tl.zeros((TILE_M,), tl.float32), tl.zeros((TILE_M, DIM_PAD), tl.float32)
    splits = num_splits(num_items, KV_HEADS, SHARED_PROGRAMS)
    first = (seat // SHARED_ROWS * KV_HEADS + head) * splits
    for split in range(0, splits):
        place = (first + split) * SHARED_M + seat % SHARED_ROWS * GROUP + m  # [TILE_M]
        part_top = tl.load(tops + place, mask=m < GROUP, other=float("-inf"))
        part_bottom = tl.load(bottoms + place, mask=m < GROUP, other=0.0)
        part_total = tl.load(totals + place[:, None] * DIM_PAD + channel[None, :], mask=(m < GROUP)[:, None], other=0.0)
        higher = tl.maximum(top, part_top)
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        weight, fade = tl.exp2(part_top - safe), tl.exp2(top - safe)
        bottom = bottom * fade + weight * part_bottom
        total = total * fade[:, None] + weight[:, None] * part_total
        top = higher
    return top, bottom, total


@triton.jit(do_not_specialize=["num_rows", "window"])
def _few(q, out, k_cache, v_cache, block_tables, table_stride, rows, context_lens, first_query, num_queries,
         share_starts, share_rows, counters, tops, bottoms, totals,
         seats, shared_items, shared_tops, shared_bottoms, shared_totals, scale, num_rows, window,
         HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr,
         TILE_M: tl.constexpr, TILE_N: tl.constexpr, USED: tl.constexpr, AT_ONCE: tl.constexpr, LEAST_TILES: tl.constexpr,
         SHARED_M: tl.constexpr, SHARED_PROGRAMS: tl.constexpr, SOFT_CAP: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """One program's stretch of the tiles of all rows with few queries, in the order (row, KV head, position)."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    let_next_start(EARLY)
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    # The kernel in front is the one that wrote the step's K and V (``turn.py``), or the pass over common beginnings. It lets
    # this one start after its own wait, so whatever came before it has ended: plan and block tables are read without waiting.
    all_tiles = tl.load(share_starts + num_rows) * KV_HEADS
    share = tl.maximum((all_tiles + num_programs - 1) // num_programs, LEAST_TILES)
    here = program * share
    stop = tl.minimum(here + share, all_tiles)
    row = tl.load(share_rows + program)
    m, channel = tl.arange(0, TILE_M), tl.arange(0, DIM_PAD)
    while here < stop:
        starts = tl.load(share_starts + row)
        tiles = tl.load(share_starts + row + 1) - starts
        if tiles == 0:
            row += 1
        else:
            head = (here - starts * KV_HEADS) // tiles
            begin = starts * KV_HEADS + head * tiles  # of this row and head
            skipped = here - begin
            end = tl.minimum(begin + tiles, stop)
            context, count = tl.load(context_lens + row), tl.load(num_queries + row)
            lowest = tl.maximum(context - count - window + 1, 0) // TILE_N
            if SHARED_M > 0:
                seat = tl.load(seats + row)
                begun = tl.load(shared_items + 5 + seat // (SHARED_M // GROUP) * 3, mask=seat >= 0, other=0)
                lowest = begun // TILE_N
            table = block_tables + tl.load(rows + row).to(tl.int64) * table_stride
            token = tl.load(first_query + row).to(tl.int64)
            wait_for_previous(EARLY)
            at_q = ((token + m // GROUP) * HEADS + head * GROUP + m % GROUP)[:, None] * HEAD_DIM + channel[None, :]
            asked = (m < count * GROUP)[:, None] & (channel < HEAD_DIM)[None, :]
            tile_q = tl.load(q + at_q, mask=asked, other=0.0)
            top = tl.full((TILE_M,), float("-inf"), tl.float32)
            bottom, total = tl.zeros((TILE_M,), tl.float32), tl.zeros((TILE_M, DIM_PAD), tl.float32)
            if SHARED_M > 0:  # noqa: SIM102 (decided by the compiler, and the inner one by the chip)
                if (seat >= 0) & (skipped == 0):
                    top, bottom, total = _begun(
                        seat, head, tl.load(shared_items), shared_tops, shared_bottoms, shared_totals,
                        KV_HEADS, GROUP, TILE_M, DIM_PAD, SHARED_M, SHARED_PROGRAMS)  # fmt: skip
            top, bottom, total = walk(
                tile_q, context - count + m // GROUP, lowest + skipped, lowest + end - begin, context, window, head, table,
                k_cache, v_cache, top, bottom, total, scale,
                KV_HEADS, HEAD_DIM, DIM_PAD, BLOCK_SIZE, TILE_N, True, SOFT_CAP)  # fmt: skip
            first, last = begin // share, (begin + tiles - 1) // share  # the programs that share this row and head
            if first == last:
                tl.store(out + at_q, (total / bottom[:, None]).to(out.dtype.element_ty), mask=asked)
            else:
                _hand_over(
                    out, counters, tops, bottoms, totals, top, bottom, total, program, first, last, skipped, count, token, head,
                    HEADS, GROUP, HEAD_DIM, DIM_PAD, TILE_M, USED, AT_ONCE)  # fmt: skip
            here = end
            if end == starts * KV_HEADS + tiles * KV_HEADS:
                row += 1
    wait_for_previous(EARLY)  # those without work too


@triton.jit(do_not_specialize=["num_rows", "window"])
def _many(q, out, k_cache, v_cache, block_tables, table_stride, rows, context_lens, first_query, num_queries,
          item_starts, scale, num_rows, window,
          HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr,
          TILE_M: tl.constexpr, TILE_N: tl.constexpr, MASKED: tl.constexpr, SOFT_CAP: tl.constexpr,
          EARLY: tl.constexpr):  # fmt: skip
    """Some neighbouring queries of one row, one KV head. ``MASKED``: one loop for all tiles, with or without hidden ones."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    QUERIES: tl.constexpr = TILE_M // GROUP
    let_next_start(EARLY)
    head, item = tl.program_id(0) % KV_HEADS, tl.program_id(0) // KV_HEADS
    rows_before = 0
    for some in range(0, num_rows, 256):
        row_at = some + tl.arange(0, 256)
        up_to = tl.load(item_starts + 1 + row_at, mask=row_at < num_rows, other=1 << 30)
        rows_before += tl.sum(tl.where(up_to <= item, 1, 0), 0)
    wait_for_previous(EARLY)
    if rows_before < num_rows:
        row = rows_before
        up_to = tl.load(item_starts + row + 1)
        tile_of_row = up_to - 1 - item  # the last queries first: they see the most, and short work fills the end
        context, count = tl.load(context_lens + row), tl.load(num_queries + row)
        table = block_tables + tl.load(rows + row).to(tl.int64) * table_stride
        token = tl.load(first_query + row).to(tl.int64)
        m, channel = tl.arange(0, TILE_M), tl.arange(0, DIM_PAD)
        query = tile_of_row * QUERIES + m // GROUP
        at_q = ((token + query) * HEADS + head * GROUP + m % GROUP)[:, None] * HEAD_DIM + channel[None, :]
        asked = ((query < count) & (m < QUERIES * GROUP))[:, None] & (channel < HEAD_DIM)[None, :]
        tile_q = tl.load(q + at_q, mask=asked, other=0.0)
        top = tl.full((TILE_M,), float("-inf"), tl.float32)
        bottom, total = tl.zeros((TILE_M,), tl.float32), tl.zeros((TILE_M, DIM_PAD), tl.float32)
        first_at = context - count + tile_of_row * QUERIES
        lo = tl.maximum(first_at - window + 1, 0) // TILE_N
        hi = (tl.minimum(first_at + QUERIES, context) - 1) // TILE_N + 1
        query_at = context - count + query
        if not MASKED:  # of most tiles every query sees every key
            seen_by_all = (first_at + 1) // TILE_N
            top, bottom, total = walk(
                tile_q, query_at, lo, seen_by_all, context, window, head, table, k_cache, v_cache, top, bottom, total, scale,
                KV_HEADS, HEAD_DIM, DIM_PAD, BLOCK_SIZE, TILE_N, False, SOFT_CAP)  # fmt: skip
            lo = seen_by_all
        top, bottom, total = walk(
            tile_q, query_at, lo, hi, context, window, head, table, k_cache, v_cache, top, bottom, total, scale,
            KV_HEADS, HEAD_DIM, DIM_PAD, BLOCK_SIZE, TILE_N, True, SOFT_CAP)  # fmt: skip
        tl.store(out + at_q, (total / bottom[:, None]).to(out.dtype.element_ty), mask=asked)


class PagedAttention:
    """Both kernels, for layers of one size. Only they write its workspace, which means nothing between launches."""

    def __init__(self, chip: Chip, sizes: Sizes, shapes: Shapes, device: torch.device) -> None:
        group = sizes.num_heads // sizes.num_kv_heads
        few, many = shapes.few, shapes.many
        num_programs = chip.num_sms * shapes.programs_per_sm
        few_queries = 0 if shapes.invariant else few.tile_m // group
        least_tiles = max(1, 128 // few.tile_n)
        shared_rows = 0 if shapes.invariant else shapes.shared.tile_m // group
        shared_grain = max(few.tile_n, shapes.shared.tile_n)
        self.tiling = Tiling(
            num_programs, few_queries, few.tile_n, least_tiles, many.tile_m // group, shared_rows, shared_grain
        )
        self.sizes, self.shapes, self._least_tiles = sizes, shapes, least_tiles
        self._dim_pad, self._group = padded(sizes.head_dim), group
        self._launch, self._early = chip.launch, chip.early_launch
        self._few_options = {"num_warps": few.num_warps, "num_stages": few.num_stages, **chip.launch_options}
        self._many_options = {"num_warps": many.num_warps, "num_stages": many.num_stages, **chip.launch_options}
        places = 0 if shapes.invariant else 2 * num_programs * few.tile_m  # a stretch has two ends that another may go on from
        self._tops, self._bottoms = (torch.empty(places, dtype=torch.float32, device=device) for _ in range(2))
        self._totals = torch.empty(places * self._dim_pad, dtype=torch.float32, device=device)
        self._counters = torch.zeros(num_programs, dtype=torch.int32, device=device)  # 0 between launches

    def few(self, step: Step, q: Tensor, out: Tensor, caches: tuple[Tensor, Tensor], scale: float, window: int) -> None:
        """Fill ``out`` [num_tokens, num_heads, head_dim], like ``q``, for the rows with few queries. A step's common
        beginnings must have been walked before."""
        sizes, shape, parts = self.sizes, self.shapes.few, step.parts[window]
        shared = step.shared if window == SEES_ALL else None
        begun, shared_m, shared_programs = (parts.first_query,) * 2 + (self._tops,) * 3, 0, 0
        if shared is not None:
            begun = (shared.items.seats, shared.items.items, shared.tops, shared.bottoms, shared.totals)
            shared_m, shared_programs = self.shapes.shared.tile_m, shared.num_programs
        used = padded(self._group) if step.single else shape.tile_m  # rows of a tile that can hold a query
        self._launch(
            _few, (self.tiling.num_programs,),
            q, out, *caches, step.block_tables, step.block_tables.stride(0), step.rows, step.context_lens,
            parts.first_query, parts.num_queries, parts.share_starts, parts.share_rows,
            self._counters, self._tops, self._bottoms, self._totals, *begun, scale * sizes.factor, step.rows.shape[0], window,
            sizes.num_heads, sizes.num_kv_heads, sizes.head_dim, self._dim_pad, caches[0].shape[2],
            shape.tile_m, shape.tile_n, used, max(1, 4096 // (used * self._dim_pad)), self._least_tiles,
            shared_m, shared_programs, sizes.soft_cap, self._early, **self._few_options,
        )  # fmt: skip

    def many(self, step: Step, q: Tensor, out: Tensor, caches: tuple[Tensor, Tensor], scale: float, window: int) -> None:
        """The same for the other rows."""
        sizes, shape, parts = self.sizes, self.shapes.many, step.parts[window]
        num_items = q.shape[0] // self.tiling.item_queries + min(q.shape[0], step.rows.shape[0])  # at most
        self._launch(
            _many, (num_items * sizes.num_kv_heads,),
            q, out, *caches, step.block_tables, step.block_tables.stride(0), step.rows, step.context_lens,
            parts.first_query, parts.num_queries, parts.item_starts, scale * sizes.factor, step.rows.shape[0], window,
            sizes.num_heads, sizes.num_kv_heads, sizes.head_dim, self._dim_pad, caches[0].shape[2],
            shape.tile_m, shape.tile_n, self.shapes.invariant or window != SEES_ALL, sizes.soft_cap,
            self._early, **self._many_options,
        )  # fmt: skip
