"""What the runner remembers of each running sequence: its tokens, its blocks, and how far it is computed.

A *row* is a sequence's place from admission to finish or preemption; the scheduler chooses it. Plans bring differences only, so
this is the one copy of that state on the runner's side.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from minivllm.errors import RequestFault
from minivllm.runner.faults import is_out_of_memory
from minivllm.types import WANT_PROMPT_LOGPROBS, WANT_SAMPLE, NewRow, RowWork

Int64 = npt.NDArray[np.int64]


class PlanError(Exception):
    """A plan asks for something impossible or not built; it is refused whole, and never half obeyed."""


@contextmanager
def fault_of(uid: int) -> Iterator[None]:
    """Around what is done for one request alone. Raises ``RequestFault`` for what fails there, but for want of memory."""
    try:
        yield
    except PlanError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise RequestFault(uid) from error


@dataclass(frozen=True)
class RowStep:
    """A step's work as arrays."""

    rows: Int64  # [num_rows]
    lengths: Int64  # [num_rows]: tokens of this step
    ends: Int64  # [num_rows]: context after the step
    sampling: Int64  # [num_sampled]: places in the work whose row gets a token
    telling: Int64 = field(default_factory=lambda: np.empty(0, dtype=np.int64))  # those that want logprobs of their prompt


class Told(Protocol):
    """Who must hear of what rows are given, because the device keeps it."""

    def add_tokens(self, row: int, column: int, values: Sequence[int]) -> None:
        """Tokens that a row is given, from ``column`` of its sequence on."""

    def add_blocks(self, row: int, column: int, values: Sequence[int]) -> None:
        """Blocks that a row is given, from ``column`` of its table on."""


class TokenTable:
    """Every row's tokens, where the model reads them. Written by ``Rows`` and, through ``put``, by ``Pending.sample``."""

    def __init__(self, max_num_seqs: int, max_model_len: int, device: torch.device) -> None:
        # One column more than the context: at depth 1 a sequence that ends there may be given a surplus token.
        self.tokens: Tensor = torch.zeros((max_num_seqs, max_model_len + 1), dtype=torch.int32, device=device)

    def add_tokens(self, row: int, column: int, values: Sequence[int]) -> None:
        """See ``Told``."""
        self.tokens[row, column : column + len(values)] = torch.tensor(values, dtype=torch.int32)

    def add_blocks(self, row: int, column: int, values: Sequence[int]) -> None:
        """Nothing: backends that plan on the host read the tables of ``Rows``."""

    def put(self, rows: Tensor, positions: Tensor, token_ids: Tensor) -> None:
        """Write sampled tokens where the next step reads them; all [num_sampled] on the device."""
        self.tokens[rows, positions] = token_ids.to(torch.int32)


class Rows:
    """Per-row tables on the host. Written by the runner only."""

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int, num_groups: int, told: Told) -> None:
        self.block_size, self.max_model_len, self._told = block_size, max_model_len, told
        self.uid: Int64 = np.full(max_num_seqs, -1, dtype=np.int64)  # -1: nobody has the row
        self.num_prompt: Int64 = np.zeros(max_num_seqs, dtype=np.int64)
        self.known: Int64 = np.zeros(max_num_seqs, dtype=np.int64)  # tokens, sampled ones in flight included
        self.computed: Int64 = np.zeros(max_num_seqs, dtype=np.int64)  # tokens whose K and V are launched
        max_blocks = -(-(max_model_len + 1) // block_size)
        self.block_tables = tuple(np.zeros((max_num_seqs, max_blocks), dtype=np.int32) for _ in range(num_groups))
        self.num_blocks: Int64 = np.zeros((num_groups, max_num_seqs), dtype=np.int64)

    def free(self, row: int) -> None:
        """Nobody has the row any more."""
        self.uid[row] = -1
        self.known[row] = self.computed[row] = 0
        self.num_blocks[:, row] = 0

    def take(self, new: NewRow) -> None:
        """A sequence takes its row."""
        num_tokens = len(new.token_ids)
        if num_tokens > self.max_model_len:
            raise PlanError(f"row {new.row} brings {num_tokens} tokens, but the context ends at {self.max_model_len}")
        if len(new.block_ids) != len(self.block_tables):
            raise PlanError(f"row {new.row} brings blocks for {len(new.block_ids)} KV groups, not {len(self.block_tables)}")
        self.free(new.row)
        self.uid[new.row] = new.uid
        self.num_prompt[new.row] = new.num_prompt
        self.known[new.row] = num_tokens
        self.computed[new.row] = new.computed
        self._told.add_tokens(new.row, 0, new.token_ids)
        self._add_blocks(new.row, new.block_ids)

    def begin(self, work: Sequence[RowWork]) -> RowStep:
        """Take the blocks and tokens that a step's work brings, and check that all of it can be done. Raises ``PlanError``.

        Checked as whole arrays: row by row this would cost more than the scheduler does.
        """
        for w in work:
            if w.new_block_ids or w.forced_ids:
                with fault_of(w.uid):
                    self._add_blocks(w.row, w.new_block_ids)
                    self._add_forced(w.row, w.forced_ids)
        of_row = np.array([w.row for w in work], dtype=np.int64)
        lengths = np.array([w.num_tokens for w in work], dtype=np.int64)
        uids = np.array([w.uid for w in work], dtype=np.int64)
        wants = np.array([w.wants for w in work], dtype=np.int64)
        samples = (wants & WANT_SAMPLE) != 0
        ends, known = self.computed[of_row] + lengths, self.known[of_row]
        space = self.num_blocks[:, of_row].min(0) * self.block_size
        if (bad := _first(self.uid[of_row] != uids)) is not None:
            raise PlanError(f"row {of_row[bad]} belongs to {self.uid[of_row[bad]]}, not to {uids[bad]}")
        if (bad := _first((lengths < 1) | (ends > known))) is not None:
            raise PlanError(f"row {of_row[bad]} is asked for tokens up to {ends[bad]}, of which {known[bad]} are known")
        if (bad := _first(samples & (ends != known))) is not None:
            raise PlanError(f"row {of_row[bad]} is to sample after token {ends[bad]}, but {known[bad]} are known")
        if (bad := _first(ends > space)) is not None:
            raise PlanError(f"row {of_row[bad]} has {space[bad] // self.block_size} blocks, too few for {ends[bad]} tokens")
        return RowStep(of_row, lengths, ends, np.flatnonzero(samples), np.flatnonzero(wants & WANT_PROMPT_LOGPROBS))

    def advance(self, step: RowStep) -> None:
        """The step is launched: its tokens count as computed, and each row that samples gets one more."""
        self.computed[step.rows] = step.ends
        self.known[step.rows[step.sampling]] = step.ends[step.sampling] + 1

    def _add_forced(self, row: int, token_ids: tuple[int, ...]) -> None:
        """Tokens that follow the known ones, the one that a step in flight samples included."""
        known = int(self.known[row])
        if not token_ids:
            return
        if known + len(token_ids) > self.max_model_len:
            raise PlanError(f"row {row} is given tokens up to {known + len(token_ids)}, beyond the context")
        self._told.add_tokens(row, known, token_ids)
        self.known[row] = known + len(token_ids)

    def _add_blocks(self, row: int, block_ids: tuple[tuple[int, ...], ...]) -> None:
        """Append blocks to the row's tables, per KV group; () brings none for any group."""
        for group, ids in enumerate(block_ids):
            have = int(self.num_blocks[group, row])
            if have + len(ids) > self.block_tables[group].shape[1]:
                raise PlanError(f"row {row} is given {have + len(ids)} blocks, more than the context needs")
            self.block_tables[group][row, have : have + len(ids)] = ids
            self.num_blocks[group, row] = have + len(ids)
            self._told.add_blocks(row, have, ids)


def _first(bad: npt.NDArray[np.bool_]) -> int | None:
    """The first place that is true."""
    return int(bad.argmax()) if bad.any() else None
