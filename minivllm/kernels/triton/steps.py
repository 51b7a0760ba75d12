"""The kernels that turn a step's page of integers into what the model reads.

A plan holds differences: new tokens, new blocks, how many tokens each row computes. The host writes them on one page
(``runner/page.py``) and copies it. Everything that has a size of its own per *token* (ids, positions, KV slots) is worked out
here, on the device, from what it has kept: so the host's work does not grow with a prompt's length, and a token that was
sampled a moment ago is read where it was written, although no host knows it yet.
"""

import triton
import triton.language as tl
from torch import Tensor

from minivllm.kernels.triton.chip import Chip, let_next_start, wait_for_previous

_BLOCK = 128


@triton.jit(do_not_specialize=["tokens_stride", "blocks_stride"])
def _scatter(page, runs, tokens, blocks, tokens_stride, blocks_stride, BLOCK: tl.constexpr, FIELDS: tl.constexpr):
    """Write every run of values into its table. Grid: (runs, pieces of the longest run)."""
    run = runs + tl.program_id(0) * FIELDS
    table, row, column = tl.load(run), tl.load(run + 1).to(tl.int64), tl.load(run + 2)
    length, source = tl.load(run + 3), tl.load(run + 4)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(page + source + at, mask=at < length)
    if table == 0:
        tl.store(tokens + row * tokens_stride + column + at, values, mask=at < length)
    else:
        tl.store(blocks + row * blocks_stride + column + at, values, mask=at < length)


@triton.jit(do_not_specialize=["num_tokens", "max_rows", "tokens_stride", "blocks_stride"])
def _expand(
    starts, contexts, rows, tokens, blocks, ids, positions, slots,
    num_tokens, max_rows, tokens_stride, blocks_stride,
    BLOCK_SIZE: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Id, position and KV slot of each token. A token's row is the last one that starts at or before it: a binary search."""
    wait_for_previous(EARLY)
    let_next_start(EARLY)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = tl.zeros([BLOCK], tl.int32)
    for i in tl.static_range(BITS):
        further = place + (1 << (BITS - 1 - i))
        inside = further < max_rows
        place = tl.where(inside & (tl.load(starts + further, mask=inside, other=0) <= token), further, place)
    real = token < tl.load(starts + max_rows)  # the others are padding
    row = tl.load(rows + place, mask=real, other=0).to(tl.int64)
    left = tl.load(starts + place + 1, mask=real, other=0) - token  # tokens of the row from this one on
    position = tl.load(contexts + place, mask=real, other=0) - left
    position = tl.where(real, position, 0)
    found = tl.load(tokens + row * tokens_stride + position, mask=real, other=0)
    block = tl.load(blocks + row * blocks_stride + position // BLOCK_SIZE, mask=real, other=0)
    slot = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
    kept = token < num_tokens
    tl.store(ids + token, found.to(tl.int64), mask=kept)
    tl.store(positions + token, position.to(tl.int64), mask=kept)
    tl.store(slots + token, tl.where(real, slot, token % BLOCK_SIZE), mask=kept)


@triton.jit(do_not_specialize=["num_rows", "tokens_stride"])
def _put(
    chosen, finite, wishes, tokens, out, num_rows, tokens_stride,
    FIELDS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Write each row's new token where the next step reads it, and for the host: the token, or -1 - token of a bad row."""
    wait_for_previous(EARLY)
    let_next_start(EARLY)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = at < num_rows
    token = tl.load(chosen + at, mask=here, other=0).to(tl.int32)
    row = tl.load(wishes + at * FIELDS, mask=here, other=0).to(tl.int64)
    position = tl.load(wishes + at * FIELDS + 1, mask=here, other=0)
    tl.store(tokens + row * tokens_stride + position, token, mask=here)
    good = tl.load(finite + at, mask=here, other=0) != 0
    tl.store(out + at, tl.where(good, token, -1 - token), mask=here)


class StepKernels:
    """The three kernels. Holds nothing that changes."""

    def __init__(self, chip: Chip, block_size: int, max_num_seqs: int) -> None:
        self._block_size, self._bits = block_size, max(1, max_num_seqs.bit_length())
        self._launch, self._early, self._options = chip.launch, chip.early_launch, chip.launch_options

    def scatter(self, page: Tensor, runs: Tensor, longest: int, tokens: Tensor, blocks: Tensor) -> None:
        """Write the runs of ``page`` [any] int32 into ``tokens`` and ``blocks`` [rows, columns] int32.

        ``runs`` [num_runs, 5] int32: table (0 tokens, 1 blocks), row, column, number of values, where on the page they stand.
        """
        grid = (runs.shape[0], triton.cdiv(longest, 1024))
        strides = (tokens.stride(0), blocks.stride(0))
        self._launch(_scatter, grid, page, runs, tokens, blocks, *strides, BLOCK=1024, FIELDS=runs.shape[1])

    def expand(
        self, rows: tuple[Tensor, Tensor, Tensor], tables: tuple[Tensor, Tensor], out: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        """Fill ``out``: ids, positions and KV slots, [num_tokens] int64 each, padding included.

        ``rows``: query starts [max_rows + 1], context lengths and rows [max_rows], int32, as in ``DeviceMeta``. ``tables``:
        tokens and blocks of every row. A padded token is token 0 at position 0 with a slot in block 0.
        """
        (starts, contexts, places), (tokens, blocks), num_tokens = rows, tables, out[0].shape[0]
        self._launch(
            _expand, (triton.cdiv(num_tokens, _BLOCK),),
            starts, contexts, places, tokens, blocks, *out, num_tokens, contexts.shape[0], tokens.stride(0), blocks.stride(0),
            BLOCK_SIZE=self._block_size, BITS=self._bits, BLOCK=_BLOCK, EARLY=self._early, **self._options,
        )  # fmt: skip

    def put(self, chosen: Tensor, finite: Tensor, wishes: Tensor, tokens: Tensor, out: Tensor) -> None:
        """Put ``chosen`` [num_rows] into ``tokens`` at the (row, position) of ``wishes`` [num_rows, fields] int32; fill ``out``
        [num_rows] int32: the token, or -1 - token where the row is not ``finite``."""
        num_rows = chosen.shape[0]
        self._launch(
            _put, (triton.cdiv(num_rows, _BLOCK),),
            chosen, finite, wishes, tokens, out, num_rows, tokens.stride(0),
            FIELDS=wishes.shape[1], BLOCK=_BLOCK, EARLY=self._early, **self._options,
        )  # fmt: skip
