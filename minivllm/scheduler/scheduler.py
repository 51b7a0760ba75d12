"""Who runs in the next step, and what a step's result means for the requests.

Be careful in this file and its neighbours: every promise about order, memory and text rests on them. What must stay true is in
``docs/architecture.md`` ("What must stay true") and is checked after every move by ``tests/scheduler/test_state_machine.py``.

``schedule(now)`` makes a ``StepPlan`` (``planner.py`` fills it); ``apply(plan, result, now)`` takes its result, possibly after
later plans were made (overlap). A request has known tokens and computed ones: a plan moves ``scheduled`` ahead, a result moves
``computed`` after it. The scheduler sees no tensor, has no clock and does not know what a token means, except which ones end a
request.

What becomes of requests when something fails is in ``recovery.py``.
"""

import logging
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from minivllm.errors import ContextTooLong, InvalidRequest, RequestFault
from minivllm.kv.allocator import Allocator
from minivllm.records import EngineOutput, StepRecord
from minivllm.scheduler.book import Book, Limits
from minivllm.scheduler.draft import Entry, Flight, StepDraft
from minivllm.scheduler.ledger import Ledger
from minivllm.scheduler.planner import Planner
from minivllm.scheduler.recovery import Recovery
from minivllm.scheduler.request import Guide, Request, Took
from minivllm.scheduler.room import StepRoom
from minivllm.types import (
    GUIDE_FAULT,
    REFUSED,
    FinishReason,
    GenerateRequest,
    StepPlan,
    StepResult,
    StepTimes,
    TokenEvent,
    TokenLogprobs,
)

log = logging.getLogger("minivllm")


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
        self._ledger = Ledger(self._book)
        self._room = StepRoom(limits.max_num_batched_tokens, limits.max_num_seqs)
        self._recovery = Recovery(self._book, self._ledger, self._room)
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
        """True while any request that is not paused is not finished, or any result is due."""
        return len(self._book.live) > len(self._book.paused) or bool(self._flights)

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
        self._ledger.arrive(spec)

    def abort(self, ids: Iterable[str], now: float) -> int:
        """End requests at once; ids that are unknown, or named twice, are passed over. Returns how many were there."""
        found = [self._book.by_id[i] for i in dict.fromkeys(ids) if i in self._book.by_id]
        for request in found:
            self._end(request, "abort", now)
        return len(found)

    def pause(self, ids: Iterable[str]) -> int:
        """Nobody reads what these requests say: their rows and blocks go back, their tokens stay, and they do not run before
        ``resume``. What steps in flight bring them is still told. Unknown ids are passed over. Returns how many stopped."""
        found = [self._book.by_id[i] for i in dict.fromkeys(ids) if i in self._book.by_id]
        found = [request for request in found if request.uid not in self._book.paused]
        for request in found:
            self._book.pause(request)
            self._ledger.paused.append(request.spec.id)
        return len(found)

    def resume(self, ids: Iterable[str], now: float) -> int:
        """Paused requests wait for their turn again, at the place of their claim; other ids are passed over. Returns how many
        there were."""
        found = [self._book.by_id[i] for i in dict.fromkeys(ids) if i in self._book.by_id]
        found = [request for request in found if request.uid in self._book.paused]
        for request in found:
            self._book.resume(request)
            self._ledger.resumed.append(request.spec.id)
            request.last_token_s = now  # the pause was the reader's: no time between two tokens of ours
        return len(found)

    def schedule(self, now: float) -> StepPlan | None:
        """Plan the next step, or None when nothing can be planned now. What it raises is to be told to ``fail``; a
        ``RequestFault`` where it is known at whose request it failed."""
        draft = StepDraft(self._step, self._room.tokens)
        if self._flights:
            self._ledger.close()
        try:
            self._planner.fill(draft)
        except Exception as error:
            self._flights.append(draft.finish((), (), (), now))  # nobody is given it; ``fail`` takes back what it did
            if draft.at is None:
                raise
            raise RequestFault(draft.at.uid) from error
        if not draft.work:
            if self._flights:
                self._ledger.reopen()
            return None
        for new in draft.new_rows:
            request = self._book.live[new.uid]
            request.scheduled_s = now if request.scheduled_s is None else request.scheduled_s
        flight = draft.finish(self._book.rows_to_free, self._book.sharing.current(), self._recovery.zeroed, now)
        self._book.rows_to_free, self._recovery.zeroed = [], []
        self._flights.append(flight)
        self._step += 1
        return flight.plan

    def names(self, plan: StepPlan) -> tuple[str, ...]:
        """The requests that take a row in this plan, which was just made."""
        return tuple([self._book.live[new.uid].spec.id for new in plan.new_rows])

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
        if len(result.tokens) != len(flight.entries):
            raise ValueError(f"step {plan.step} has {len(flight.entries)} rows, but results for {len(result.tokens)}")
        self._flights.popleft()
        self._room.step_was_good()
        self._recovery.unexplained = 0
        bad = [flight.entries[i].request for i in result.bad_rows]
        events = self._recovery.rows_failed(bad, now) if bad else []
        failed = self._tell_guides(flight, result, events, now) if plan.grammar_rows else False
        live, rows = self._book.live, self._ledger.rows(flight)
        outputs: list[tuple[int, ...]] = [()] * len(flight.entries)
        told: tuple[_Logprobs, _Logprobs] = ((), ())
        tells = bool(result.logprobs or result.prompt_logprobs)
        for i, (entry, tokens) in enumerate(zip(flight.entries, result.tokens, strict=True)):
            if live.get(entry.request.uid) is entry.request:
                before = len(events)
                try:
                    if tells:
                        found = result.logprobs[i] if result.logprobs else None
                        of_prompt = _untold(entry, result.prompt_logprobs[i]) if result.prompt_logprobs else ()
                        told = (() if found is None else (found,), of_prompt)
                    outputs[i] = self._apply_entry(entry, tokens, now, events, told)
                    if entry.request.failures:
                        self._recovery.went_well(entry.request)
                except Exception:
                    log.exception("request %s failed when it was to take its tokens", entry.request.spec.id)
                    del events[before:]
                    events.append(self._recovery.end(entry.request, now))
                    failed = True
            else:
                entry.request.in_flight -= 1
        if failed:
            self.check()
        return EngineOutput(tuple(events), self._ledger.record(flight, result.times, now, rows, outputs))

    def _tell_guides(self, flight: Flight, result: StepResult, events: list[TokenEvent], now: float) -> bool:
        """Tell the guides of a step its tokens, all of them before any is asked what it makes of them: some are in other
        processes. True: one of them failed."""
        failed = False
        for entry, tokens in zip(flight.entries, result.tokens, strict=True):
            guide = entry.request.guide
            if guide is not None and tokens and self._book.live.get(entry.request.uid) is entry.request:
                try:
                    guide.tell((*entry.forced, *tokens) if entry.forced else tokens)
                except Exception:
                    log.exception("request %s failed when its guide was to follow it", entry.request.spec.id)
                    events.append(self._recovery.end(entry.request, now))
                    failed = True
        return failed

    def _apply_entry(
        self, entry: Entry, tokens: Sequence[int], now: float, events: list[TokenEvent], found: tuple[_Logprobs, _Logprobs]
    ) -> tuple[int, ...]:
        """Take a row's tokens; those that its text got."""
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
            return ()
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
        cached, taken = request.cached or 0, tuple(tokens)
        events.append(
            TokenEvent(
                request.spec.id, taken, end.reason, end.stop_reason, cached, end.error, logprobs, end.complete, of_prompt
            )
        )
        if request.running and request.computed % self._kv.block_size < entry.num_tokens:
            self._kv.publish(request.uid, request.token_ids, min(request.computed, len(request.token_ids)))
        if end.reason is not None:
            self._end(request, end.reason, now)
        return taken

    def _append(self, request: Request, tokens: Sequence[int], told: tuple[int, Took]) -> tuple["_Ending", int]:
        """Add tokens until one ends the request: why it ended, and how many were added. ``told``: what its guide says."""
        known, stop_ids, limit, guide = request.token_ids, request.stop_ids, request.token_limit, request.guide
        taken, took = told
        for kept, token in enumerate(tokens, start=1):
            if guide is not None and kept > taken:  # also an end-of-text where the grammar allows none
                whose = None if guide.problem == GUIDE_FAULT else REFUSED
                return _Ending("error", whose, error=guide.problem), kept - 1
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

    def fail(self, now: float, culprit: int | None = None, *, out_of_memory: bool = False) -> EngineOutput:
        """A step could not be planned or computed. Every plan in flight is void (later ones build on it); what they published
        is taken back, and their requests start over with the tokens they have. The ``culprit``, a uid, ends with an error;
        where it is not known, ``trials`` begin, and who fails alone ends.

        When the device was ``out_of_memory``, later steps are smaller; as long as they can be, that is no request's failure.
        Raises RuntimeError where a failure has to do with no request, or has left things broken: nobody can go on then."""
        flights, self._flights = tuple(self._flights), deque()
        self._ledger.reopen(len(flights) - 1)
        events = self._recovery.step_failed(flights, now, culprit, out_of_memory=out_of_memory)
        self.check()
        return EngineOutput(tuple(events), self.snapshot(now))

    def snapshot(self, now: float) -> StepRecord:
        """A record without a step: what changed while nothing ran (an abort, an arrival that waits)."""
        return self._ledger.record(None, StepTimes(now, now), now)

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
