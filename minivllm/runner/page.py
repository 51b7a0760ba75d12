"""A step as one page of integers: everything that the host tells the device, in one copy.

The page has a fixed part, of which each captured step knows the address: where each row's tokens start, how long its context
becomes, which row it is, whose logits are wanted and how they are drawn from. Behind it stand the *runs*: values for one row's
table, such as the tokens of a prompt or the blocks that were added. They are read by a kernel of their own, and only by the
steps that have some.

The page is written into fresh pinned memory each step: the copy of the step before may still be under way.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from minivllm.kernels.triton.sampling import NUM_WISHES
from minivllm.runner.rows import RowStep
from minivllm.runner.seating import Int32, Seating

RUN_FIELDS = 5  # of a run: table, row, column, number of values, where on the page they stand (kernels/triton/steps.py)
TOKENS, BLOCKS = 0, 1  # the tables that a run may be for


@dataclass(frozen=True)
class PageLayout:
    """Where on the page the fixed parts stand. Both sizes are multiples of 4, so that each part is aligned to 16 bytes."""

    max_rows: int
    max_items: int = 0  # of rows with a common beginning (``seating.py``); 0: nobody asks for them

    @property
    def contexts(self) -> int:
        """Query starts come first, and there is one more of them than rows."""
        return self.max_rows + 4

    @property
    def rows(self) -> int:
        """Rows of the tables."""
        return self.contexts + self.max_rows

    @property
    def places(self) -> int:
        """Flat places of the tokens whose logits are wanted."""
        return self.rows + self.max_rows

    @property
    def wishes(self) -> int:
        """[max_rows, NUM_WISHES]: for whom, and how, a token is drawn."""
        return self.places + self.max_rows

    @property
    def seats(self) -> int:
        """[max_rows]: the seat of each row with a common beginning, -1 for the others."""
        return self.wishes + self.max_rows * NUM_WISHES

    @property
    def items(self) -> int:
        """[4 + 3 * max_items]: how many there are, then each one's row of the tables, shared tokens, rows."""
        return self.seats + (self.max_rows if self.max_items else 0)

    @property
    def runs(self) -> int:
        """The end of the fixed part: runs, then their values."""
        return self.items + (4 + 3 * self.max_items if self.max_items else 0)


@dataclass
class Runs:
    """Values for the tables, gathered until the next page is written. Written by the runner's ``Rows`` and ``DeviceRunner``."""

    heads: list[tuple[int, int, int]] = field(default_factory=list)  # table, row, column
    values: list[Sequence[int]] = field(default_factory=list)

    def add(self, table: int, row: int, column: int, values: Sequence[int]) -> None:
        """``values`` belong into the row of ``table`` from ``column`` on."""
        if len(values):
            self.heads.append((table, row, column))
            self.values.append(values)

    def add_tokens(self, row: int, column: int, values: Sequence[int]) -> None:
        """Tokens that a row is given."""
        self.add(TOKENS, row, column, values)

    def add_blocks(self, row: int, column: int, values: Sequence[int]) -> None:
        """Blocks that a row is given."""
        self.add(BLOCKS, row, column, values)

    def packed(self, offset: int) -> tuple[Int32, int, int]:
        """All runs and their values as they stand on a page from ``offset`` on; number of runs; length of the longest."""
        count = len(self.heads)
        lengths = np.array([len(v) for v in self.values], dtype=np.int32)
        first = offset + count * RUN_FIELDS
        sources = first + np.cumsum(lengths) - lengths
        packed = np.empty(count * RUN_FIELDS + int(lengths.sum()), dtype=np.int32)
        table = packed[: count * RUN_FIELDS].reshape(count, RUN_FIELDS)
        table[:, :3], table[:, 3], table[:, 4] = self.heads, lengths, sources
        at = count * RUN_FIELDS
        for values in self.values:
            packed[at : at + len(values)] = values
            at += len(values)
        return packed, count, int(lengths.max())

    def clear(self) -> None:
        """They are on a page."""
        self.heads, self.values = [], []


def fill(
    page: Int32, layout: PageLayout, step: RowStep, wishes: Int32, scratch_row: int, seating: Seating | None = None
) -> Int32:
    """Write the fixed part of ``page`` and return the query starts [num_rows + 1]. ``wishes`` [num_sampled, NUM_WISHES]: how
    each sampled row draws; what is left over is for the scratch row, which nobody reads."""
    num_rows, num_sampled = len(step.rows), len(step.sampling)
    starts = np.zeros(num_rows + 1, dtype=np.int32)
    np.cumsum(step.lengths, out=starts[1:])
    page[: num_rows + 1] = starts
    page[num_rows + 1 : layout.contexts] = starts[-1]
    page[layout.contexts : layout.runs] = 0
    page[layout.contexts : layout.contexts + num_rows] = step.ends
    page[layout.rows : layout.rows + num_rows] = step.rows
    page[layout.places : layout.places + num_sampled] = starts[1:][step.sampling] - 1
    table = page[layout.wishes : layout.seats].reshape(layout.max_rows, NUM_WISHES)
    table[:num_sampled] = wishes
    table[num_sampled:, 0] = scratch_row
    if layout.max_items:
        page[layout.seats : layout.items] = -1
    if seating is not None:
        page[layout.seats : layout.seats + num_rows] = seating.seats
        page[layout.items] = len(seating.items)
        page[layout.items + 4 : layout.items + 4 + seating.items.size] = seating.items.reshape(-1)
    return starts
