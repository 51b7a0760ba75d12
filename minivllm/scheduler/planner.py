"""What the next step holds: decodes, chunks of running prompts, new requests.

* Blocks for all known tokens are given on admission, so a prompt in chunks never waits for memory half-way; afterwards a row
  grows by one block at a time. When none is left, the running request with the least claim is preempted: its blocks go back
  (and stay findable), it queues again with the tokens it has, and goes on later with the same text.
* Rows that are in the step being planned are never victims. So nothing that this step publishes or shares is ever taken back
  inside the same planning.
* A request gives way ``MAX_EVICTIONS`` times. Then it waits until the blocks for its longest possible text are free, takes them
  all at once and is no victim any more.
* A waiting request that does not fit lets smaller ones behind it pass, ``MAX_OVERTAKEN`` of them; then the queue holds until
  it fits. Running requests end, so it does: neither side starves.
"""

from collections.abc import Callable, Collection

from minivllm.kv.allocator import Admission
from minivllm.records import WaitRecord
from minivllm.scheduler.book import Book
from minivllm.scheduler.draft import StepDraft
from minivllm.scheduler.ledger import Ledger
from minivllm.scheduler.request import NO_ROW, Request
from minivllm.scheduler.room import StepRoom
from minivllm.types import BlockIds, NewRow

MAX_OVERTAKEN = 64  # later requests that may be admitted before one that waits for blocks
MAX_NAMED = 8  # of those who are in one's way, how many a record names
_TRIAL = "trial: a step failed, and it is being found out by whose fault"
_PRIORITY = "priority: requests that came later, of a better priority, run"
MAX_LOOKS = 8  # requests that do not fit which one step looks at: the cost of a step stays bounded


class Planner:
    """Fills a ``StepDraft``. Holds no state of its own; moves requests in the book it was given."""

    def __init__(self, book: Book, ledger: Ledger, room: StepRoom) -> None:
        self._book = book
        self._room = room
        self._kv = book.kv
        self._ledger = ledger
        self._limits = book.limits
        phases: dict[str, tuple[Callable[[StepDraft], None], ...]] = {
            "mixed": (self._plan_decodes, self._plan_prompts),
            "prefill-first": (self._plan_prompts, self._plan_decodes),
            "separate": (self._plan_prompts, self._plan_decodes),
        }
        self._phases = phases[self._limits.batching_policy]

    def fill(self, draft: StepDraft) -> None:
        """Put work into the draft by the batching policy."""
        for phase in self._phases:
            if draft.work and self._limits.batching_policy == "separate":
                break
            phase(draft)

    def _plan_decodes(self, draft: StepDraft) -> None:
        """One token (and drafts, and tokens that are certain) for every row whose prompt is done, strongest claim first."""
        step, drafts = draft.step, self._limits.num_draft_tokens
        spare = draft.budget - len(self._book.running) * (1 + drafts)  # tokens left when every row has its own
        for r in list(self._book.running):
            if r.row == NO_ROW or r.scheduled < r.num_known_at_start or r.planned_in == step:
                continue
            draft.at = r
            left = r.token_limit - len(r.token_ids) - r.pending  # 0: steps in flight bring it to its end
            forced = r.forced(min(left - 1, spare)) if r.guide is not None else ()
            spare -= len(forced)
            count = 1 + len(forced) if forced else min(1 + drafts, left)
            if count > draft.budget:
                return
            blocks: BlockIds | None = ()
            if count and r.scheduled + count > r.room:
                blocks = self._make_room(r, r.scheduled + count, draft)
            if count and blocks is not None:
                draft.add(r, count, count, blocks, forced)

    def _make_room(self, request: Request, num_tokens: int, draft: StepDraft) -> BlockIds | None:
        """Blocks for ``num_tokens`` tokens of a running request, preempting others with less claim; None when it is itself
        the one to give way, or when all others are in this step already."""
        while (blocks := self._kv.grow(request.uid, num_tokens)) is None:
            candidates = [r for r in self._book.running if r.planned_in != draft.step and not r.pinned]
            victim = self._book.waiting.victim(candidates)
            if victim is request and len(candidates) == 1 and draft.work:
                return None  # the rows of this step end some day; wait for them with what is computed
            self._ledger.preempt(victim, "blocks", None if victim is request else request)
            self._book.preempt(victim)
            victim.evictions += 1
            draft.preempted = True
            if victim is request:
                return None
        request.room = self._kv.blocks_for(num_tokens) * self._kv.block_size
        return blocks

    def _plan_prompts(self, draft: StepDraft) -> None:
        """Chunks of prompts that are running, then new ones."""
        for request in self._book.running:
            if draft.budget == 0:
                break
            draft.at = request
            if request.prefilling and request.planned_in != draft.step:
                self._plan_chunk(request, draft)
        if draft.preempted:
            draft.rest_waits = "blocks: running requests were preempted in this step"
        elif self._book.waiting:
            self._admit_waiting(draft)

    def _plan_chunk(self, request: Request, draft: StepDraft) -> None:
        """As much of the known tokens as fits into the step. Full blocks become findable with the plan that fills them."""
        left = request.num_known_at_start - request.scheduled
        count = min(left, draft.budget)
        if count < left:
            draft.add(request, count, 0)
        else:
            most = min(draft.budget - count, request.room - request.num_known_at_start)
            forced = request.forced(min(most, request.token_limit - len(request.token_ids) - 1))
            draft.add(request, count + len(forced), 1 + len(forced), (), forced)
        # What is certain is not known yet: its blocks become findable with the step's result, as those of sampled tokens do.
        published = self._kv.publish(request.uid, request.token_ids, min(request.scheduled, request.num_known_at_start))
        draft.published.extend((request.uid, block) for block in published)

    def _admit_waiting(self, draft: StepDraft) -> None:
        """Let waiting requests run while rows, blocks and budget last."""
        admitted: list[Request] = []
        on_trial = self._book.trials.group
        draft.rest_waits = _TRIAL if on_trial else ""
        try:
            self._admit_some(on_trial, admitted, draft)
        finally:
            self._book.run(admitted)

    def _admit_some(self, on_trial: Collection[int], admitted: list[Request], draft: StepDraft) -> None:
        blocked: list[Request] = []
        for request in self._book.waiting.in_order():
            if on_trial and request.uid not in on_trial:
                continue
            draft.at = request
            if full := self._full(draft, len(admitted)):
                self._wait(request, full, admitted, draft)
                draft.rest_waits = draft.rest_waits or full
                break
            if request.due:
                draft.waits.append(WaitRecord(request.spec.id, "in flight: its last step's result is due"))
                continue
            admission = self._try_admit(request, len(self._book.running) + len(admitted))
            if admission is None:
                self._wait(request, "blocks: the KV cache has too few free blocks", admitted, draft)
                blocked.append(request)
                if request.overtaken >= MAX_OVERTAKEN:
                    draft.rest_waits = "order: a request ahead was overtaken often enough"
                    draft.rest_behind = (request.spec.id,)
                    break
                if len(blocked) == MAX_LOOKS:
                    draft.rest_waits = "blocks: several requests ahead do not fit"
                    draft.rest_behind = tuple([r.spec.id for r in blocked])
                    break
                continue
            for other in blocked:
                other.overtaken += 1
            request.row = self._book.free_rows[-1 - len(admitted)]
            admitted.append(request)
            self._begin(request, admission, draft)

    def _full(self, draft: StepDraft, num_admitted: int) -> str:
        """Why no further request fits into the step; "" while one may."""
        if draft.budget == 0:
            return "budget: the step's tokens are taken"
        if num_admitted == len(self._book.free_rows):
            return "rows: max_num_seqs requests are running"
        if len(self._book.running) + num_admitted >= self._room.rows:
            return "memory: the device ran out of it, so fewer requests run for a while"
        return ""

    def _wait(self, request: Request, reason: str, admitted: list[Request], draft: StepDraft) -> None:
        """Note why a request waits: the policy's reason if it has one, for without those ahead there would be room."""
        ahead = self._book.waiting.let_ahead(request, (*self._book.running, *admitted))
        behind = tuple([r.spec.id for r in ahead[:MAX_NAMED]])
        draft.waits.append(WaitRecord(request.spec.id, _PRIORITY if ahead else reason, behind))

    def _try_admit(self, request: Request, headroom: int) -> Admission | None:
        """Blocks for all known tokens, or None. The headroom, a block for each running row, keeps a newcomer from being
        preempted in the very next steps; of one that was preempted often enough, it is all that it may come to need."""
        available = self._kv.num_available
        if request.pinned:
            headroom = self._kv.blocks_for(request.token_limit) - self._kv.blocks_for(len(request.token_ids))
        if available <= request.blocked_at:
            return None  # nothing came free since it last did not fit
        parent = self._book.live.get(request.fork_of) if request.fork_of is not None else None
        if parent is not None and parent.running and parent.computed and request.reads_cache:
            common = min(parent.computed, len(request.token_ids) - 1)
            if parent.token_ids[:common] == request.token_ids[:common]:
                admission = self._kv.fork(parent.uid, request.uid, request.token_ids, common, headroom)
                request.blocked_at = -1 if admission else available
                return admission
        admission = self._kv.admit(request.uid, request.token_ids, headroom, reads_cache=request.reads_cache)
        request.blocked_at = -1 if admission else available
        return admission

    def _begin(self, request: Request, admission: Admission, draft: StepDraft) -> None:
        """Begin an admitted request on its row, and plan its first chunk."""
        request.num_known_at_start = len(request.token_ids)
        request.computed = request.scheduled = request.borrowed = admission.computed
        block_ids = admission.block_ids
        if request.pinned and (more := self._kv.grow(request.uid, request.token_limit)):
            block_ids = tuple(held + added for held, added in zip(block_ids, more, strict=True))
        request.room = len(block_ids[0]) * self._kv.block_size
        self._ledger.lookup(len(request.token_ids), admission.computed)
        if request.cached is None:
            request.cached = min(admission.computed, request.num_prompt)
        draft.copies.extend(admission.copies)
        draft.new_rows.append(
            NewRow(
                uid=request.uid,
                row=request.row,
                token_ids=tuple(request.token_ids),
                num_prompt=request.num_prompt,
                sampling=request.spec.sampling,
                seed=request.seed,
                sample_index=request.spec.sample_index,
                lora_slot=0,
                block_ids=block_ids,
                computed=admission.computed,
            )
        )
        self._plan_chunk(request, draft)
