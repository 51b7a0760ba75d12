"""How much memory the largest step takes: it is run once, over a cache of two blocks, and looked at.

An estimate must be generous, and what it is too much by is lost to the cache for as long as the server runs. So the step that
needs most is made up: as many tokens as a step may have, in one sequence that fills the context, and a sampled row for every
place there is, drawing with every filter. Its tables are all zeros, so that it reads and writes block 0, which nobody owns.
Kernels are loaded on the way, which a first request would otherwise wait for.
"""

import numpy as np
import torch

from minivllm.kernels.triton.sampling import NUM_WISHES
from minivllm.runner.device_runner import DeviceRunner
from minivllm.runner.graphs import Graphs
from minivllm.runner.rows import RowStep
from minivllm.runner.sizing import Measured
from minivllm.types import NewRow, SamplingParams

GRAPH_BYTES = 3 * 2**20  # set aside for what the driver keeps of one captured piece of some 250 kernels


@torch.inference_mode()
def measure(runner: DeviceRunner, num_tokens: int) -> Measured:
    """Run the largest step of ``num_tokens`` tokens on a runner that nobody uses yet."""
    device = runner.stage.device
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    _run(runner, num_tokens)
    torch.cuda.synchronize(device)
    workspace = torch.cuda.max_memory_allocated(device) - before
    workspace += runner.backend.workspace_bytes(num_tokens, runner.rows.max_model_len)
    torch.cuda.empty_cache()
    return Measured(workspace, _graphs_bytes(runner.graphs, workspace, num_tokens))


def _run(runner: DeviceRunner, num_tokens: int) -> None:
    """One step of a long sequence and many short ones, then one of decodes, each with its head."""
    rows, stage = runner.rows, runner.stage
    num_rows = min(stage.scratch_row, num_tokens)
    lengths = np.ones(num_rows, dtype=np.int64)
    lengths[0] = min(num_tokens - num_rows + 1, rows.max_model_len)
    ends = np.full(num_rows, min(rows.max_model_len, lengths[0]), dtype=np.int64)
    ends[0] = rows.max_model_len
    every = np.arange(num_rows)
    for step in (RowStep(every, lengths, ends, every), RowStep(every, np.ones_like(lengths), ends, every)):
        wishes = np.zeros((num_rows, NUM_WISHES), dtype=np.int32)
        wishes[:, 0] = stage.scratch_row
        starts = stage.send(step, runner.runs, wishes)
        count = int(starts[-1])
        runner.body(count, count == num_rows, None, shared=count == num_rows and runner.backend.shared_shape is not None)
        runner.head(num_rows)
    asked = SamplingParams(temperature=1.0, top_k=50, top_p=0.9, min_p=0.01, frequency_penalty=0.1, max_tokens=1)
    for row in range(num_rows):
        runner.sampler.set_row(NewRow(0, row, (), 0, asked, 0, 0, 0, (), 0))
    runner.tail(step)


def _graphs_bytes(graphs: Graphs, workspace: int, num_tokens: int) -> int:
    """What captured pieces may take: the largest one's own workspace, and what the driver keeps of each."""
    share = min(1.0, graphs.largest / num_tokens)
    return int(workspace * share) + graphs.num_pieces * GRAPH_BYTES if graphs.num_pieces else 0
