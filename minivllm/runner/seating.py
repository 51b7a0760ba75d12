"""Rows whose contexts begin with the same blocks, dealt out for a kernel that reads these blocks once for several rows.

A plan says which running rows begin alike (``StepPlan.shared``). That stays the same for many steps; what changes is which of
these rows decode in a step, and at which place of it. So the rows of each group that are there are *seated*: the group's rows
are cut into items of as many rows as one program of the kernel takes, and a row's seat is its item and its place there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from minivllm.attention.base import SharedShape
from minivllm.types import SharedPrefix

Int32 = npt.NDArray[np.int32]
MAX_GROUPS = 16  # those that save most; more of them would each be too small to matter


def most_items(max_num_seqs: int, shape: SharedShape | None) -> int:
    """How many items a step may have, as a multiple of 4; 0 where nobody would look at them."""
    return 0 if shape is None else -(-(-(-max_num_seqs // shape.rows) + MAX_GROUPS) // 4) * 4


@dataclass(frozen=True)
class Seating:
    """Who of a step's rows sits where."""

    seats: Int32  # [num_rows]: item * rows of an item + place; -1: the row begins like no other
    items: Int32  # [num_items, 3]: row of the block table, shared tokens, rows


class Seater:
    """Seats rows, step after step. Written by the runner: it remembers the groups of the last plan as arrays."""

    def __init__(self, shape: SharedShape, block_size: int, max_num_seqs: int) -> None:
        self._shape, self._block_size = shape, block_size
        self._place = np.full(max_num_seqs, -1, dtype=np.int32)  # by row: its place in the step at hand; -1 between steps
        self._groups: Sequence[SharedPrefix] = ()
        self._arrays: list[tuple[npt.NDArray[np.int64], int]] = []  # rows and tokens of each group

    def seat(self, groups: tuple[SharedPrefix, ...], rows: npt.NDArray[np.int64]) -> Seating | None:
        """Seat the ``rows`` [num_rows] of a step of decodes; None where too little would be gained."""
        if groups is not self._groups:
            self._groups, self._arrays = groups, self._worthy(groups)
        if not self._arrays:
            return None
        size, place = self._shape.rows, self._place
        place[rows] = np.arange(len(rows))
        seats = np.full(len(rows), -1, dtype=np.int32)
        items: list[tuple[int, int, int]] = []
        saved = 0
        for members, num_tokens in self._arrays:
            here = place[members]
            here = here[here >= 0]
            if len(here) < 2:
                continue
            seats[here] = len(items) * size + np.arange(len(here))  # items of a group are full but for its last
            items += [(int(rows[here[0]]), num_tokens, min(size, len(here) - at)) for at in range(0, len(here), size)]
            saved += num_tokens * (len(here) - -(-len(here) // size))
        place[rows] = -1
        return Seating(seats, np.array(items, dtype=np.int32)) if saved >= self._shape.least_saved else None

    def _worthy(self, groups: tuple[SharedPrefix, ...]) -> list[tuple[npt.NDArray[np.int64], int]]:
        """The groups that save most, with whole grains of tokens."""
        grain = self._shape.grain
        found = [(np.array(g.rows, dtype=np.int64), g.num_blocks * self._block_size // grain * grain) for g in groups]
        found.sort(key=lambda group: -len(group[0]) * group[1])
        return [(rows, num_tokens) for rows, num_tokens in found[:MAX_GROUPS] if num_tokens]
