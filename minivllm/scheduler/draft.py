"""A step while it is being planned, and what is remembered of it until its result comes."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from minivllm.records import WaitRecord
from minivllm.scheduler.request import Request
from minivllm.types import WANT_PROMPT_LOGPROBS, WANT_SAMPLE, BlockIds, CopyBlock, NewRow, RowWork, SharedPrefix, StepPlan


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One row's work in a plan, kept until the result comes."""

    request: Request
    num_tokens: int
    adds: int  # tokens that it may add: 0 for an unfinished chunk, more than 1 with drafts
    prefill: bool
    forced: tuple[int, ...] = ()  # the first of what it adds: tokens that were certain when it was planned
    start: int = 0  # position of its first token
    blocks: BlockIds = ()  # that its table gained
    cached: int = 0  # if it begins to run: tokens that were there already


@dataclass(frozen=True)
class Flight:
    """A plan that was handed out and whose result is not in yet."""

    plan: StepPlan
    entries: tuple[Entry, ...]
    published: tuple[tuple[int, tuple[int, int]], ...]  # (uid, (group, block)) made findable by this plan
    waits: tuple[WaitRecord, ...]
    rest_waits: str
    rest_behind: tuple[str, ...]
    scheduled_s: float


@dataclass
class StepDraft:
    """The step under construction. Written by ``Scheduler.schedule`` alone."""

    step: int
    budget: int  # tokens that still fit
    work: list[RowWork] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    new_rows: list[NewRow] = field(default_factory=list)
    copies: list[CopyBlock] = field(default_factory=list)
    published: list[tuple[int, tuple[int, int]]] = field(default_factory=list)
    grammar_rows: list[int] = field(default_factory=list)
    waits: list[WaitRecord] = field(default_factory=list)
    rest_waits: str = ""
    rest_behind: tuple[str, ...] = ()
    preempted: bool = False
    at: Request | None = None  # whose turn it is in planning: an error is at its doorstep

    def add(
        self, request: Request, num_tokens: int, adds: int, new_blocks: BlockIds = (), forced: tuple[int, ...] = ()
    ) -> None:
        """Give a row ``num_tokens`` of work, ``forced`` among them, moving its ``scheduled`` and ``pending``."""
        start = request.scheduled
        prefill = start < request.num_known_at_start
        wants = WANT_SAMPLE if adds else 0
        if start < request.prompt_asked and request.prompt_told < min(start + num_tokens, request.prompt_asked):
            wants |= WANT_PROMPT_LOGPROBS
        self.work.append(RowWork(request.uid, request.row, num_tokens, new_blocks, (), wants, forced))
        gained, cached = new_blocks, 0
        if self.new_rows and self.new_rows[-1].uid == request.uid:
            gained, cached = self.new_rows[-1].block_ids, start
        self.entries.append(Entry(request, num_tokens, adds, prefill, forced, start, gained, cached))
        if adds and request.guide is not None:
            self.grammar_rows.append(request.row)
        self.budget -= num_tokens
        request.scheduled = start + num_tokens
        request.pending += adds
        request.in_flight += 1
        request.planned_in = self.step

    def finish(
        self, freed_rows: Sequence[int], shared: tuple[SharedPrefix, ...], zeroed: Sequence[tuple[int, int]], now: float
    ) -> Flight:
        """Freeze the step."""
        plan = StepPlan(
            self.step,
            tuple(self.work),
            tuple(self.new_rows),
            tuple(freed_rows),
            tuple(self.copies),
            tuple(self.grammar_rows),
            shared,
            tuple(zeroed),
        )
        published, waits = tuple(self.published), tuple(self.waits)
        return Flight(plan, tuple(self.entries), published, waits, self.rest_waits, self.rest_behind, now)
