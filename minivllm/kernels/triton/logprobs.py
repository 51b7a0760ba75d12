"""Logprobs of the tokens that were chosen, and of the likeliest ones.

A logprob is a logit minus the logarithm of all exponents' sum; what is asked for beside the chosen token's is a handful of the
best out of a vocabulary of 150,000. Sorting that would be a waste: the best of a few are found by looking for the maximum as
often as there are places, in registers. A program does so for one part of a row and a second kernel for what the parts found,
so each logit is read once.

Equal logits are taken in the order of their ids, however the row was cut. Logits are raw: no temperature, no penalty. Minus
infinity is a token that is ruled out; a row with NaN gets some numbers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minivllm.kernels.reference import RowLogprobs
from minivllm.kernels.triton.chip import Chip, let_next_start, wait_for_previous

_BLOCK = 4096  # logits that a program holds
MAX_TOP = 20  # of a row: what the OpenAI API allows; each costs one more look at what is held
TOPS = (0, 1, 5, MAX_TOP)  # the kernels are compiled for so many; a call takes the next


@triton.jit
def _pick(value, ids, open, ids_out, values_out, TOP: tl.constexpr, NO_ID: tl.constexpr):
    """Store the ``TOP`` largest of ``value`` where ``open``, in falling order, and their ids. NO_ID where there are no more."""
    for place in range(TOP):
        best = tl.max(tl.where(open, value, float("-inf")), 0)
        chosen = tl.min(tl.where(open & (value == best), ids, NO_ID), 0)
        tl.store(ids_out + place, chosen)
        tl.store(values_out + place, best)
        open = open & (ids != chosen)


@triton.jit
def _parts(
    logits, chosen, peaks, sums, ahead, ids, values, stride,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, TOP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One part of one row: its maximum, sum of exponents, how many logits are over the chosen one's, its largest."""
    let_next_start(EARLY)
    row, part = tl.program_id(0), tl.program_id(1)
    at = row * tl.num_programs(1) + part
    token = part * BLOCK + tl.arange(0, BLOCK)
    inside = token < VOCAB
    logits += row.to(tl.int64) * stride
    wait_for_previous(EARLY)
    value = tl.load(logits + token, mask=inside, other=float("-inf"))
    mine = tl.load(logits + tl.load(chosen + row))
    peak = tl.max(value, 0)
    safe = tl.where(peak == float("-inf"), 0.0, peak)
    tl.store(peaks + at, peak)
    tl.store(sums + at, tl.sum(tl.exp(value - safe), 0))
    tl.store(ahead + at, tl.sum((value > mine).to(tl.int32), 0))
    if TOP > 0:
        _pick(value, token, inside, ids + at * TOP, values + at * TOP, TOP, VOCAB)


@triton.jit(do_not_specialize=["num_parts"])
def _whole(
    logits, chosen, peaks, sums, ahead, ids, values, logprobs, ranks, top_ids, top_logprobs, stride, num_parts,
    VOCAB: tl.constexpr, PARTS: tl.constexpr, HELD: tl.constexpr, TOP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A row from its parts."""
    let_next_start(EARLY)
    row = tl.program_id(0)
    part = tl.arange(0, PARTS)
    real = part < num_parts
    wait_for_previous(EARLY)
    peak = tl.load(peaks + row * num_parts + part, mask=real, other=float("-inf"))
    total = tl.load(sums + row * num_parts + part, mask=real, other=0.0)
    highest = tl.max(peak, 0)
    safe = tl.where(highest == float("-inf"), 0.0, highest)
    norm = safe + tl.log(tl.sum(total * tl.exp(tl.where(peak == float("-inf"), safe, peak) - safe), 0))
    mine = tl.load(logits + row.to(tl.int64) * stride + tl.load(chosen + row))
    tl.store(logprobs + row, mine - norm)
    tl.store(ranks + row, 1 + tl.sum(tl.load(ahead + row * num_parts + part, mask=real, other=0), 0))
    if TOP > 0:
        held = tl.arange(0, HELD)
        there = held < num_parts * TOP
        value = tl.load(values + row * num_parts * TOP + held, mask=there, other=float("-inf"))
        token = tl.load(ids + row * num_parts * TOP + held, mask=there, other=VOCAB)
        _pick(value, token, there & (token < VOCAB), top_ids + row * TOP, top_logprobs + row * TOP, TOP, VOCAB)
        tl.debug_barrier()  # the places were written by one thread each
        place = row * TOP + tl.arange(0, 32)
        filled = tl.arange(0, 32) < TOP
        tl.store(top_logprobs + place, tl.load(top_logprobs + place, mask=filled) - norm, mask=filled)


class Logprobs:
    """Both kernels. Holds nothing that changes."""

    def __init__(self, chip: Chip) -> None:
        self._launch, self._early, self._options = chip.launch, chip.early_launch, chip.launch_options

    def of(self, logits: Tensor, chosen: Tensor, num_top: int) -> RowLogprobs:
        """See ``reference.logprobs``. Raises ValueError for more than ``MAX_TOP`` tokens or more than there are."""
        num_rows, vocab_size = logits.shape
        if not 0 <= num_top <= min(MAX_TOP, vocab_size):
            raise ValueError(f"{num_top} likeliest tokens were asked for, of {vocab_size}; {MAX_TOP} can be had")
        num_parts, wanted = triton.cdiv(vocab_size, _BLOCK), num_top
        num_top = min(next(top for top in TOPS if top >= num_top), vocab_size)

        def made(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=logits.device)

        ranks, top_ids = made(num_rows, dtype=torch.int32), made(num_rows, num_top, dtype=torch.int32)
        found = RowLogprobs(made(num_rows), ranks, top_ids, made(num_rows, num_top))
        asked = RowLogprobs(found.logprobs, found.ranks, found.top_ids[:, :wanted], found.top_logprobs[:, :wanted])
        if not num_rows:
            return asked
        peaks, sums, ahead = made(num_rows, num_parts), made(num_rows, num_parts), made(num_rows, num_parts, dtype=torch.int32)
        ids, values = made(num_rows, num_parts, num_top, dtype=torch.int32), made(num_rows, num_parts, num_top)
        parts = (peaks, sums, ahead, ids, values)
        self._launch(
            _parts, (num_rows, num_parts), logits, chosen, *parts, logits.stride(0), vocab_size, _BLOCK, num_top, self._early,
            num_warps=8, **self._options,
        )  # fmt: skip
        held = triton.next_power_of_2(max(num_parts * num_top, 1))
        self._launch(
            _whole, (num_rows,), logits, chosen, *parts, found.logprobs, found.ranks, found.top_ids, found.top_logprobs,
            logits.stride(0), num_parts, vocab_size, triton.next_power_of_2(num_parts), held, num_top, self._early,
            num_warps=4, **self._options,
        )  # fmt: skip
        return asked
