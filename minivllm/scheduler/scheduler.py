"""Who runs in the next step, and what a step's result means for the requests.

Be careful in this file and its neighbours: every promise about order, memory and text rests on them. What must stay true is in
``docs/architecture.md`` ("What must stay true") and is checked after every move by ``tests/scheduler/test_state_machine.py``.

``schedule(now)`` makes a ``StepPlan`` (``planner.py`` fills it); ``apply(plan, result, now)`` takes its result, possibly after
later plans were made (overlap). A request has known tokens and computed ones: a plan moves ``scheduled`` ahead, a result moves
``computed`` after it. The scheduler sees no tensor, has no clock and does not know what a token means, except which ones end a
request.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from minivllm.errors import ContextTooLong, InvalidRequest
from minivllm.kv.allocator import Allocator
from minivllm.scheduler.book import Book, Limits
from minivllm.scheduler.draft import Entry, Flight, StepDraft
from minivllm.scheduler.ledger import Ledger
from minivllm.scheduler.planner import Planner
from minivllm.scheduler.request import Guide, Request, Took
from minivllm.scheduler.room import StepRoom
from minivllm.types import (
    EngineOutput,
    FinishReason,
    GenerateRequest,
    StepPlan,
    StepRecord,
    StepResult,
    StepTimes,
    TokenEvent,
    TokenLogprobs,
)

MAX_FAILURES = 2  # failed steps in a row after which a request is ended with an error


class _Ending(NamedTuple):
    """Whether a token ended its request, and how."""

    reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token that was asked for, or what else ended it
    error: str | None = None
    complete: bool = False  # by the grammar


_GOES_ON = _Ending()
_Logprobs = tuple[TokenLogprobs, ...]


class Scheduler:
    """State of every request, the queues and the block tables. Written by the engine's loop alone."""

    def __init__(self, limits: Limits, kv: Allocator) -> None:
        if limits.max_num_batched_tokens < limits.max_num_seqs * (1 + limits.num_draft_tokens):
            raise ValueError("a step must have room for one token of every row (max_num_batched_tokens >= max_num_seqs)")
        self.limits = limits
        self._kv = kv
        self._book = Book(limits, kv)
        self._ledger = Ledger()
        self._room = StepRoom(limits.max_num_batched_tokens, limits.max_num_seqs)
        self._planner = Planner(self._book, self._ledger, self._room)
        self._flights: deque[Flight] = deque()
        self._step = 0

    @property
    def num_running(self) -> int:
        """Requests that have a row."""
        return len(self._book.running)

    @property
    def num_waiting(self) -> int:
        """Requests that have none."""
        return len(self._book.waiting)

    @property
    def has_work(self) -> bool:
        """True while any request is not finished or any result is due."""
        return bool(self._book.live or self._flights)

    def add(self, spec: GenerateRequest, guide: Guide | None = None) -> None:
        """Queue a request; ``guide`` follows its text, and has seen its prior output. Raises ``ContextTooLong`` or
        ``InvalidRequest`` for one that could never run."""
        if spec.id in self._book.by_id:
            raise InvalidRequest("A request with this id is running already; use another id.", "request_id")
        if spec.lora is not None or spec.output != "text" or spec.deadline_s is not None:
            raise InvalidRequest("Adapters, pooled outputs and deadlines are not served yet; leave them out.")
        request = self._book.make(spec)
        request.guide = guide
        longest = min(self.limits.max_model_len, self._kv.capacity_tokens)
        if request.num_prompt >= longest or request.token_limit > longest:
            raise ContextTooLong(longest, request.num_prompt, request.token_limit - request.num_prompt)
        if len(request.token_ids) >= request.token_limit:
            raise InvalidRequest("Nothing is left to generate: the prior output has max_tokens tokens.", "max_tokens")
        if spec.fork_of is not None and (parent := self._book.by_id.get(spec.fork_of)) is not None:
            request.fork_of = parent.uid
        self._book.enter(request)

    def abort(self, ids: Iterable[str], now: float) -> int:
        """End requests at once; ids that are unknown, or named twice, are passed over. Returns how many were there."""
        found = [self._book.by_id[i] for i in dict.fromkeys(ids) if i in self._book.by_id]
        for request in found:
            self._end(request, "abort", now)
        return len(found)

    def schedule(self, now: float) -> StepPlan | None:
        """Plan the next step, or None when nothing can be planned now."""
        draft = StepDraft(self._step, self._room.tokens)
        self._planner.fill(draft)
        if not draft.work:
            return None
        for new in draft.new_rows:
            request = self._book.live[new.uid]
            request.scheduled_s = now if request.scheduled_s is None else request.scheduled_s
        flight = draft.finish(self._book.rows_to_free, self._book.sharing.current(), now)
        self._book.rows_to_free = []
        self._flights.append(flight)
        self._step += 1
        return flight.plan

    def guides(self, plan: StepPlan) -> list[tuple[Guide, int] | None]:
        """For each of the oldest plan's ``grammar_rows``: who follows its text, and how many certain tokens stand between the
        known ones and the one to be sampled. None: it ended."""
        if not self._flights or self._flights[0].plan is not plan:
            raise ValueError(f"step {plan.step} is not the oldest in flight")
        guided = [e for e in self._flights[0].entries if e.adds and e.request.guide is not None]
        live = self._book.live
        return [
            (e.request.guide, len(e.forced)) if e.request.guide is not None and live.get(e.request.uid) is e.request else None
            for e in guided
        ]

    def apply(self, plan: StepPlan, result: StepResult, now: float) -> EngineOutput:
        """Take the oldest plan's result: append tokens, end requests, free what they held. Raises ValueError when the
        result is not of the oldest plan in flight."""
        if not self._flights or self._flights[0].plan is not plan or result.step != plan.step:
            raise ValueError(f"step {plan.step} is not the oldest in flight")
        flight = self._flights[0]
        self._room.step_was_good()
        events: list[TokenEvent] = []
        if result.bad_rows:
            self._fail_rows([flight.entries[i] for i in result.bad_rows], now, events)
        live = self._book.live
        if plan.grammar_rows:
            for entry, tokens in zip(flight.entries, result.tokens, strict=True):
                guide = entry.request.guide
                if guide is not None and tokens and live.get(entry.request.uid) is entry.request:
                    guide.tell((*entry.forced, *tokens) if entry.forced else tokens)
        for i, (entry, tokens) in enumerate(zip(flight.entries, result.tokens, strict=True)):
            if live.get(entry.request.uid) is entry.request:
                found = result.logprobs[i] if result.logprobs else None
                of_prompt = _untold(entry, result.prompt_logprobs[i]) if result.prompt_logprobs else ()
                self._apply_entry(entry, tokens, now, events, (() if found is None else (found,), of_prompt))
                entry.request.failures = 0  # only now: what cannot be applied fails again, and must not do so for ever
        self._flights.popleft()
        return EngineOutput(tuple(events), self._record(flight, result.times, now))

    def _apply_entry(
        self, entry: Entry, tokens: Sequence[int], now: float, events: list[TokenEvent], found: tuple[_Logprobs, _Logprobs]
    ) -> None:
        request, (logprobs, of_prompt) = entry.request, found
        request.in_flight -= 1
        request.pending -= entry.adds
        if entry.prefill:
            self._ledger.num_prompt_tokens += entry.num_tokens - len(entry.forced)
        if request.running:
            # Drafts that were not accepted: their K/V is not of the text.
            rejected = entry.adds - len(entry.forced) - len(tokens)
            request.scheduled -= rejected
            request.computed += entry.num_tokens - rejected
        request.prompt_told += len(of_prompt)
        if not tokens:
            if of_prompt:
                events.append(TokenEvent(request.spec.id, (), num_cached=request.cached or 0, prompt_logprobs=of_prompt))
            return
        known, end = request.token_ids, _GOES_ON
        took: tuple[int, Took] = len(tokens), "more"
        if request.guide is not None:
            took = request.guide.took()
            tokens = (*entry.forced, *tokens) if entry.forced else tokens
        if request.repetition is None and took[1] == "more" and (
            len(tokens) == 1 and tokens[0] not in request.stop_ids and len(known) + 1 < request.token_limit
        ):
            known.append(tokens[0])  # what nearly every row of nearly every step does
        else:
            end, kept = self._append(request, tokens, took)
            tokens = tokens[:kept]
            logprobs = logprobs[:kept]
        if tokens:  # none where the first was refused
            self._ledger.tokens(request, len(tokens), now)
        cached = request.cached or 0
        events.append(
            TokenEvent(
                request.spec.id, tuple(tokens), end.reason, end.stop_reason, cached, end.error, logprobs, end.complete,
                of_prompt,
            )
        )  # fmt: skip
        if request.running and request.computed % self._kv.block_size < entry.num_tokens:
            self._kv.publish(request.uid, request.token_ids, min(request.computed, len(request.token_ids)))
        if end.reason is not None:
            self._end(request, end.reason, now)

    def _append(self, request: Request, tokens: Sequence[int], told: tuple[int, Took]) -> tuple["_Ending", int]:
        """Add tokens until one ends the request: why it ended, and how many were added. ``told``: what its guide says."""
        known, stop_ids, limit, guide = request.token_ids, request.stop_ids, request.token_limit, request.guide
        taken, took = told
        for kept, token in enumerate(tokens, start=1):
            if guide is not None and kept > taken:  # also an end-of-text where the grammar allows none
                return _Ending("error", error=guide.problem), kept - 1
            known.append(token)
            if token in stop_ids and request.num_output > request.spec.sampling.min_tokens:
                return _Ending("stop", token if token in request.spec.sampling.stop_token_ids else None), kept
            if kept == taken and took == "complete":
                return _Ending("stop", complete=True), kept
            if len(known) >= limit:
                return _Ending("length"), kept
            repeats = request.repetition is not None and request.repetition.goes_round(known)
            if repeats and request.num_output >= request.spec.sampling.min_tokens:
                return _Ending("repetition", "repetition_detected"), kept
        return _GOES_ON, len(tokens)

    def _end(self, request: Request, reason: FinishReason, now: float) -> None:
        self._ledger.end(request, reason, now)
        self._book.leave(request)

    def _restart(self, request: Request) -> None:
        self._ledger.num_preempted += 1
        self._book.restart(request)

    def _fail_rows(self, bad: list[Entry], now: float, events: list[TokenEvent]) -> None:
        """Rows whose logits were not finite. Who wrote such K/V ends; who only shares a block that it wrote since (and so may
        have read it in this very step) starts over; nothing that either of them wrote stays findable."""
        written_by = {block: uid for f in self._flights for uid, block in f.published}
        suspects = {e.request.uid for e in bad if self._book.is_live(e.request)}
        poisoned: set[tuple[int, int]] = set()
        for uid in sorted(suspects):
            held = self._kv.held_blocks(uid)
            if any(written_by.get(block, uid) in suspects - {uid} for block in held):
                continue  # it read another suspect's block: it may be innocent
            poisoned.update(block for block, writer in written_by.items() if writer == uid)
            self._kv.unpublish(held)
            request = self._book.live[uid]
            message = "The model gave numbers that are not finite for this request; it was ended."
            events.append(TokenEvent(request.spec.id, (), "error", error=message))
            self._end(request, "error", now)
        for uid in self._kv.holders(poisoned):
            self._kv.unpublish(block for block, writer in written_by.items() if writer == uid)
            self._restart(self._book.live[uid])

    def fail(self, message: str, now: float, out_of_memory: bool = False) -> EngineOutput:
        """A step could not be computed. Every plan in flight is void (later ones build on it); what they published is taken
        back; their requests start over with the tokens they have, and end with an error at the second time.

        When the device was ``out_of_memory``, later steps are smaller; as long as they can be, that is no request's failure."""
        events: list[TokenEvent] = []
        forgiven = out_of_memory and self._room.shrink()
        flights, self._flights = tuple(self._flights), deque()
        for flight in flights:
            self._kv.unpublish(block for _, block in flight.published)
        for request in {e.request.uid: e.request for f in flights for e in f.entries}.values():
            if not self._book.is_live(request):
                continue
            request.failures += not forgiven
            ahead = request.guide is not None and request.guide.told > 0  # of its tokens: it cannot go on from these
            if request.failures < MAX_FAILURES and not ahead:
                self._restart(request)
            else:
                events.append(TokenEvent(request.spec.id, (), "error", error=message))
                self._end(request, "error", now)
        return EngineOutput(tuple(events), self._record(None, StepTimes(now, now), now))

    def snapshot(self, now: float) -> StepRecord:
        """A record without a step: what changed while nothing ran (an abort, an arrival that waits)."""
        return self._record(None, StepTimes(now, now), now)

    def _record(self, flight: Flight | None, times: StepTimes, now: float) -> StepRecord:
        return self._ledger.record(flight, times, (self.num_running, self.num_waiting), self._kv.counts(), now)

    def check(self) -> None:
        """Raise RuntimeError when an invariant is broken. For tests, and when idle in debug runs."""
        problems = self._book.problems()
        for r in self._book.live.values():
            flying = [e for f in self._flights for e in f.entries if e.request is r]
            if r.in_flight != len(flying) or r.pending != sum(e.adds for e in flying):
                problems.append(f"request {r.uid} miscounts what is in flight")
        if problems:
            raise RuntimeError("scheduler: " + "; ".join(problems))


def _untold(entry: Entry, found: _Logprobs) -> _Logprobs:
    """Of logprobs of the prompt's tokens, those that the request was not told before it was preempted."""
    return found[max(entry.request.prompt_told - entry.start, 0) :]
