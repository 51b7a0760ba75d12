"""From a plan's work to one step's tensors: which token stands where, which KV slot it gets, whose logits are wanted.

All of it is computed as host arrays for the whole batch at once (no loop over tokens) and brought to the device in one copy.
The token ids themselves are read on the device, from the rows' token table: a token sampled one step ago may not be known
to the host yet.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from minivllm.attention.base import AttentionBackend, AttnMeta
from minivllm.models.decoder import ForwardBatch
from minivllm.runner.rows import Rows
from minivllm.types import WANT_SAMPLE, RowWork

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sampled:
    """Which rows of a step get a token, and where it goes."""

    work: tuple[int, ...]  # place in StepPlan.work
    rows: Int64  # [num_sampled]
    positions: Int64  # [num_sampled]: index in its sequence of the token to come
    device_rows: Tensor  # the same two on the device
    device_positions: Tensor


def to_device(host: npt.NDArray[np.int64], device: torch.device) -> Tensor:
    """Copy through a page of its own: a host array that is used again must not be read by a copy still under way."""
    page = torch.from_numpy(host)
    if device.type == "cuda":
        return page.pin_memory().to(device, non_blocking=True)
    return page.clone() if device.type == "cpu" else page.to(device)


def build_batch(work: Sequence[RowWork], rows: Rows, backend: AttentionBackend) -> tuple[ForwardBatch, Sampled]:
    """Build the step's batch from the rows' counts as they are before it; changes nothing."""
    device, num_groups = rows.tokens.device, len(rows.block_tables)
    of_row = np.array([w.row for w in work], dtype=np.int64)  # [num_rows]
    lengths = np.array([w.num_tokens for w in work], dtype=np.int64)
    starts = np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(lengths)))  # [num_rows + 1]
    ends = rows.computed[of_row] + lengths  # context after the step
    row_of = np.repeat(of_row, lengths)  # [num_tokens]
    positions = np.arange(starts[-1]) + np.repeat(rows.computed[of_row] - starts[:-1], lengths)
    blocks, offsets = np.divmod(positions, rows.block_size)
    slots = [table[row_of, blocks].astype(np.int64) * rows.block_size + offsets for table in rows.block_tables]
    sampling = np.array([i for i, w in enumerate(work) if w.wants & WANT_SAMPLE], dtype=np.int64)
    packed = (row_of, positions, *slots, starts[1:][sampling] - 1, of_row[sampling], ends[sampling])
    sizes = [len(part) for part in packed]
    on_device = torch.split(to_device(np.concatenate(packed), device), sizes)
    plans = tuple(
        backend.plan(AttnMeta(starts, ends, rows.block_tables[g][of_row], rows.block_size, on_device[2 + g]))
        for g in range(num_groups)
    )
    token_ids = rows.tokens[on_device[0], on_device[1]].long()
    batch = ForwardBatch(token_ids, on_device[1], plans, on_device[2 + num_groups])
    sampled = Sampled(tuple(sampling.tolist()), of_row[sampling], ends[sampling], *on_device[3 + num_groups :])
    return batch, sampled
