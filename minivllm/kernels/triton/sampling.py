"""From logits to a token in one reading of them: argmax, or the Gumbel-max draw with noise made on the spot.

argmax(logit / temperature + g), each g = -ln(-ln u) of its own uniform u, draws from the softmax (``sampling/gumbel.py``).
No sum over the vocabulary, so parts of it can be searched by different programs in any order: a row of one request fills the
chip as well as 256 rows do. Each part leaves its best score, that token's id and whether it saw only finite logits; a second,
tiny kernel takes the best of the parts. Ties go to the lowest id everywhere, so the answer is the same however a row was split.

The noise of an id is a word of Philox, a function of (id, position, seed, ...) in integers (Salmon et al., 2011): bit for bit
the CPU's. One call of ten rounds makes the words of four neighbouring ids. Here a thread reads just these four logits, 16
bytes, so the words are used where they are made and nothing is passed between threads.

Logarithms are in float32, by an instruction of the chip, and must be right where u is close to 1: the candidates that win by
noise are there. So ln u is taken of u itself below 7/8, and above as a power series of 1 - u, which comes from the complement
of the integer word rather than from a difference of floats.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minivllm.kernels.triton.chip import Chip, let_next_start, wait_for_previous

_QUADS = 256  # groups of four ids of a program at a time
_WARPS = 4
_PROGRAMS_PER_SM = 32  # at most: enough that the last ones to run leave little of the chip idle
NUM_WISHES = 6  # columns of ``Draw.draw``'s wishes


@triton.jit
def philox4x32(a, b, c, d, key0, key1):
    """Four random words (uint32) of the counter (a, b, c, d) and the key, all uint32: ``sampling/philox.py``."""
    for _ in tl.static_range(10):
        product0 = a.to(tl.uint64) * 0xD2511F53  # one wide multiplication gives both halves
        product1 = c.to(tl.uint64) * 0xCD9E8D57
        a = (product1 >> 32).to(tl.uint32) ^ b ^ key0
        c = (product0 >> 32).to(tl.uint32) ^ d ^ key1
        b = product1.to(tl.uint32)
        d = product0.to(tl.uint32)
        key0 = tl.add(key0, 0x9E3779B9, sanitize_overflow=False)
        key1 = tl.add(key1, 0xBB67AE85, sanitize_overflow=False)
    return a, b, c, d


@triton.jit
def _ln(x, COMPILED: tl.constexpr):
    """ln x of a normal number. COMPILED: by the chip's own instruction, wrong by 2^-22 at most or, away from 1, that share."""
    if COMPILED:
        log2 = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
        return log2 * 0.6931471805599453
    return tl.log(x)


@triton.jit
def gumbel(word, COMPILED: tl.constexpr):
    """-ln(-ln u) for u = (word + 0.5) * 2^-32, within some 2e-6 at both ends."""
    u = word.to(tl.float32) * 2.0**-32 + 2.0**-33
    rest = (word ^ 0xFFFFFFFF).to(tl.float32) * 2.0**-32 + 2.0**-33  # 1 - u
    series = 1.0 / 8
    for n in tl.static_range(7, 0, -1):
        series = series * rest + 1.0 / n
    exponential = tl.where(rest < 0.125, series * rest, -_ln(u, COMPILED))
    return -_ln(exponential, COMPILED)


@triton.jit
def scaled(logit, temperature, inverse):
    """``logit / temperature`` as rounded by a division, at the price of three multiplications; ``inverse`` = 1 / temperature.

    What is left over after the first guess is exact in a fused multiply-add, and corrects it. NaN where the logit is infinite.
    """
    guess = logit * inverse
    return tl.fma(tl.fma(-guess, temperature, logit), inverse, guess)


@triton.jit
def _better(best, chosen, score, ids):
    """The higher score and its id; what was there stays among equals. NaN is never higher."""
    higher = score > best
    return tl.where(higher, score, best), tl.where(higher, ids, chosen)


@triton.jit
def _four(tile, QUADS: tl.constexpr):
    """The four columns of ``tile`` [QUADS, 4]; each thread holds whole rows, so nothing moves."""
    even, odd = tl.split(tl.reshape(tile, (QUADS, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _read(logits, at, VOCAB: tl.constexpr, QUADS: tl.constexpr, MASKED: tl.constexpr):
    """The next 4 * QUADS logits as four tensors [QUADS], minus infinity beyond the vocabulary; and NaN where one is not
    finite, else 0 [QUADS]. MASKED: minus infinity is allowed."""
    ids = at + 4 * tl.arange(0, QUADS)[:, None] + tl.arange(0, 4)[None, :]
    tile = tl.load(logits + ids, mask=ids < VOCAB, other=0.0)
    checked = tl.where(tile == float("-inf"), 0.0, tile) if MASKED else tile
    bad0, bad1, bad2, bad3 = _four(checked * 0.0, QUADS)
    first, second, third, fourth = _four(tl.where(ids < VOCAB, tile, float("-inf")), QUADS)
    return first, second, third, fourth, (bad0 + bad1) + (bad2 + bad3)


@triton.jit
def _search_likeliest(logits, start, stop, VOCAB: tl.constexpr, QUADS: tl.constexpr, MASKED: tl.constexpr):
    """The highest logits of a part by place in the tile, their ids, and NaN where a logit was not finite."""
    best = tl.full((QUADS,), float("-inf"), tl.float32)
    chosen = tl.zeros((QUADS,), tl.int32)
    bad = tl.zeros((QUADS,), tl.float32)
    for block in range(start, stop):
        at = block * (4 * QUADS)
        first, second, third, fourth, spoiled = _read(logits, at, VOCAB, QUADS, MASKED)
        ids = at + 4 * tl.arange(0, QUADS)
        bad += spoiled
        best, chosen = _better(best, chosen, first, ids)
        best, chosen = _better(best, chosen, second, ids + 1)
        best, chosen = _better(best, chosen, third, ids + 2)
        best, chosen = _better(best, chosen, fourth, ids + 3)
    return best, chosen, bad


@triton.jit
def _score(logit, word, temperature, inverse, lowest, FILTERED: tl.constexpr, COMPILED: tl.constexpr):
    """Scaled logit plus noise; minus infinity for what is under ``lowest``."""
    value = scaled(logit, temperature, inverse)
    score = value + gumbel(word, COMPILED)
    return tl.where(value >= lowest, score, float("-inf")) if FILTERED else score


@triton.jit
def _search_drawn(
    logits, wish, temperature, lowest, start, stop,
    VOCAB: tl.constexpr, QUADS: tl.constexpr, MASKED: tl.constexpr, FILTERED: tl.constexpr, PURPOSE: tl.constexpr,
    COMPILED: tl.constexpr,
):  # fmt: skip
    """As ``_search_likeliest`` with the scores of a draw."""
    position = tl.load(wish + 1).to(tl.uint32, bitcast=True)
    key0 = tl.load(wish + 3).to(tl.uint32, bitcast=True)
    key1 = tl.load(wish + 4).to(tl.uint32, bitcast=True)
    sample_index = tl.load(wish + 5).to(tl.uint32, bitcast=True)
    purpose = tl.zeros_like(position) + PURPOSE
    inverse = tl.div_rn(1.0, temperature)
    best = tl.full((QUADS,), float("-inf"), tl.float32)
    chosen = tl.zeros((QUADS,), tl.int32)
    bad = tl.zeros((QUADS,), tl.float32)
    for block in range(start, stop):
        at = block * (4 * QUADS)
        first, second, third, fourth, spoiled = _read(logits, at, VOCAB, QUADS, MASKED)
        ids = at + 4 * tl.arange(0, QUADS)
        bad += spoiled
        counter = (block * QUADS + tl.arange(0, QUADS)).to(tl.uint32, bitcast=True)
        word0, word1, word2, word3 = philox4x32(counter, position, sample_index, purpose, key0, key1)
        best, chosen = _better(best, chosen, _score(first, word0, temperature, inverse, lowest, FILTERED, COMPILED), ids)
        best, chosen = _better(best, chosen, _score(second, word1, temperature, inverse, lowest, FILTERED, COMPILED), ids + 1)
        best, chosen = _better(best, chosen, _score(third, word2, temperature, inverse, lowest, FILTERED, COMPILED), ids + 2)
        best, chosen = _better(best, chosen, _score(fourth, word3, temperature, inverse, lowest, FILTERED, COMPILED), ids + 3)
    return best, chosen, bad


@triton.jit(do_not_specialize=["blocks_per_part"])
def _search(
    logits, wishes, lowest, parts, stride, blocks_per_part, VOCAB: tl.constexpr, QUADS: tl.constexpr,
    GREEDY: tl.constexpr, MASKED: tl.constexpr, FILTERED: tl.constexpr, PURPOSE: tl.constexpr, COMPILED: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """The best of one part of one row into ``parts`` [3, num_rows, num_parts] int32: score as float bits, id, finite."""
    let_next_start(EARLY)
    row, part, num_parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    start = part * blocks_per_part
    stop = tl.minimum(start + blocks_per_part, (VOCAB + 4 * QUADS - 1) // (4 * QUADS))
    logits += row.to(tl.int64) * stride
    wait_for_previous(EARLY)
    if GREEDY:
        best, chosen, bad = _search_likeliest(logits, start, stop, VOCAB, QUADS, MASKED)
    else:
        wish = wishes + row * 6
        temperature = tl.load(wish + 2).to(tl.float32, bitcast=True)
        least = tl.load(lowest + row) if FILTERED else 0.0
        if temperature > 0.0:
            best, chosen, bad = _search_drawn(
                logits, wish, temperature, least, start, stop, VOCAB, QUADS, MASKED, FILTERED, PURPOSE, COMPILED
            )
        else:
            best, chosen, bad = _search_likeliest(logits, start, stop, VOCAB, QUADS, MASKED)
    top = tl.max(best, 0)
    token = tl.min(tl.where(best == top, chosen, VOCAB - 1), 0)
    finite = tl.min((bad == 0.0).to(tl.int32), 0)
    plane = tl.num_programs(0) * num_parts
    at = parts + row * num_parts + part
    tl.store(at, top.to(tl.int32, bitcast=True))
    tl.store(at + plane, token)
    tl.store(at + 2 * plane, finite)


@triton.jit(do_not_specialize=["num_parts"])
def _best_part(parts, token_ids, finite, num_parts, VOCAB: tl.constexpr, PARTS: tl.constexpr, EARLY: tl.constexpr):
    """A row's answer from those of its parts."""
    let_next_start(EARLY)
    row = tl.program_id(0)
    plane = tl.num_programs(0) * num_parts
    columns = tl.arange(0, PARTS)
    inside = columns < num_parts
    at = parts + row * num_parts + columns
    wait_for_previous(EARLY)
    score = tl.load(at, mask=inside, other=-8388608).to(tl.float32, bitcast=True)  # the bits of minus infinity
    ids = tl.load(at + plane, mask=inside, other=VOCAB - 1)
    fine = tl.load(at + 2 * plane, mask=inside, other=1)
    token = tl.min(tl.where(score == tl.max(score, 0), ids, VOCAB - 1), 0)
    tl.store(token_ids + row, token.to(tl.int64))
    tl.store(finite + row, tl.min(fine, 0) > 0)


class Draw:
    """Tokens from logits. Holds nothing that changes."""

    def __init__(self, chip: Chip, purpose: int = 0) -> None:
        """``purpose``: what the random numbers are for, the last word of Philox's counter (``sampling/philox.py``)."""
        self._num_programs, self._purpose = chip.num_sms * _PROGRAMS_PER_SM, purpose
        self._compiled, self._launch = chip.name != "interpreter", chip.launch
        self._early, self._options = chip.early_launch, chip.launch_options

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """See ``reference.choose``."""
        return self._searched(logits, None, None, masked=False)

    def draw(
        self, logits: Tensor, wishes: Tensor, lowest: Tensor | None = None, *, masked: bool = False
    ) -> tuple[Tensor, Tensor]:
        """One token per row, [num_rows] int64, and whether the row's logits are finite, [num_rows] bool.

        logits: [num_rows, vocab] float32. wishes: [num_rows, 6] int32: the row of the sequence (not looked at), position,
        bits of the float32 temperature (0: the likeliest token), low and high half of the seed, sample_index. lowest:
        [num_rows] float32, from ``Cutoff``: tokens whose logit / temperature is under it are not drawn. ``masked``: minus
        infinity is a token that is ruled out, not an error. A row that is not finite gets some token.
        """
        return self._searched(logits, wishes, lowest, masked=masked)

    def _searched(
        self, logits: Tensor, wishes: Tensor | None, lowest: Tensor | None, *, masked: bool
    ) -> tuple[Tensor, Tensor]:
        """Both kernels."""
        num_rows, vocab_size = logits.shape
        device = logits.device
        token_ids = torch.empty(num_rows, dtype=torch.int64, device=device)
        finite = torch.empty(num_rows, dtype=torch.bool, device=device)
        if not num_rows:
            return token_ids, finite
        num_blocks, blocks_per_part, num_parts = split_row(vocab_size, 4 * _QUADS, -(-self._num_programs // num_rows))
        parts = torch.empty((3, num_rows, num_parts), dtype=torch.int32, device=device)
        self._launch(
            _search, (num_rows, num_parts),
            logits, wishes, lowest, parts, logits.stride(0), blocks_per_part, vocab_size, _QUADS,
            wishes is None, masked, lowest is not None, self._purpose, self._compiled, self._early,
            num_warps=_WARPS, **self._options,
        )  # fmt: skip
        self._launch(
            _best_part, (num_rows,),
            parts, token_ids, finite, num_parts, vocab_size, triton.next_power_of_2(num_blocks), self._early,
            num_warps=1, **self._options,
        )  # fmt: skip
        return token_ids, finite


def split_row(width: int, block: int, most_parts: int) -> tuple[int, int, int]:
    """A row of ``width`` in parts of whole blocks, at most ``most_parts``: number of blocks, of blocks a part, of parts."""
    num_blocks = -(-width // block)
    blocks_per_part = -(-num_blocks // most_parts)
    return num_blocks, blocks_per_part, -(-num_blocks // blocks_per_part)
