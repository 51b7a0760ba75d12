"""From a plan's work to one step's tensors: which token stands where, which KV slot it gets, whose logits are wanted.

All of it is computed as host arrays for the whole batch at once (no loop over tokens) and brought to the device in one copy.
The token ids themselves are read on the device, from the rows' token table: a token sampled one step ago may not be known
to the host yet.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from minivllm.attention.base import AttentionBackend, AttnMeta
from minivllm.models.decoder import ForwardBatch
from minivllm.runner.rows import Int64, Rows, RowStep


@dataclass(frozen=True)
class Sampled:
    """Which rows of a step get a token, and where it goes."""

    work: tuple[int, ...]  # place in StepPlan.work
    rows: Int64  # [num_sampled]
    positions: Int64  # [num_sampled]: index in its sequence of the token to come
    device_rows: Tensor  # the same two on the device
    device_positions: Tensor


def to_device(host: npt.NDArray[np.int64] | npt.NDArray[np.int32], device: torch.device) -> Tensor:
    """Copy through a page of its own: a host array that is used again must not be read by a copy still under way."""
    page = torch.from_numpy(host)
    if device.type == "cuda":
        return page.pin_memory().to(device, non_blocking=True)
    return page.clone() if device.type == "cpu" else page.to(device)


def build_batch(step: RowStep, rows: Rows, tokens: Tensor, backend: AttentionBackend) -> tuple[ForwardBatch, Sampled]:
    """Build the step's batch from the tokens [max_num_seqs, columns] of every row; changes nothing."""
    device, num_groups = tokens.device, len(rows.block_tables)
    starts = np.zeros(len(step.rows) + 1, dtype=np.int64)
    np.cumsum(step.lengths, out=starts[1:])
    sampling_rows, sampling_ends = step.rows[step.sampling], step.ends[step.sampling]
    if starts[-1] == len(step.rows):  # one token each, as most steps are: nothing to spread
        row_of, positions = step.rows, step.ends - 1  # [num_tokens]
    else:
        row_of = np.repeat(step.rows, step.lengths)
        positions = np.arange(starts[-1]) + np.repeat(step.ends - starts[1:], step.lengths)
    blocks, offsets = np.divmod(positions, rows.block_size)
    slots = [table[row_of, blocks].astype(np.int64) * rows.block_size + offsets for table in rows.block_tables]
    packed = (row_of, positions, *slots, starts[1:][step.sampling] - 1, sampling_rows, sampling_ends)
    on_device = torch.split(to_device(np.concatenate(packed), device), [len(part) for part in packed])
    plans = tuple(
        backend.plan(AttnMeta(starts, step.ends, step.rows, rows.block_tables[g], rows.block_size, on_device[2 + g]))
        for g in range(num_groups)
    )
    token_ids = tokens[on_device[0], on_device[1]].long()
    batch = ForwardBatch(token_ids, on_device[1], plans, on_device[2 + num_groups])
    sampled = Sampled(tuple(step.sampling.tolist()), sampling_rows, sampling_ends, *on_device[3 + num_groups :])
    return batch, sampled
