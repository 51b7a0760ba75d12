"""What the runner remembers of each running sequence: its tokens, its blocks, and how far it is computed.

A *row* is a sequence's place from admission to finish or preemption; the scheduler chooses it. Plans bring differences only, so
this is the one copy of that state on the runner's side.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from minivllm.types import WANT_SAMPLE, NewRow, RowWork


class PlanError(Exception):
    """A plan asks for something impossible or not built; it is refused whole, and never half obeyed."""


class Rows:
    """Per-row tables. Written by the runner only (``tokens`` also by ``Pending.sample``, through ``put_tokens``)."""

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int, num_groups: int, device: torch.device) -> None:
        self.block_size = block_size
        # One column more than the context: at depth 1 a sequence that ends there may be given a surplus token.
        self.tokens: Tensor = torch.zeros((max_num_seqs, max_model_len + 1), dtype=torch.int32, device=device)
        self.uid: npt.NDArray[np.int64] = np.full(max_num_seqs, -1, dtype=np.int64)  # -1: nobody has the row
        self.num_prompt: npt.NDArray[np.int64] = np.zeros(max_num_seqs, dtype=np.int64)
        self.known: npt.NDArray[np.int64] = np.zeros(max_num_seqs, dtype=np.int64)  # tokens, sampled ones in flight included
        self.computed: npt.NDArray[np.int64] = np.zeros(max_num_seqs, dtype=np.int64)  # tokens whose K and V are launched
        max_blocks = -(-(max_model_len + 1) // block_size)
        self.block_tables = tuple(np.zeros((max_num_seqs, max_blocks), dtype=np.int32) for _ in range(num_groups))
        self.num_blocks: npt.NDArray[np.int64] = np.zeros((num_groups, max_num_seqs), dtype=np.int64)

    def free(self, row: int) -> None:
        """Nobody has the row any more."""
        self.uid[row] = -1
        self.known[row] = self.computed[row] = 0
        self.num_blocks[:, row] = 0

    def take(self, new: NewRow) -> None:
        """A sequence takes its row."""
        num_tokens = len(new.token_ids)
        if num_tokens >= self.tokens.shape[1]:
            raise PlanError(f"row {new.row} brings {num_tokens} tokens, but the context ends at {self.tokens.shape[1] - 1}")
        if len(new.block_ids) != len(self.block_tables):
            raise PlanError(f"row {new.row} brings blocks for {len(new.block_ids)} KV groups, not {len(self.block_tables)}")
        self.free(new.row)
        self.uid[new.row] = new.uid
        self.num_prompt[new.row] = new.num_prompt
        self.known[new.row] = num_tokens
        self.computed[new.row] = new.computed
        self.tokens[new.row, :num_tokens] = torch.tensor(new.token_ids, dtype=torch.int32)
        self._add_blocks(new.row, new.block_ids)

    def begin(self, work: RowWork) -> None:
        """Take the blocks that a step's work brings, and check that the work can be done."""
        row = work.row
        if self.uid[row] != work.uid:
            raise PlanError(f"row {row} belongs to {self.uid[row]}, not to {work.uid}")
        self._add_blocks(row, work.new_block_ids)
        end = int(self.computed[row]) + work.num_tokens
        if work.num_tokens < 1 or end > self.known[row]:
            raise PlanError(f"row {row} is asked for tokens up to {end}, of which {self.known[row]} are known")
        if work.wants & WANT_SAMPLE and end != self.known[row]:
            raise PlanError(f"row {row} is to sample after token {end}, but {self.known[row]} are known")
        if end > self.num_blocks[:, row].min() * self.block_size:
            raise PlanError(f"row {row} has {self.num_blocks[:, row].min()} blocks, too few for {end} tokens")

    def put_tokens(self, rows: Tensor, positions: Tensor, token_ids: Tensor) -> None:
        """Write sampled tokens where the next step reads them; all [num_sampled] on the device."""
        self.tokens[rows, positions] = token_ids.to(torch.int32)

    def _add_blocks(self, row: int, block_ids: tuple[tuple[int, ...], ...]) -> None:
        """Append blocks to the row's tables, per KV group; () brings none for any group."""
        for group, ids in enumerate(block_ids):
            have = int(self.num_blocks[group, row])
            if have + len(ids) > self.block_tables[group].shape[1]:
                raise PlanError(f"row {row} is given {have + len(ids)} blocks, more than the context needs")
            self.block_tables[group][row, have : have + len(ids)] = ids
            self.num_blocks[group, row] = have + len(ids)
