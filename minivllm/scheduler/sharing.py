"""Which running rows begin with the same KV blocks, so that attention may read these blocks once for all of them.

Requests with a common beginning (a system prompt) hold the very same blocks at their front: the prefix cache gave them out.
This file only compares block ids. It does not ask why they are equal, so a hit in the cache, a block published by a row of the
same step and a fork all count alike; equal tokens in different blocks do not.

*Groups.* A row joins the group with which it shares the longest run of leading blocks; the group's run then shrinks to what is
common. It does not join where the others would lose more by that than it gains: then it begins a group of its own. Groups have
one level, so a row is in one group and a conversation inside a shared system prompt is not seen apart. A run never grows
again when rows leave; it ends with its group's last row.

*Why a run stays true.* Checked in ``kv/allocator.py``: from admission to release a sequence's list of blocks is only ever
extended (``grow``). Nothing is put in the place of a block: a fork copies its parent's begun block into a block of its own, and
a block whose equal is findable already is kept, not swapped. A block is shared when the plan that fills it is made at the
earliest, so after that step nobody writes to the run. And each row of a group holds the whole run, so its blocks are not given
to others while the group lives. Only KV group 0 is looked at. Today no group lets go of leading blocks early; a sliding window
that did would have to be another group than 0.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

from minivllm.types import SharedPrefix

MIN_ROWS = 4  # a second pass over the shared part has its price too; chosen, not measured yet
MIN_TOKENS = 256  # shared tokens; likewise


@dataclass(eq=False, slots=True)
class _Group:
    """Rows that begin with the same blocks. Written by ``Sharing`` alone; compared and hashed as an object."""

    start: tuple[int, ...]  # the least run that is worth telling; groups are found by it
    run: tuple[int, ...]  # the blocks that all rows begin with
    rows: list[int]  # rising


class Sharing:
    """Groups of running rows by their leading blocks. Written by ``Book`` alone: when a row is taken and when it is left.

    A row that comes or goes costs a few slices and compares of its leading blocks; a step in which none does costs nothing.
    """

    def __init__(self, block_size: int, min_rows: int = MIN_ROWS, min_tokens: int = MIN_TOKENS) -> None:
        """Groups of at least ``min_rows`` rows that share at least ``min_tokens`` tokens, rounded up to blocks, are told."""
        self._min_rows = min_rows
        self._min_blocks = max(1, -(-min_tokens // block_size))
        self._by_start: dict[tuple[int, ...], list[_Group]] = {}
        self._group_of: dict[int, _Group] = {}  # by row; rows with too few blocks are in none
        self._touched: dict[_Group, None] = {}  # since ``current`` was asked; a dict keeps their order
        self._told: dict[_Group, SharedPrefix] = {}
        self._current: tuple[SharedPrefix, ...] = ()

    def take(self, row: int, blocks: tuple[int, ...]) -> None:
        """A request takes a row. ``blocks`` are its full blocks of known tokens, in order. Raises ValueError for a row that
        was not left."""
        if row in self._group_of:
            raise ValueError(f"row {row} is taken twice")
        start = blocks[: self._min_blocks]
        if len(start) < self._min_blocks:
            return  # it can never share enough
        group, common = self._find(start, blocks)
        if group is None:
            group = _Group(start, blocks, [])
            self._by_start.setdefault(start, []).append(group)
        elif common < len(group.run):
            group.run = group.run[:common]
        insort(group.rows, row)
        self._group_of[row] = group
        self._touched[group] = None

    def leave(self, row: int) -> None:
        """A row is free again. A group without rows is forgotten at once: its blocks may get other contents."""
        group = self._group_of.pop(row, None)
        if group is None:
            return
        del group.rows[bisect_left(group.rows, row)]
        self._touched[group] = None
        if not group.rows:
            peers = self._by_start[group.start]
            peers.remove(group)
            if not peers:
                del self._by_start[group.start]

    def current(self) -> tuple[SharedPrefix, ...]:
        """The groups worth telling, in no special order. The same object as before means: the same rows and blocks."""
        if not self._touched:
            return self._current
        changed = False
        for group in self._touched:
            before = self._told.get(group)
            after = SharedPrefix(tuple(group.rows), len(group.run)) if len(group.rows) >= self._min_rows else None
            if before == after:
                continue
            changed = True
            if after is None:
                del self._told[group]
            else:
                self._told[group] = after
        self._touched.clear()
        if changed:
            self._current = tuple(self._told.values())
        return self._current

    def _find(self, start: tuple[int, ...], blocks: tuple[int, ...]) -> tuple[_Group | None, int]:
        """The group that a row of these blocks joins, None for a group of its own, and the run that they have in common.

        n rows with a common run save n - 1 times reading it; with the newcomer they must save as much. A single row saves
        nothing yet, so whoever fits may join it, however long its own prompt goes on."""
        best, longest = None, len(start)
        for group in self._by_start.get(start, ()):
            run, num_rows = group.run, len(group.rows)
            least = max(longest, -(-len(run) * (num_rows - 1) // num_rows))
            if least > min(len(run), len(blocks)) or run[least - 1] != blocks[least - 1]:
                continue  # one look: nearly all groups that do not fit end here
            common = _common(run, blocks, len(start))
            if common < least:
                continue
            if best is None or (common, len(group.rows)) > (longest, len(best.rows)):
                best, longest = group, common
        return best, longest


def _common(a: tuple[int, ...], b: tuple[int, ...], low: int) -> int:
    """How many leading items are equal; of the first ``low`` it is known. Halving compares each item about once, in C."""
    high = min(len(a), len(b))
    if a[low:high] == b[low:high]:
        return high  # what nearly every request of a shared prompt finds
    high -= 1
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
