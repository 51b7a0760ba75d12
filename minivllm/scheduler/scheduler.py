"""Who runs in the next step, and what a step's result means for the requests.

Be careful in this file: every promise about order, memory and text rests on it. What must stay true is in
``docs/architecture.md`` ("What must stay true") and is checked after every move by ``tests/scheduler/test_state_machine.py``.

``schedule(now)`` makes a ``StepPlan``; ``apply(plan, result, now)`` takes its result, possibly after later plans were made
(overlap). The scheduler sees no tensor, has no clock and does not know what a token means, except which ones end a request.

* A request has known tokens and computed ones; a plan moves ``scheduled`` ahead, a result moves ``computed`` after it.
* Blocks for all known tokens are given on admission, so a prompt in chunks never waits for memory half-way; afterwards a row
  grows by one block at a time. When none is left, the running request with the least claim is preempted: its blocks go back
  (and stay findable), it queues again with the tokens it has, and goes on later with the same text.
* Rows that are in the step being planned are never victims. So nothing that this step publishes or shares is ever taken back
  inside the same ``schedule``.
* A waiting request that does not fit lets smaller ones behind it pass, ``MAX_OVERTAKEN`` of them; then the queue holds until
  it fits. Running requests end, so it does: neither side starves.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from minivllm.errors import ContextTooLong, InvalidRequest
from minivllm.kv.allocator import Admission, Allocator, BlockIds
from minivllm.scheduler.draft import Entry, Flight, StepDraft
from minivllm.scheduler.ledger import Ledger
from minivllm.scheduler.policy import POLICIES, by_claim
from minivllm.scheduler.request import NO_ROW, Request
from minivllm.types import (
    EngineOutput,
    FinishReason,
    GenerateRequest,
    NewRow,
    StepPlan,
    StepRecord,
    StepResult,
    StepTimes,
    TokenEvent,
)

MAX_OVERTAKEN = 64  # later requests that may be admitted before one that waits for blocks
MAX_LOOKS = 8  # requests that do not fit which one step looks at: the cost of a step stays bounded
MAX_FAILURES = 2  # failed steps in a row after which a request is ended with an error


@dataclass(frozen=True)
class Limits:
    """What a step and a request may hold."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    eos_token_ids: tuple[int, ...] = ()
    batching_policy: str = "mixed"
    scheduling_policy: str = "fcfs"
    num_draft_tokens: int = 0  # positions verified beyond the next one


class Scheduler:
    """State of every request, the queues and the block tables. Written by the engine's loop alone."""

    def __init__(self, limits: Limits, kv: Allocator) -> None:
        if limits.max_num_batched_tokens < limits.max_num_seqs * (1 + limits.num_draft_tokens):
            raise ValueError("a step must have room for one token of every row (max_num_batched_tokens >= max_num_seqs)")
        self.limits = limits
        self._kv = kv
        self._waiting = POLICIES[limits.scheduling_policy]()
        self._running: list[Request] = []  # sorted by claim
        self._live: dict[int, Request] = {}
        self._by_id: dict[str, Request] = {}
        self._flights: deque[Flight] = deque()
        self._free_rows = list(range(limits.max_num_seqs - 1, -1, -1))
        self._rows_to_free: list[int] = []
        self._next_uid = 0
        self._step = 0
        self._ledger = Ledger()
        phases: dict[str, tuple[Callable[[StepDraft], None], ...]] = {
            "mixed": (self._plan_decodes, self._plan_prompts),
            "prefill-first": (self._plan_prompts, self._plan_decodes),
            "separate": (self._plan_prompts, self._plan_decodes),
        }
        self._phases = phases[limits.batching_policy]

    # -- questions -------------------------------------------------------------------------------------------------------

    @property
    def num_running(self) -> int:
        """Requests that have a row."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests that have none."""
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        """True while any request is not finished or any result is due."""
        return bool(self._live or self._flights)

    # -- requests come and go --------------------------------------------------------------------------------------------

    def add(self, spec: GenerateRequest) -> None:
        """Queue a request. Raises ``ContextTooLong`` or ``InvalidRequest`` for one that could never run."""
        if spec.id in self._by_id:
            raise InvalidRequest("A request with this id is running already; use another id.", "request_id")
        request = Request(self._next_uid, spec, self.limits.eos_token_ids, self.limits.max_model_len)
        longest = min(self.limits.max_model_len, self._kv.capacity_tokens)
        if request.num_prompt >= longest or request.token_limit > longest:
            raise ContextTooLong(longest, request.num_prompt, request.token_limit - request.num_prompt)
        if len(request.token_ids) >= request.token_limit:
            raise InvalidRequest("Nothing is left to generate: the prior output has max_tokens tokens.", "max_tokens")
        if spec.fork_of is not None and (parent := self._by_id.get(spec.fork_of)) is not None:
            request.fork_of = parent.uid
        self._next_uid += 1
        request.claim = self._waiting.claim(request)
        self._enter(request)

    def _enter(self, request: Request) -> None:
        self._live[request.uid] = request
        self._by_id[request.spec.id] = request
        self._kv.open(request.uid, request.spec.cache_salt, request.spec.lora or "")
        self._waiting.add(request)

    def abort(self, ids: Iterable[str], now: float) -> int:
        """End requests at once; unknown ids are passed over. Returns how many were there."""
        found = [self._by_id[i] for i in ids if i in self._by_id]
        for request in found:
            self._end(request, "abort", now)
        return len(found)

    def _end(self, request: Request, reason: FinishReason, now: float) -> None:
        self._ledger.end(request, reason, now)
        self._leave(request)

    def _leave(self, request: Request) -> None:
        """Take a request out of everything; results that are still due for it will be dropped."""
        if request.running:
            self._give_up_row(request)
        else:
            self._waiting.remove(request)
        self._kv.close(request.uid)
        del self._live[request.uid], self._by_id[request.spec.id]

    def _give_up_row(self, request: Request) -> None:
        del self._running[bisect_left(self._running, request.claim, key=by_claim)]
        self._rows_to_free.append(request.row)
        self._free_rows.append(request.row)
        request.row = NO_ROW

    # -- planning --------------------------------------------------------------------------------------------------------

    def schedule(self, now: float) -> StepPlan | None:
        """Plan the next step, or None when nothing can be planned now."""
        draft = StepDraft(self._step, self.limits.max_num_batched_tokens)
        for phase in self._phases:
            if draft.work and self.limits.batching_policy == "separate":
                break
            phase(draft)
        if not draft.work:
            return None
        for entry in draft.entries:
            if entry.request.scheduled_s is None:
                entry.request.scheduled_s = now
        flight = draft.finish(self._rows_to_free, now)
        self._rows_to_free = []
        self._flights.append(flight)
        self._step += 1
        return flight.plan

    def _plan_decodes(self, draft: StepDraft) -> None:
        """One token (and drafts) for every row whose prompt is done, strongest claim first."""
        step, drafts = draft.step, self.limits.num_draft_tokens
        for r in list(self._running):
            if r.row == NO_ROW or r.scheduled < r.num_known_at_start or r.planned_in == step:
                continue
            left = r.token_limit - len(r.token_ids) - r.pending  # 0: steps in flight bring it to its end
            count = min(1 + drafts, left)
            if count > draft.budget:
                return
            blocks: BlockIds | None = ()
            if count and r.scheduled + count > r.room:
                blocks = self._make_room(r, r.scheduled + count, draft)
            if count and blocks is not None:
                draft.add(r, count, count, blocks)

    def _make_room(self, request: Request, num_tokens: int, draft: StepDraft) -> BlockIds | None:
        """Blocks for ``num_tokens`` tokens of a running request, preempting others with less claim; None when it is itself
        the one to give way, or when all others are in this step already."""
        while (blocks := self._kv.grow(request.uid, num_tokens)) is None:
            candidates = [r for r in self._running if r.planned_in != draft.step]
            victim = self._waiting.victim(candidates)
            if victim is request and len(candidates) == 1 and draft.work:
                return None  # the rows of this step end some day; wait for them with what is computed
            self._preempt(victim, draft)
            if victim is request:
                return None
        request.room = self._kv.blocks_for(num_tokens) * self._kv.block_size
        return blocks

    def _preempt(self, request: Request, draft: StepDraft) -> None:
        """Blocks and row go back; the tokens stay. Results in flight are still appended before it runs again."""
        self._give_up_row(request)
        self._kv.release(request.uid)
        request.computed = request.scheduled = request.room = 0
        request.num_preemptions += 1
        request.blocked_at = -1
        self._ledger.num_preempted += 1
        draft.preempted = True
        self._waiting.add(request)

    def _plan_prompts(self, draft: StepDraft) -> None:
        """Chunks of prompts that are running, then new ones."""
        for request in self._running:
            if draft.budget == 0:
                break
            if request.prefilling and request.planned_in != draft.step:
                self._plan_chunk(request, draft)
        if draft.preempted:
            draft.rest_waits = "blocks: running requests were preempted in this step"
        elif self._waiting:
            self._admit_waiting(draft)

    def _plan_chunk(self, request: Request, draft: StepDraft) -> None:
        """As much of the known tokens as fits into the step. Full blocks become findable with the plan that fills them."""
        left = request.num_known_at_start - request.scheduled
        count = min(left, draft.budget)
        draft.add(request, count, 1 if count == left else 0)
        published = self._kv.publish(request.uid, request.token_ids, request.scheduled)
        draft.published.extend((request.uid, block) for block in published)

    def _admit_waiting(self, draft: StepDraft) -> None:
        """Let waiting requests run while rows, blocks and budget last."""
        admitted: list[Request] = []
        blocked: list[Request] = []
        draft.rest_waits = ""
        for request in self._waiting.in_order():
            if draft.budget == 0:
                draft.rest_waits = "budget: the step's tokens are taken"
                break
            if len(admitted) == len(self._free_rows):
                draft.rest_waits = "rows: max_num_seqs requests are running"
                break
            if request.in_flight:
                draft.waits.append((request.spec.id, "in flight: its last step's result is due"))
                continue
            admission = self._try_admit(request, headroom=len(self._running) + len(admitted))
            if admission is None:
                draft.waits.append((request.spec.id, "blocks: the KV cache has too few free blocks"))
                blocked.append(request)
                if request.overtaken >= MAX_OVERTAKEN:
                    draft.rest_waits = "order: a request ahead was overtaken often enough"
                    break
                if len(blocked) == MAX_LOOKS:
                    draft.rest_waits = "blocks: several requests ahead do not fit"
                    break
                continue
            for other in blocked:
                other.overtaken += 1
            admitted.append(request)
            self._begin(request, self._free_rows[-len(admitted)], admission, draft)
        for request in admitted:
            self._waiting.remove(request)
            insort(self._running, request, key=by_claim)
        if admitted:
            del self._free_rows[-len(admitted) :]

    def _try_admit(self, request: Request, headroom: int) -> Admission | None:
        """Blocks for all known tokens, or None. The headroom, a block for each running row, keeps a newcomer from being
        preempted in the very next steps."""
        available = self._kv.num_available
        if available <= request.blocked_at:
            return None  # nothing came free since it last did not fit
        parent = self._live.get(request.fork_of) if request.fork_of is not None else None
        if parent is not None and parent.running and parent.computed:
            common = min(parent.computed, len(request.token_ids) - 1)
            if parent.token_ids[:common] == request.token_ids[:common]:
                admission = self._kv.fork(parent.uid, request.uid, request.token_ids, common, headroom)
                request.blocked_at = -1 if admission else available
                return admission
        admission = self._kv.admit(request.uid, request.token_ids, headroom)
        request.blocked_at = -1 if admission else available
        return admission

    def _begin(self, request: Request, row: int, admission: Admission, draft: StepDraft) -> None:
        """Put an admitted request on a row and plan its first chunk."""
        request.row = row
        request.num_known_at_start = len(request.token_ids)
        request.computed = request.scheduled = admission.computed
        request.room = len(admission.block_ids[0]) * self._kv.block_size
        self._ledger.lookup(len(request.token_ids), admission.computed)
        if request.cached is None:
            request.cached = min(admission.computed, request.num_prompt)
        draft.copies.extend(admission.copies)
        draft.new_rows.append(
            NewRow(
                uid=request.uid,
                row=row,
                token_ids=tuple(request.token_ids),
                num_prompt=request.num_prompt,
                sampling=request.spec.sampling,
                seed=request.seed,
                sample_index=request.spec.sample_index,
                lora_slot=0,
                block_ids=admission.block_ids,
                computed=admission.computed,
            )
        )
        self._plan_chunk(request, draft)

    # -- results ---------------------------------------------------------------------------------------------------------

    def apply(self, plan: StepPlan, result: StepResult, now: float) -> EngineOutput:
        """Take the oldest plan's result: append tokens, end requests, free what they held. Raises ValueError when the
        result is not of the oldest plan in flight."""
        if not self._flights or self._flights[0].plan is not plan or result.step != plan.step:
            raise ValueError(f"step {plan.step} is not the oldest in flight")
        flight = self._flights.popleft()
        events: list[TokenEvent] = []
        if result.bad_rows:
            self._fail_rows([flight.entries[i] for i in result.bad_rows], flight, now, events)
        for entry, tokens in zip(flight.entries, result.tokens, strict=True):
            if self._live.get(entry.request.uid) is entry.request:
                self._apply_entry(entry, tokens, now, events)
        return EngineOutput(tuple(events), self._record(flight, result.times, now))

    def _apply_entry(self, entry: Entry, tokens: Sequence[int], now: float, events: list[TokenEvent]) -> None:
        request = entry.request
        request.in_flight -= 1
        request.pending -= entry.adds
        request.failures = 0
        if entry.prefill:
            self._ledger.num_prompt_tokens += entry.num_tokens
        if request.running:
            rejected = entry.adds - len(tokens)  # drafts that were not accepted: their K/V is not of the text
            request.scheduled -= rejected
            request.computed += entry.num_tokens - rejected
        if not tokens:
            return
        reason, stop_reason, kept = self._append(request, tokens)
        self._ledger.tokens(request, kept, now)
        events.append(TokenEvent(request.spec.id, tuple(tokens[:kept]), reason, stop_reason, request.cached or 0))
        if request.running and request.computed % self._kv.block_size < entry.num_tokens:
            self._kv.publish(request.uid, request.token_ids, min(request.computed, len(request.token_ids)))
        if reason is not None:
            self._end(request, reason, now)

    def _append(self, request: Request, tokens: Sequence[int]) -> tuple[FinishReason | None, int | None, int]:
        """Add tokens until one ends the request: (why it ended, the stop token asked for, tokens added)."""
        known, stop_ids, limit = request.token_ids, request.stop_ids, request.token_limit
        for kept, token in enumerate(tokens, start=1):
            known.append(token)
            if token in stop_ids and request.num_output > request.spec.sampling.min_tokens:
                return "stop", token if token in request.spec.sampling.stop_token_ids else None, kept
            if len(known) >= limit:
                return "length", None, kept
        return None, None, len(tokens)

    def _fail_rows(self, bad: list[Entry], flight: Flight, now: float, events: list[TokenEvent]) -> None:
        """Rows whose logits were not finite. Who wrote such K/V ends; who only shares a block that it wrote since (and so may
        have read it in this very step) starts over; nothing that either of them wrote stays findable."""
        written_by = {block: uid for f in (flight, *self._flights) for uid, block in f.published}
        suspects = {e.request.uid for e in bad if self._live.get(e.request.uid) is e.request}
        poisoned: set[tuple[int, int]] = set()
        for uid in sorted(suspects):
            held = self._kv.held_blocks(uid)
            if any(written_by.get(block, uid) in suspects - {uid} for block in held):
                continue  # it read another suspect's block: it may be innocent
            poisoned.update(block for block, writer in written_by.items() if writer == uid)
            self._kv.unpublish(held)
            request = self._live[uid]
            message = "The model gave numbers that are not finite for this request; it was ended."
            events.append(TokenEvent(request.spec.id, (), "error", error=message))
            self._end(request, "error", now)
        for uid in self._kv.holders(poisoned):
            self._kv.unpublish(block for block, writer in written_by.items() if writer == uid)
            self._restart(self._live[uid])

    def fail(self, message: str, now: float) -> EngineOutput:
        """A step could not be computed. Every plan in flight is void (later ones build on it); what they published is taken
        back; their requests start over with the tokens they have, and end with an error at the second time."""
        events: list[TokenEvent] = []
        flights, self._flights = tuple(self._flights), deque()
        for flight in flights:
            self._kv.unpublish(block for _, block in flight.published)
        for request in {e.request.uid: e.request for f in flights for e in f.entries}.values():
            if self._live.get(request.uid) is not request:
                continue
            request.failures += 1
            if request.failures < MAX_FAILURES:
                self._restart(request)
            else:
                events.append(TokenEvent(request.spec.id, (), "error", error=message))
                self._end(request, "error", now)
        return EngineOutput(tuple(events), self._record(None, StepTimes(now, now), now))

    def _restart(self, request: Request) -> None:
        """Begin again under a new uid, so that results still in flight are dropped."""
        self._leave(request)
        fresh = Request(self._next_uid, request.spec, self.limits.eos_token_ids, self.limits.max_model_len)
        self._next_uid += 1
        for name in ("claim", "token_ids", "cached", "failures", "scheduled_s", "first_token_s", "last_token_s"):
            setattr(fresh, name, getattr(request, name))
        fresh.num_preemptions = request.num_preemptions + 1
        self._ledger.num_preempted += 1
        self._enter(fresh)

    # -- records and proofs ----------------------------------------------------------------------------------------------

    def snapshot(self, now: float) -> StepRecord:
        """A record without a step: what changed while nothing ran (an abort, an arrival that waits)."""
        return self._record(None, StepTimes(now, now), now)

    def _record(self, flight: Flight | None, times: StepTimes, now: float) -> StepRecord:
        queues = (len(self._running), len(self._waiting))
        ledger, self._ledger = self._ledger, Ledger()
        return ledger.record(flight, times, queues, self._kv.counts(), now)

    def check(self) -> None:
        """Raise RuntimeError when an invariant is broken. For tests, and when idle in debug runs."""
        self._kv.check()
        problems = []
        rows = [r.row for r in self._running]
        waiting = list(self._waiting.in_order())
        if sorted(rows + self._free_rows) != list(range(self.limits.max_num_seqs)):
            problems.append("rows are lost or double")
        if sorted(r.uid for r in (*self._running, *waiting)) != sorted(self._live):
            problems.append("a request is in no queue or in two")
        if [r.claim for r in self._running] != sorted(r.claim for r in self._running):
            problems.append("running requests are out of order")
        for r in self._live.values():
            flying = [e for f in self._flights for e in f.entries if e.request is r]
            if r.in_flight != len(flying) or r.pending != sum(e.adds for e in flying):
                problems.append(f"request {r.uid} miscounts what is in flight")
            held = self._kv.held_blocks(r.uid)
            if r.running and len(held) < self._kv.blocks_for(r.scheduled):
                problems.append(f"request {r.uid} runs beyond its blocks")
            if not r.running and held:
                problems.append(f"request {r.uid} waits but holds blocks")
            if not r.computed <= r.scheduled <= len(r.token_ids) + r.pending:
                problems.append(f"request {r.uid}: computed {r.computed}, scheduled {r.scheduled} are out of step")
        if problems:
            raise RuntimeError("scheduler: " + "; ".join(problems))
