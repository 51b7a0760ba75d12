"""What an explanation says: where one request's time went, and why.

Times are seconds since the request was received. A phase begins and ends with stamps that were taken where it begins and ends;
nothing is put down to a phase because it is left over. What no phase covers is told as ``unexplained_s``.

| phase | from | to |
|---|---|---|
| received | the request's head is there | its body is read, and its fields are checked |
| tokenize | the route begins to make a prompt | its tokens are there (template, grammar's trial) |
| admit | its prompt is made, and the server looks whether there is room | it is handed to the engine |
| queue | it is handed to the engine, or comes back from a pause or a restart | the step is planned in which it takes a row |
| prefill | that step is planned | the result of the last step with a part of its prompt is in |
| decode | the same result, which brings a token | the result with the last one is in, or its row is taken away |
| preempted | the step is planned for which its blocks were taken (or its step failed) | a step is planned with it again |
| paused | the engine lets go of it, since its reader does not read | the engine takes it back |
| restart | the engine is found dead | the next one is ready |
| deliver | the engine has its last token | the last byte is handed to the connection |
"""

import msgspec


class Phase(msgspec.Struct, frozen=True, gc=False):
    """A span of time, in seconds since the request was received."""

    name: str
    began_s: float
    ended_s: float


class Waiting(msgspec.Struct, frozen=True, gc=False):
    """One reason for which a request did not get on, and for how long. ``engine`` reasons lie inside any phase, others in
    ``queue`` and ``preempted``; ``policy`` inside ``decode`` and ``prefill``."""

    reason: str  # the code: types.WAIT_CODES, or "engine", "policy"
    text: str
    seconds: float
    steps: int  # steps that were planned without it meanwhile
    behind: tuple[str, ...] = ()  # at most ``MAX_BEHIND`` of those who ran, or stood ahead, when it began and when it ended


class Sharing(msgspec.Struct, frozen=True, gc=False):
    """With how many other requests its steps were shared."""

    mean: float
    max: int


class Preempted(msgspec.Struct, frozen=True, gc=False):
    """A time that the request lost its row and its blocks."""

    at_s: float
    reason: str
    by: str | None  # who needed the blocks
    lost_tokens: int  # whose K/V was let go; what the prefix cache still has of it need not be computed again
    away_s: float | None  # until it had a row again; None: it has none yet


class Explanation(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """Where a request's time went. Of a request of several texts: the sum of their tokens, the times of the text that ended
    last, and each text in ``sequences``."""

    id: str
    model: str
    prompt_tokens: int
    cached_tokens: int  # of the prompt, found in the prefix cache or with a sibling when it first ran
    output_tokens: int
    finish_reason: str | None  # None: it runs
    total_s: float  # from received to delivered, or to now
    first_text_s: float | None  # when the first text was handed to the connection, if anything streams
    phases: tuple[Phase, ...]
    unexplained_s: float  # of the total, what no phase covers
    waits: tuple[Waiting, ...]  # the longest first
    chunks: tuple[int, ...]  # tokens of each step with a part of its prompt; more than ``MAX_CHUNKS`` are added to the last
    steps: int
    shared_with: Sharing
    preemptions: tuple[Preempted, ...]
    sequences: "tuple[Explanation, ...]" = ()


MAX_BEHIND = 8
MAX_CHUNKS = 1024


def uncovered_s(total_s: float, phases: tuple[Phase, ...]) -> float:
    """Of the time from 0 to ``total_s``, what lies in no phase."""
    covered_s, until_s = 0.0, 0.0
    for phase in sorted(phases, key=lambda p: p.began_s):
        begin_s, end_s = max(phase.began_s, until_s), min(phase.ended_s, total_s)
        if end_s > begin_s:
            covered_s += end_s - begin_s
            until_s = end_s
    return max(0.0, total_s - covered_s)
