"""What a step reads and writes on the device, at addresses that never change.

A captured step is a list of kernels with their addresses; what changes from step to step must stand where it stood when the
list was made. Here are these places: the page (``runner/page.py``), the tables of tokens and blocks by row, the tokens of the
step, the hidden states that logits are wanted of, grammar masks by row, and the tokens that were chosen. The last row of the
tables is scratch: what a padded place of a step would write goes there.
"""

import contextlib
import logging
import weakref
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from minivllm.attention.base import AttnMeta, DeviceAttention, DeviceMeta
from minivllm.kernels.triton.sampling import NUM_WISHES
from minivllm.kernels.triton.steps import StepKernels
from minivllm.models.decoder import ForwardBatch
from minivllm.runner.page import RUN_FIELDS, PageLayout, Runs, fill
from minivllm.runner.rows import Rows, RowStep
from minivllm.runner.seating import Int32, Seating
from minivllm.types import ANY_TOKEN

Masks = npt.NDArray[np.int32]  # [max_num_seqs, 1 + words of 32 tokens or more], by row
MAX_PAGE = 2**22  # integers; what a step brings beyond that goes on pages of its own

log = logging.getLogger("minivllm")


class MaskPage:
    """The host's masks, in memory that the device reads by itself where that can be had. Never changes."""

    def __init__(self, masks: Masks, device: torch.device) -> None:
        self.masks, self._page = masks, torch.from_numpy(masks)
        self._copies = device.type == "cuda"  # through a pinned page of each step's own
        if device.type == "cuda":
            address, cuda = self._page.data_ptr(), torch.cuda.cudart()  # type: ignore[no-untyped-call]
            if int(cuda.cudaHostRegister(address, masks.nbytes, 0)) == 0:
                weakref.finalize(self, cuda.cudaHostUnregister, address)
                self._copies = False
            else:
                log.warning("Grammar masks are copied once more in each step: their memory cannot be pinned.")
                with contextlib.suppress(RuntimeError):  # the next launch would be blamed for it
                    torch.zeros(1, device=device)

    def first(self, num_rows: int, words: int) -> Tensor:
        """Those of the first rows, ready for a copy that nobody waits for."""
        part = self._page[:num_rows, :words]
        return part.pin_memory() if self._copies else part


@dataclass(frozen=True)
class StageSizes:
    """Largest steps."""

    max_num_seqs: int
    max_num_tokens: int  # of one step, padding included
    max_model_len: int
    hidden_size: int
    vocab_size: int
    max_items: int = 0  # see ``PageLayout``


class Stage:
    """The device's side of ``Rows``. Written by the runner, in stream order: ``send`` between steps, kernels within them."""

    def __init__(self, sizes: StageSizes, rows: Rows, kernels: StepKernels, dtype: torch.dtype, device: torch.device) -> None:
        self.device, self.kernels, self.block_size = device, kernels, rows.block_size
        num_rows, width = sizes.max_num_seqs, rows.block_tables[0].shape[1]
        self.layout = PageLayout(-(-num_rows // 4) * 4, sizes.max_items)
        self.scratch_row = num_rows

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        largest = min(num_rows * (sizes.max_model_len + width + 2 * RUN_FIELDS), MAX_PAGE)
        self.page = zeros(self.layout.runs + largest)
        self.tokens = zeros(num_rows + 1, sizes.max_model_len + 2)  # one more than the context: see ``Rows``
        self.blocks = zeros(num_rows + 1, -(-width // 4) * 4)
        self.token_ids, self.positions, self.slots = (zeros(sizes.max_num_tokens, dtype=torch.int64) for _ in range(3))
        self.sampled = zeros(num_rows, sizes.hidden_size, dtype=dtype)  # hidden states whose logits are wanted
        self.chosen = zeros(num_rows)
        self.masks = zeros(num_rows + 1, 1 + -(-sizes.vocab_size // 32)).fill_(ANY_TOKEN)  # see ``reference.rule_out``
        self._mask_page: MaskPage | None = None  # where they come from

        self._blank = zeros(self.layout.runs)
        self._blank[self.layout.wishes : self.layout.seats : NUM_WISHES] = self.scratch_row
        self._blank[self.layout.seats : self.layout.items] = -1
        at = self.layout
        self._starts, self._contexts = self.page[: at.contexts], self.page[at.contexts : at.rows]
        self._rows, self.places = self.page[at.rows : at.places], self.page[at.places : at.wishes]
        self.wishes = self.page[at.wishes : at.seats].view(-1, NUM_WISHES)
        self._seats, self._items = self.page[at.seats : at.items], self.page[at.items : at.runs]

    def send(self, step: RowStep, runs: Runs, wishes: Int32, seating: Seating | None = None) -> Int32:
        """Bring a step to the device in one copy. Returns its query starts [num_rows + 1] on the host."""
        packed, count, longest = runs.packed(self.layout.runs) if runs.heads else (None, 0, 0)
        size = self.layout.runs + (0 if packed is None else len(packed))
        if size > len(self.page):
            self._write_directly(runs)
            packed, size = None, self.layout.runs
        host = torch.empty(size, dtype=torch.int32, pin_memory=self.device.type == "cuda")
        page = host.numpy()
        starts = fill(page[: self.layout.runs], self.layout, step, wishes, self.scratch_row, seating)
        if packed is not None:
            page[self.layout.runs :] = packed
        self.page[:size].copy_(host, non_blocking=True)
        if packed is not None:
            heads = self.page[self.layout.runs : self.layout.runs + count * RUN_FIELDS].view(count, RUN_FIELDS)
            self.kernels.scatter(self.page, heads, longest, self.tokens, self.blocks)
        runs.clear()
        return starts

    def send_masks(self, masks: Masks, num_rows: int) -> None:
        """Bring the masks of the first ``num_rows`` rows to the device. The host may write them again when what was drawn under
        them is known."""
        if self._mask_page is None or self._mask_page.masks is not masks:
            self._mask_page = MaskPage(masks, self.device)
        self.masks[:num_rows].copy_(self._mask_page.first(num_rows, self.masks.shape[1]), non_blocking=True)

    def blank(self) -> None:
        """Put a step without rows on the page: all of it is padding."""
        self.page[: self.layout.runs].copy_(self._blank)

    def _write_directly(self, runs: Runs) -> None:
        """More than a page holds, as when many long prompts are found in the cache at once: run by run."""
        for (table, row, column), values in zip(runs.heads, runs.values, strict=True):
            target = (self.tokens, self.blocks)[table][row, column : column + len(values)]
            target.copy_(torch.tensor(values, dtype=torch.int32))

    def batch(
        self, num_tokens: int, decode: bool, backend: DeviceAttention, host: AttnMeta | None, shared: bool = False
    ) -> ForwardBatch:
        """The tokens of the step whose page is on the device, padded to ``num_tokens``. Launches kernels; can be captured.
        ``shared``: look at the seats on the page."""
        max_rows = self.max_rows(num_tokens)
        rows = (self._starts[: max_rows + 1], self._contexts[:max_rows], self._rows[:max_rows])
        out = (self.token_ids[:num_tokens], self.positions[:num_tokens], self.slots[:num_tokens])
        self.kernels.expand(rows, (self.tokens, self.blocks), out)
        seated = (self._seats[:max_rows], self._items) if shared else None
        meta = DeviceMeta(*rows, self.blocks, out[2], self.block_size, decode, host, seated)
        return ForwardBatch(out[0], out[1], (backend.plan_on_device(meta),), self.places[:max_rows])

    def max_rows(self, num_tokens: int) -> int:
        """How many rows a step of that many tokens can have."""
        return min(num_tokens, self.scratch_row)

    def on_host(self, step: RowStep, starts: Int32, rows: Rows, num_tokens: int) -> AttnMeta:
        """The step as host arrays, for a backend that looks at lengths where it may."""
        tables = rows.block_tables[0]
        return AttnMeta(starts.astype(np.int64), step.ends, step.rows, tables, self.block_size, self.slots[:num_tokens])
