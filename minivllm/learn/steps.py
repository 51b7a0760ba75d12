"""Why a rung is faster than the one below it, in sentences made from the figures of both.

Three things can change between two rungs. Less is computed (or moved): that is what the roofline sees, so it predicts the gain.
Work that waited for memory is now shared by more rows: the roofline sees this too. Or the time falls that neither explains:
launching, planning, copying, Python; this is measured as what a call takes beyond its prediction.
"""

from dataclasses import dataclass
from itertools import pairwise

from minivllm.learn.result import Ladder, Machine, RungResult

NOTABLE, MUCH = 1.1, 1.25  # a ratio below these is not worth a sentence


@dataclass(frozen=True)
class Step:
    """From one rung to the next that ran."""

    below: RungResult
    above: RungResult
    measured: float  # output tokens a second: above over below
    predicted: float  # the same, by the roofline
    sentences: tuple[str, ...]


def steps(ladder: Ladder) -> tuple[Step, ...]:
    """Every step up."""
    ran = ladder.ran
    return tuple(_step(below, above, ladder.machine) for below, above in pairwise(ran))


def _step(below: RungResult, above: RungResult, machine: Machine) -> Step:
    measured = above.tokens_per_s / below.tokens_per_s
    predicted = below.each(below.predicted_s) / above.each(above.predicted_s)
    sentences = [
        *_work(below, above),
        *_cache(below, above),
        *_limit(below, above, machine),
        f"The roofline predicts {ratio(predicted)}, measured is {ratio(measured)}.",
        *_rest(below, above),
        *_waits(below, above),
    ]
    return Step(below, above, measured, predicted, tuple(sentences))


def _work(below: RungResult, above: RungResult) -> list[str]:
    """What is computed and moved for each output token, where it changed."""
    found = []
    tokens = below.each(below.cost.tokens), above.each(above.cost.tokens)
    flops = below.each(below.cost.flops), above.each(above.cost.flops)
    if _notable(*tokens) or _notable(*flops):
        found.append(
            f"For each output token {tokens[1]:.1f} tokens pass the model, where {tokens[0]:.1f} did: "
            f"{_times(flops[0] / flops[1], 'fewer', 'more')} operations."
        )
    if above.cost.padding and not below.cost.padding:
        found.append(f"Of all places computed, {above.cost.padding / above.cost.tokens:.0%} are padding.")
    elif below.cost.padding and not above.cost.padding:
        found.append(f"No place is padding, where {below.cost.padding / below.cost.tokens:.0%} were.")
    if above.found:
        share = above.found / (above.found + above.cost.tokens)
        if not below.found:
            found.append(f"The prefix cache had {above.found:,} prompt tokens, {share:.0%} of all that had to be known.")
    calls = below.cost.calls / below.output_tokens, above.cost.calls / above.output_tokens
    if calls[0] / calls[1] >= NOTABLE:
        found.append(f"A call gives {1 / calls[1]:.1f} output tokens, not {1 / calls[0]:.1f}, for one reading of the weights.")
    return found


def _cache(below: RungResult, above: RungResult) -> list[str]:
    """How much of the cache is moved for each output token, where it changed."""
    before, after = below.each(below.cost.kv_bytes), above.each(above.cost.kv_bytes)
    if not before or not _notable(before, after):
        return []
    text = f"{_times(before / after, 'less', 'more')} cache is moved, {size(after)} for each output token"
    if above.cost.kv_padding_bytes:
        text += f", of which {above.cost.kv_padding_bytes / above.cost.kv_bytes:.0%} is padding"
    return [text + "."]


def _limit(below: RungResult, above: RungResult, machine: Machine) -> list[str]:
    """Which of the machine's limits it is under, where that moved."""
    if not _notable(below.intensity, above.intensity):
        return []
    who = "memory" if above.waits_for_memory else "arithmetic"
    return [
        f"A byte moved serves {above.intensity:.1f} operations, where it served {below.intensity:.1f}; from "
        f"{machine.ridge:.1f} on arithmetic is the limit here. Call by call, most of the predicted time is that of {who}."
    ]


def _rest(below: RungResult, above: RungResult) -> list[str]:
    """What the roofline does not see."""
    before_s, after_s = below.beyond_s, above.beyond_s
    if before_s <= 0 or after_s <= 0 or not _notable(before_s, after_s):
        return []
    return [f"Beyond its prediction a call takes {duration(after_s)}, where it took {duration(before_s)}."]


def _waits(below: RungResult, above: RungResult) -> list[str]:
    """How long users wait, where it changed much and both served the same requests."""
    if below.requests != above.requests:
        return []
    found = []
    for name, before, after in (
        ("half of the first tokens are there after", below.ttft_s.p50, above.ttft_s.p50),
        ("the longest hundredth of the waits between tokens begins at", below.itl_s.p99, above.itl_s.p99),
    ):
        if before and after and max(before, after) >= MUCH * min(before, after):
            found.append(f"{name} {duration(after)}, not {duration(before)}")
    text = "; ".join(found)
    return [text[0].upper() + text[1:] + "."] if found else []


def _notable(before: float, after: float) -> bool:
    return max(before, after) >= NOTABLE * min(before, after)


def _times(factor: float, less: str, more: str) -> str:
    """A factor as words: "3.1x fewer"."""
    return f"{ratio(factor)} {less}" if factor >= 1 else f"{ratio(1 / factor)} {more}"


def ratio(value: float) -> str:
    """A factor with two or three digits."""
    return f"{value:,.0f}x" if value >= 20 else f"{value:.1f}x" if value >= 2 else f"{value:.2f}x"


def duration(seconds: float) -> str:
    """A time with three digits."""
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def size(num_bytes: float) -> str:
    """A number of bytes, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"
