"""Who computes which part of a step's attention, decided on the device.

The host does not know the contexts of the step it launches (a captured graph is replayed with other ones each time), so the
grids of the attention kernels are fixed and the work is dealt out here, once a step, by one small kernel:

* Rows with few queries (decodes, short drafts) are bound by reading K and V. Their cache is cut into tiles of ``tile_n``
  tokens, all tiles of all rows and KV heads are laid in one line, and each of ``num_programs`` programs gets an equal stretch
  of it. A stretch may begin and end in the middle of a context: no program waits for another's long row, and one row alone
  still fills the chip.
* The other rows are bound by arithmetic. Their queries are cut into items of ``item_queries``, one program each and KV head.
* Leading queries of long prompts that a library computes (``long_prompts.py``) are left out of both.
* A beginning that decodes have in common is computed for all of them by a pass of its own (``shared_prefix.py``), in items that
  the host dealt out; here it is left out of their tiles.

A layer's window decides how many tiles there are, so there is a plan for each window of the model.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minivllm.kernels.triton.attention_sizes import SEES_ALL, Parts, SharedPass, Tiling, padded
from minivllm.kernels.triton.chip import Chip, let_next_start, wait_for_previous

LEAST_ROWS = 256  # the kernel is compiled for so many rows, and again for each doubling


@triton.jit(do_not_specialize=["num_rows", "long_grain"])
def _plan(query_starts, context_lens, windows, first_query, num_queries, share_starts, item_starts, share_rows,
          seats, shared_items, members, num_rows, num_programs, few_queries, long_grain, least_tiles,
          KV_HEADS: tl.constexpr, TILE_N: tl.constexpr, ITEM_QUERIES: tl.constexpr, ROWS_PAD: tl.constexpr,
          SHARED_ROWS: tl.constexpr, SEES_ALL: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """Program (p, w): in which row the stretch of decode program p begins under window w; the first of them writes the rest."""
    wait_for_previous(EARLY)
    let_next_start(EARLY)
    program, which = tl.program_id(0), tl.program_id(1)
    row = tl.arange(0, ROWS_PAD)
    real = row < num_rows
    start = tl.load(query_starts + row, mask=real, other=0)
    count = tl.load(query_starts + row + 1, mask=real, other=0) - start
    context = tl.load(context_lens + row, mask=real, other=0)
    window = tl.load(windows + which)
    count = tl.where(context > 0, count, 0)
    # What the library takes of a row: whole grains of a prompt's queries, if what lies before them is whole grains too.
    grain = tl.maximum(long_grain, 1)
    taken = tl.where((long_grain > 0) & (window == SEES_ALL) & ((context - count) % grain == 0), count // grain * grain, 0)
    start, count = start + taken, count - taken
    lowest = tl.maximum(context - count - window + 1, 0)  # position of the first key that a query of the row sees
    if SHARED_ROWS > 0:
        seat = tl.load(seats + row, mask=real, other=-1)
        shared = tl.load(shared_items + 5 + seat // SHARED_ROWS * 3, mask=seat >= 0, other=0)
        lowest = tl.where(window == SEES_ALL, shared, lowest)
        if program + which == 0:
            tl.store(members + seat, row, mask=seat >= 0)
    tiles = (context + TILE_N - 1) // TILE_N - lowest // TILE_N
    few = (count > 0) & (count <= few_queries)
    tiles = tl.where(few, tiles, 0)
    items = tl.where(few, 0, (count + ITEM_QUERIES - 1) // ITEM_QUERIES)
    tiles_up_to, items_up_to = tl.cumsum(tiles, 0), tl.cumsum(items, 0)
    total = tl.sum(tiles, 0) * KV_HEADS
    share = tl.maximum((total + num_programs - 1) // num_programs, least_tiles)
    begins_in = tl.sum(tl.where(real & (tiles_up_to * KV_HEADS <= program * share), 1, 0), 0)
    tl.store(share_rows + which * num_programs + program, tl.minimum(begins_in, num_rows - 1))
    if program == 0:
        tl.store(first_query + which * num_rows + row, start, mask=real)
        tl.store(num_queries + which * num_rows + row, count, mask=real)
        of_window = which * (num_rows + 1)
        tl.store(share_starts + of_window, 0)
        tl.store(item_starts + of_window, 0)
        tl.store(share_starts + of_window + 1 + row, tiles_up_to, mask=real)
        tl.store(item_starts + of_window + 1 + row, items_up_to, mask=real)


class Planner:
    """Makes plans for kernels of one tiling. Holds nothing that changes."""

    def __init__(
        self, chip: Chip, tiling: Tiling, num_kv_heads: int, windows: tuple[int | None, ...], device: torch.device
    ) -> None:
        self.tiling, self._num_kv_heads = tiling, num_kv_heads
        self._sizes = [SEES_ALL if window is None else window for window in windows]
        self._windows = torch.tensor(self._sizes, dtype=torch.int32, device=device)
        self._launch, self._early, self._options = chip.launch, chip.early_launch, {"num_warps": 4, **chip.launch_options}

    def plan(
        self, query_starts: Tensor, context_lens: Tensor, long_grain: int = 0, shared: SharedPass | None = None
    ) -> dict[int, Parts]:
        """The parts of a step under each window (``SEES_ALL`` for None). Leaves whole ``long_grain`` queries out, and the
        common beginnings of ``shared``, whose members it fills in."""
        num_windows, num_rows, num_programs = len(self._sizes), context_lens.shape[0], self.tiling.num_programs
        lengths = (num_rows, num_rows, num_rows + 1, num_rows + 1, num_programs)
        made = [torch.empty((num_windows, n), dtype=torch.int32, device=context_lens.device) for n in lengths]
        nothing = (made[0], made[0], made[0])
        given = nothing if shared is None else (shared.items.seats, shared.items.items, shared.members)
        self._launch(
            _plan, (num_programs, num_windows),
            query_starts, context_lens, self._windows, *made, *given,
            num_rows, num_programs, self.tiling.few_queries, long_grain, self.tiling.least_tiles,
            self._num_kv_heads, self.tiling.tile_n, self.tiling.item_queries, max(padded(num_rows), LEAST_ROWS),
            0 if shared is None else self.tiling.shared_rows, SEES_ALL, self._early, **self._options,
        )  # fmt: skip
        return {window: Parts(*(part[i] for part in made)) for i, window in enumerate(self._sizes)}
