"""Where a row is cut by min_p, top_k and top_p: the lowest logit kept, found by search and without sorting.

Each of the three keeps the tokens from some logit upwards, so all a draw needs to know is that one number. It is the largest t
for which what lies at or above t is enough: k tokens, or p of the probability. A float's bits, a little turned, compare as an
unsigned integer, and its digits can be found one after the other from the highest: add up what the tokens that agree with the
digits found so far have in each of the 16 values of the next digit, and take the highest value at which the sum from the top
is enough. Eight readings of the row settle all 32 bits, where a sort would move it around some twenty times.

Parts of a row are added up by programs of their own. There is no kernel between two readings to bring the parts together: every
program of the next reading does that for itself first, which is cheaper than a launch.

A token's weight is exp(logit - best) in whole units of 2^-40, as in ``sampling/top_p.py``: sums of integers do not depend on
their order, so neither does the cut on how a row is split. Equals are kept or dropped together. The features act in the order
of ``sampling/sampler.py``: a token under min_p counts for nothing in top_k, and one under top_k for nothing in top_p.

Logits here are those after the temperature, as ``sampling.scaled`` computes them; the draw compares the same numbers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minivllm.kernels.triton.chip import Chip, let_next_start, wait_for_previous
from minivllm.kernels.triton.sampling import scaled, split_row

_LANES = 128  # ids read at a time, one a thread
_READS = 4  # of them asked for before the first is looked at
_WARPS = 4
_MAX_PARTS = 64
_PROGRAMS_PER_SM = 16
_HIGHEST = 28  # shift of the first digit


@triton.jit
def _value(logits, ids, temperature, inverse, VOCAB: tl.constexpr):
    """Logits after the temperature; minus infinity where there is none."""
    logit = tl.load(logits + ids, mask=ids < VOCAB, other=float("-inf"))
    return tl.where(tl.abs(logit) < float("inf"), scaled(logit, temperature, inverse), float("-inf"))


@triton.jit
def _key(value):
    """An unsigned integer for each float, in the floats' order."""
    bits = value.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@triton.jit
def _float_of(key):
    """The float of a key."""
    bits = key.to(tl.int32, bitcast=True)
    return (bits ^ ((~bits >> 31) | -2147483648)).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["blocks_per_part"])
def _peaks(logits, temperatures, peaks, stride, blocks_per_part, VOCAB: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """The highest logit of a part into ``peaks`` [num_rows, num_parts]."""
    let_next_start(EARLY)
    row, part = tl.program_id(0), tl.program_id(1)
    start = part * blocks_per_part
    stop = tl.minimum(start + blocks_per_part, (VOCAB + BLOCK - 1) // BLOCK)
    logits += row.to(tl.int64) * stride
    wait_for_previous(EARLY)
    temperature = tl.load(temperatures + row)
    inverse = tl.div_rn(1.0, temperature)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    if temperature > 0.0:
        for block in range(start, stop):
            best = tl.maximum(best, _value(logits, block * BLOCK + tl.arange(0, BLOCK), temperature, inverse, VOCAB))
    tl.store(peaks + row * tl.num_programs(1) + part, tl.max(best, 0))


@triton.jit(do_not_specialize=["num_parts"])
def _floors(peaks, min_p, best, lowest, num_parts, PARTS: tl.constexpr, HAS_MIN_P: tl.constexpr, EARLY: tl.constexpr):
    """A row's highest logit, and the lowest that min_p keeps: ``best`` and ``lowest`` [num_rows]."""
    let_next_start(EARLY)
    row = tl.program_id(0)
    parts = tl.arange(0, PARTS)
    wait_for_previous(EARLY)
    top = tl.max(tl.load(peaks + row * num_parts + parts, mask=parts < num_parts, other=float("-inf")), 0)
    least = tl.minimum(top, float("-inf"))
    if HAS_MIN_P:
        share = tl.load(min_p + row)
        if share > 0.0:
            least = top + tl.log(share)
    tl.store(best + row, top)
    tl.store(lowest + row, least)


@triton.jit
def _decide(
    sums, state, want, row, num_rows, num_parts, PARTS: tl.constexpr, SHIFT: tl.constexpr, MASS: tl.constexpr
):
    """Settle the digit at SHIFT from the ``sums`` [num_rows, num_parts, 16] int64 of a reading.

    Returns the key's digits so far (uint32), what lies above them, and how much is needed. ``state`` [3, num_rows] int64 has
    the same from before.
    """
    parts, digits = tl.arange(0, PARTS), tl.arange(0, 16)
    at = sums + row.to(tl.int64) * num_parts * 16 + parts[:, None] * 16 + digits[None, :]
    total = tl.sum(tl.load(at, mask=(parts < num_parts)[:, None], other=0), 0)  # [16]
    if SHIFT == 28:
        above = tl.sum(total, 0) * 0
        prefix = above.to(tl.uint32)
        if MASS:
            needed = tl.maximum(tl.ceil(want.to(tl.float64) * tl.sum(total, 0).to(tl.float64)).to(tl.int64), 1)
        else:
            needed = want.to(tl.int64)
    else:
        prefix = tl.load(state + row).to(tl.uint32)
        above = tl.load(state + num_rows + row)
        needed = tl.load(state + 2 * num_rows + row)
    from_top = tl.sum(tl.where(digits[None, :] >= digits[:, None], total[None, :], 0), 1)
    digit = tl.max(tl.where(above + from_top >= needed, tl.arange(0, 16), 0), 0)
    above += tl.sum(tl.where(digits > digit, total, 0), 0)
    return prefix | (digit.to(tl.uint32) << SHIFT), above, needed


@triton.jit
def _asks(want, VOCAB: tl.constexpr, MASS: tl.constexpr):
    """Whether a row wants the cut: top_p under 1, or top_k from 1 to under the whole vocabulary."""
    return want < 1.0 if MASS else (want > 0) & (want < VOCAB)


@triton.jit(do_not_specialize=["blocks_per_part"])
def _narrow(
    logits, temperatures, wanted, best, lowest, sums_before, sums, state_before, state, stride, blocks_per_part,
    VOCAB: tl.constexpr, LANES: tl.constexpr, READS: tl.constexpr, PARTS: tl.constexpr, SHIFT: tl.constexpr,
    MASS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One reading of a part: counts (MASS: weights) by the digit at SHIFT, of tokens that agree with the digits before."""
    let_next_start(EARLY)
    row, part, num_rows, num_parts = tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1)
    wait_for_previous(EARLY)
    want, temperature = tl.load(wanted + row), tl.load(temperatures + row)
    if _asks(want, VOCAB, MASS) & (temperature > 0.0):
        top, least = tl.load(best + row), tl.load(lowest + row)
        inverse = tl.div_rn(1.0, temperature)
        if SHIFT < 28:
            prefix, above, needed = _decide(sums_before, state_before, want, row, num_rows, num_parts, PARTS, SHIFT + 4, MASS)
            if part == 0:
                tl.store(state + row, prefix.to(tl.int64))
                tl.store(state + num_rows + row, above)
                tl.store(state + 2 * num_rows + row, needed)
        logits += row.to(tl.int64) * stride
        start = part * blocks_per_part
        stop = tl.minimum(start + blocks_per_part, (VOCAB + LANES * READS - 1) // (LANES * READS))
        digits = tl.arange(0, 16)[:, None]
        found = tl.zeros((16, LANES), tl.int64 if MASS else tl.int32)
        for block in range(start, stop):
            for read in tl.static_range(READS):
                ids = (block * READS + read) * LANES + tl.arange(0, LANES)
                value = _value(logits, ids, temperature, inverse, VOCAB)
                key = _key(value)
                counted = ids < VOCAB
                if SHIFT < 28:
                    counted = counted & (((key ^ prefix) >> (SHIFT + 4)) == 0)
                if MASS:
                    counted = counted & (value >= least)
                    weight = (tl.exp(value - top) * 1099511627776.0).to(tl.int64)
                else:
                    weight = tl.full((LANES,), 1, tl.int32)
                digit = tl.where(counted, ((key >> SHIFT) & 15).to(tl.int32), 16)
                found += tl.where(digit[None, :] == digits, weight[None, :], 0)
        at = sums + (row.to(tl.int64) * num_parts + part) * 16 + tl.arange(0, 16)
        tl.store(at, tl.sum(found, 1).to(tl.int64))


@triton.jit(do_not_specialize=["num_parts"])
def _settle(
    temperatures, wanted, sums, state, lowest, num_parts,
    VOCAB: tl.constexpr, PARTS: tl.constexpr, MASS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The last digit, and with it the lowest logit kept, if no cut before was higher."""
    let_next_start(EARLY)
    row = tl.program_id(0)
    wait_for_previous(EARLY)
    want = tl.load(wanted + row)
    if _asks(want, VOCAB, MASS) & (tl.load(temperatures + row) > 0.0):
        key, _, _ = _decide(sums, state, want, row, tl.num_programs(0), num_parts, PARTS, 0, MASS)
        tl.store(lowest + row, tl.maximum(tl.load(lowest + row), _float_of(key)))


class Cutoff:
    """min_p, top_k and top_p as one number a row. Holds nothing that changes."""

    def __init__(self, chip: Chip) -> None:
        self._num_programs = chip.num_sms * _PROGRAMS_PER_SM
        self._launch, self._early, self._options = chip.launch, chip.early_launch, chip.launch_options

    def lowest_kept(
        self, logits: Tensor, temperatures: Tensor, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None
    ) -> Tensor:
        """The lowest logit / temperature that each row keeps, [num_rows] float32; minus infinity: everything.

        logits: [num_rows, vocab] float32, minus infinity for tokens that are ruled out. temperatures: [num_rows] float32;
        rows at 0 are greedy and have no cut. top_k: [num_rows] int32, 0 or the whole vocabulary keeps all; top_p: [num_rows]
        float32, 1 keeps all; min_p: [num_rows] float32, 0 keeps all. None: no row asks for it, and it costs nothing.
        """
        num_rows, vocab_size = logits.shape
        best, lowest = logits.new_empty((2, num_rows)).unbind()
        if not num_rows:
            return lowest
        block = _LANES * _READS
        _, per_part, num_parts = split_row(vocab_size, block, min(-(-self._num_programs // num_rows), _MAX_PARTS))
        grid, options = (num_rows, num_parts), {"num_warps": _WARPS, **self._options}
        peaks = logits.new_empty((num_rows, num_parts))
        self._launch(
            _peaks, grid, logits, temperatures, peaks, logits.stride(0), per_part, vocab_size, block, self._early, **options
        )
        self._launch(
            _floors, (num_rows,),
            peaks, min_p, best, lowest, num_parts, _MAX_PARTS, min_p is not None, self._early, num_warps=1, **self._options
        )
        for wanted, mass in ((top_k, False), (top_p, True)):
            if wanted is None:
                continue
            sums = torch.empty((2, num_rows, num_parts, 16), dtype=torch.int64, device=logits.device)
            state = torch.empty((2, 3, num_rows), dtype=torch.int64, device=logits.device)
            for shift in range(_HIGHEST, -1, -4):
                now = shift // 4 % 2
                self._launch(
                    _narrow, grid,
                    logits, temperatures, wanted, best, lowest, sums[1 - now], sums[now], state[1 - now], state[now],
                    logits.stride(0), per_part, vocab_size, _LANES, _READS, _MAX_PARTS, shift, mass, self._early, **options,
                )  # fmt: skip
            self._launch(
                _settle, (num_rows,),
                temperatures, wanted, sums[0], state[0], lowest, num_parts, vocab_size, _MAX_PARTS, mass, self._early, **options
            )
        return lowest
