"""``mini-vllm explain FILE [ID]``: why the requests of a recording took as long as they did.

Without an id a line for each request, the slowest first, with what it waited for most; with one, all that is known of it. A
recording knows nothing of the time before a request is handed to the engine but its length, and nothing of its delivery.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import Final

import msgspec

from minivllm.cli.options import Parser
from minivllm.errors import InvalidOption
from minivllm.observe.explain import Explanations
from minivllm.observe.explanation import Explanation, Waiting
from minivllm.observe.recording import Recording

BAR: Final = 40  # characters of a request's whole time
NAMED: Final = 2  # of those behind whom it waited
_COLUMNS: Final = ("queue", "prefill", "decode", "preempted")


def run(argv: Sequence[str]) -> int:
    """Print the explanations."""
    parser = Parser("explain", "Say where the time of a recording's requests went (--record-steps).", "FILE [ID] [options]")
    parser.add_argument("file", metavar="FILE", help="recording that mini-vllm serve --record-steps wrote")
    parser.add_argument("id", nargs="?", metavar="ID", help="a request's id, or the beginning of one; none: a line for each")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each request")
    found = parser.read(argv)
    book, last_s = read_all(Recording(found.file))
    names = [name for name in book.ids if found.id is None or name.startswith(found.id)]
    if found.id is not None and not names and book.explain(found.id, last_s) is not None:
        names = [found.id]  # one of a request's texts
    if not names:
        which = "no request" if found.id is None else f"no request {found.id!r}"
        raise InvalidOption(f"There is {which} in {found.file}; without an id, all that are there are listed.")
    told = [told for name in names if (told := book.explain(name, last_s)) is not None]
    if found.json:
        lines: Iterator[str] = (msgspec.json.encode(one).decode() for one in told)
    else:
        lines = table(told) if found.id is None else (line for one in told for line in whole(one))
    for line in lines:
        sys.stdout.write(line + "\n")
    return 0


def read_all(recording: Recording) -> tuple[Explanations, float]:
    """Every request of a recording, and when that ends."""
    book, last_s = Explanations(recording.header.model, capacity=2**31), 0.0
    for record in recording:
        book.observe(record)
        last_s = max(last_s, record.collected_s)
    return book, last_s


def table(told: Sequence[Explanation]) -> Iterator[str]:
    """A line for each request, the slowest first."""
    width = max(len("request"), *(len(one.id) for one in told))
    yield f"{'request':<{width}} {'total':>9} " + " ".join(f"{name:>9}" for name in _COLUMNS) + "  out  mostly"
    for one in sorted(told, key=lambda one: -one.total_s):
        times = " ".join(f"{_spent(one, name):>8.3f}s" for name in _COLUMNS)
        yield f"{one.id:<{width}} {one.total_s:>8.3f}s {times} {one.output_tokens:>4}  {_mostly(one)}"


def whole(told: Explanation) -> Iterator[str]:
    """All that is known of one request."""
    state = "it runs still" if told.finish_reason is None else f"ended: {told.finish_reason}"
    yield f"{told.id}  {told.total_s:.3f} s, {state}"
    cached = f" ({told.cached_tokens} of them cached)" if told.cached_tokens else ""
    yield f"  {told.prompt_tokens} prompt tokens{cached}, {told.output_tokens} tokens generated; mostly {_mostly(told)}"
    yield ""
    scale = BAR / told.total_s if told.total_s > 0 else 0.0
    for phase in told.phases:
        before = round(phase.began_s * scale)
        bar = " " * before + "█" * max(1, round(phase.ended_s * scale) - before)
        yield f"  {phase.name:<10}{phase.ended_s - phase.began_s:>9.3f} s  |{bar[:BAR]:<{BAR}}|  from {phase.began_s:.3f} s"
    yield f"  unexplained{1e3 * told.unexplained_s:>8.3f} ms"
    if told.waits:
        yield "\n  why it waited"
        for wait in told.waits:
            yield f"  {wait.seconds:>9.3f} s  {_reason(wait)}"
    for lost in told.preemptions:
        by = f" by {lost.by}" if lost.by else ""
        away = "it has not come back" if lost.away_s is None else f"back after {lost.away_s:.3f} s"
        yield f"\n  preempted at {lost.at_s:.3f} s{by} ({lost.reason}): {lost.lost_tokens} computed tokens let go, {away}"
    if told.chunks:
        sizes = ", ".join(map(str, told.chunks[:16])) + (", ..." if len(told.chunks) > 16 else "")
        yield f"\n  prompt computed in {len(told.chunks)} step{'s' * (len(told.chunks) > 1)} of {sizes} tokens"
    yield f"  {told.steps} steps, shared with {told.shared_with.mean:.1f} others on average, {told.shared_with.max} at most"
    for text in told.sequences:
        yield f"\n  text {text.id}: {text.total_s:.3f} s, {text.output_tokens} tokens, mostly {_mostly(text)}"
    yield ""


def _spent(told: Explanation, name: str) -> float:
    return sum(phase.ended_s - phase.began_s for phase in told.phases if phase.name == name)


def _mostly(told: Explanation) -> str:
    """What took the most of its time: a reason to wait, or one of the phases in which it got on."""
    phases = {phase.name: _spent(told, phase.name) for phase in told.phases if phase.name not in ("queue", "preempted")}
    busy = max(phases.items(), key=lambda item: item[1], default=("nothing", 0.0))
    wait = told.waits[0] if told.waits else None
    return _reason(wait) if wait is not None and wait.seconds > busy[1] else busy[0]


def _reason(wait: Waiting) -> str:
    """A reason in a line; ``--json`` has all of those behind whom it waited."""
    steps = f" ({wait.steps} step{'s' * (wait.steps > 1)})" if wait.steps else ""
    more = f" and {len(wait.behind) - NAMED} more" if len(wait.behind) > NAMED else ""
    behind = f", behind {', '.join(wait.behind[:NAMED])}{more}" if wait.behind else ""
    return f"{wait.reason}: {wait.text}{steps}{behind}"
