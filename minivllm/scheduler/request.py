"""One request's life, as the scheduler sees it.

There is no prefill phase and no decode phase. A request has *known* tokens (prompt and what was sampled), of which the first
``computed`` have their K/V in the cache; steps let ``computed`` chase the known ones. With overlapped steps the plans run
ahead: ``scheduled`` counts tokens in plans already made, ``pending`` the tokens that those plans may add.
"""

from collections.abc import Sequence
from typing import Literal, Protocol

from minivllm.scheduler.repetition import Repetition
from minivllm.types import GenerateRequest

NO_ROW = -1
MAX_EVICTIONS = 4  # times that a request gives way to others


class RequestView(Protocol):
    """What a policy may read of a request."""

    @property
    def uid(self) -> int: ...
    @property
    def spec(self) -> GenerateRequest: ...
    @property
    def claim(self) -> tuple[float, ...]: ...
    @property
    def num_output(self) -> int: ...


Took = Literal["more", "complete", "refused"]


class Guide(Protocol):
    """Follows a text by its grammar, and knows nothing of requests. Advanced by the ``Scheduler`` with every token it keeps."""

    def ahead(self, skip: int, most: int) -> tuple[int, ...]:
        """Tokens that come next for certain, so that no step has to sample them: at most ``most``, behind the next ``skip``."""

    @property
    def problem(self) -> str:
        """Why a token was refused, for the client's eyes."""

    def tell(self, token_ids: Sequence[int]) -> None:
        """The text goes on with these tokens. All guides of a step are told before any is asked what it took."""

    def took(self) -> tuple[int, Took]:
        """How many of these tokens it took, and what came of the last: "complete": nothing may follow it; "refused": the one
        behind those that were taken should not have come."""


class Request:
    """State of one request. Written by the ``Scheduler`` alone; policies read it through ``RequestView``."""

    __slots__ = (
        "arrival_s", "before", "blocked_at", "borrowed", "cached", "claim", "computed", "evictions", "failures",
        "first_token_s", "forgiven", "fork_of", "guide", "in_flight", "last_token_s", "left_blocks", "num_known_at_start",
        "num_preemptions", "num_prompt", "overtaken", "pending", "planned_in", "prompt_asked", "prompt_told", "repetition",
        "room", "row", "scheduled", "scheduled_s", "seed", "spec", "stop_ids", "token_ids", "token_limit", "uid",
    )  # fmt: skip

    def __init__(self, uid: int, spec: GenerateRequest, eos_token_ids: Sequence[int], max_model_len: int) -> None:
        sampling = spec.sampling
        self.uid = uid
        self.spec = spec
        self.claim: tuple[float, ...] = ()  # lower is stronger; set by the policy
        self.token_ids: list[int] = [*spec.prompt_ids, *spec.prior_output_ids]
        self.num_prompt = len(spec.prompt_ids)
        self.token_limit = min(self.num_prompt + (sampling.max_tokens or 1), max_model_len)
        self.stop_ids = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else frozenset(eos_token_ids))
        self.seed = sampling.seed or 0
        self.row = NO_ROW
        self.room = 0  # tokens that its blocks hold
        self.computed = 0
        self.scheduled = 0
        self.pending = 0  # tokens that steps in flight may add (more than one with drafts)
        self.in_flight = 0  # steps in flight that have work for it
        self.planned_in = -1  # the newest step that has work for it
        self.num_known_at_start = len(self.token_ids)  # known tokens when it last began to run: all of them are prefill
        self.cached: int | None = None  # prompt tokens found in the prefix cache when it first ran
        self.prompt_asked = 0 if sampling.prompt_logprobs is None else self.num_prompt - 1  # prompt tokens to tell logprobs of
        # Of these, those that were told: in their order, the prompt's second token first.
        self.prompt_told = spec.prior_prompt_logprobs
        self.num_preemptions = 0
        self.evictions = 0  # preemptions for want of blocks
        self.before: Request | None = None  # what it was until it began again, with steps in flight that are due first
        self.forgiven = False  # it began again once as a bad row
        self.borrowed = 0  # tokens whose K/V others had computed when it last began to run
        self.left_blocks: list[tuple[int, int]] = []  # (group, block) that it gave up while a step for it was in flight
        self.failures = 0  # failed steps in a row that it was part of
        self.overtaken = 0  # later requests admitted while it waited for blocks
        self.blocked_at = -1  # blocks that were available when it last did not fit
        self.fork_of: int | None = None
        self.guide: Guide | None = None  # None: any text
        repeats = sampling.repetition_detection
        on = repeats is not None and repeats.max_pattern_size > 0
        self.repetition = Repetition(repeats, self.token_ids, self.num_prompt) if repeats is not None and on else None
        self.arrival_s = spec.arrival_s
        self.scheduled_s: float | None = None
        self.first_token_s: float | None = None
        self.last_token_s = 0.0

    @property
    def num_output(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt

    def forced(self, most: int) -> tuple[int, ...]:
        """Of the tokens that come for certain, those behind what steps in flight will bring, at most ``most``."""
        if self.guide is None or most <= 0:
            return ()
        return self.guide.ahead(self.pending, most)

    @property
    def reads_cache(self) -> bool:
        """False while logprobs of its prompt are due: they come of computing it."""
        return self.prompt_told == self.prompt_asked

    @property
    def due(self) -> bool:
        """True while it must not run, since a step in flight still writes for it."""
        return self.in_flight > 0 or (self.before is not None and self.before.in_flight > 0)

    @property
    def pinned(self) -> bool:
        """True when it was preempted often enough: it runs again once all that it can ever need is free, and is no victim."""
        return self.evictions >= MAX_EVICTIONS

    @property
    def running(self) -> bool:
        """True while it has a row."""
        return self.row != NO_ROW

    @property
    def prefilling(self) -> bool:
        """True while known tokens of its start are not planned yet."""
        return self.scheduled < self.num_known_at_start
