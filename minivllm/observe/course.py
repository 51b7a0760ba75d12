"""One text on its way through the engine, and one request that may want several: what explanations are made of."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from minivllm.observe.explanation import MAX_BEHIND, MAX_CHUNKS
from minivllm.observe.trail import Trail

MAX_WAITS: Final = 32  # different reasons of one text
MAX_LOSSES: Final = 64  # preemptions of one text that are told
MAX_PHASES: Final = 512  # then no more are told, and what they would cover is unexplained
NEVER: Final = -1
RUNNING: Final = ("prefill", "decode")  # states with a row
QUEUED: Final = ("queue", "preempted")  # states that wait for one
Sums = dict[str, tuple[float, int]]  # seconds and steps for each reason


class StepSums(NamedTuple):
    """Sums over all steps so far."""

    turn: int = 0  # their number
    others: int = 0  # rows but one
    between_s: float = 0.0  # from one's end to the planning of the next
    ended_s: float = 0.0  # when the result of the last was in


class Wait:
    """One reason. Written by its ``Course``."""

    __slots__ = ("behind", "seconds", "steps")

    def __init__(self) -> None:
        self.seconds = 0.0
        self.steps = 0
        self.behind: dict[str, None] = {}


@dataclass(slots=True)
class Loss:
    """A preemption. Written by ``Explanations``."""

    at_s: float
    reason: str
    by: str | None
    tokens: int
    until_s: float | None = None  # when it had a row again


class Course:
    """One text on its way through the engine. Written by ``Explanations``, and by ``Waits`` and ``Rows`` for it."""

    __slots__ = (
        "arrival_s", "arrived", "between_s", "cached", "chunks", "ended_s", "id", "joined", "last_s", "last_turn", "losses",
        "most", "named", "num_output", "num_prompt", "parent", "phases", "reason", "request", "rest", "shared", "since_s",
        "state", "steps", "turn", "waits",
    )  # fmt: skip

    def __init__(self, name: str, arrival_s: float, num_prompt: int, parent: str | None, request: "Request") -> None:
        self.id = name
        self.arrival_s = arrival_s
        self.num_prompt = num_prompt
        self.parent = parent
        self.request = request
        self.state = "queue"
        self.since_s = arrival_s
        self.arrived = False  # the scheduler knows it
        self.phases: list[tuple[str, float, float]] = []
        self.waits: dict[str, Wait] = {}
        self.named: tuple[str, float, tuple[str, ...]] | None = None  # the reason of its own, since when, behind whom
        self.rest: tuple[Sums, tuple[str, ...]] | None = None  # the sums when it began to wait unnamed, and who was ahead
        self.cached: int | None = None
        self.chunks: list[int] = []
        self.steps = self.shared = self.most = 0
        self.last_turn = NEVER  # its last step, unless it decodes in every one
        self.last_s = arrival_s  # when the result of that was in
        self.turn = NEVER  # the newest step, if it decodes in every one
        self.joined = StepSums()  # the sums when it began to
        self.between_s = 0.0
        self.losses: list[Loss] = []
        self.num_output: int | None = None
        self.reason: str | None = None
        self.ended_s: float | None = None

    def close(self, at_s: float) -> None:
        """The state ends now; states that took no time leave no trace."""
        if at_s > self.since_s and len(self.phases) < MAX_PHASES:
            self.phases.append((self.state, self.since_s, at_s))
        self.since_s = max(at_s, self.since_s)

    def wait(self, text: str, seconds: float, steps: int, behind: Sequence[str] = ()) -> None:
        """It has waited for a reason."""
        found = self.waits.get(text)
        if found is None:
            if len(self.waits) == MAX_WAITS:
                return
            found = self.waits[text] = Wait()
        found.seconds += seconds
        found.steps += steps
        for name in behind:
            if len(found.behind) < MAX_BEHIND and name != self.id:
                found.behind[name] = None

    def add_chunk(self, num_tokens: int) -> None:
        """A step had a part of its prompt, or of what has to be computed again."""
        if len(self.chunks) < MAX_CHUNKS:
            self.chunks.append(num_tokens)
        else:
            self.chunks[-1] += num_tokens

    @property
    def output_tokens(self) -> int:
        """Tokens generated: of one that runs, a token for each step behind its last chunk, and one for that."""
        if self.num_output is not None:
            return self.num_output
        return max(0, self.steps - len(self.chunks) + (self.state == "decode"))


class Request:
    """What one caller asked for: one text or several. Written by ``Explanations``."""

    __slots__ = ("courses", "has_face", "id", "num_open", "trail")

    def __init__(self, name: str, trail: Trail, *, has_face: bool = True) -> None:
        self.id = name
        self.trail = trail
        self.has_face = has_face  # somebody tells of its delivery; else records alone tell of it
        self.courses: list[Course] = []
        self.num_open = 0  # of them
