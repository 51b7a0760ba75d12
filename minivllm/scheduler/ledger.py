"""What a step's record says: what happened is gathered while the scheduler works, and told once as a StepRecord.

With overlap, the next step is planned before this one's record is due. What that planning does to blocks belongs to the next
record: else a reader would see a block let go, or counted, before it hears who was given it. So ``close`` is called before a
step is planned while another is in flight, and keeps what happened up to then for the older step's record.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from minivllm.kv.allocator import PoolCounts
from minivllm.records import ArrivalRecord, FinishedTimes, PreemptionReason, PreemptionRecord, RowRecord, StepRecord
from minivllm.scheduler.book import Book
from minivllm.scheduler.draft import Flight
from minivllm.scheduler.request import Request
from minivllm.types import FinishReason, GenerateRequest, StepTimes


@dataclass(frozen=True)
class _Moves:
    """What became of blocks between two moments, and how many were free, cached and held at the second."""

    preempted: tuple[PreemptionRecord, ...]
    released: tuple[str, ...]
    freed: tuple[tuple[int, int], ...]
    counts: PoolCounts


@dataclass
class Ledger:
    """What happened since the last record. Written by the ``Scheduler`` and those who work for it."""

    book: Book
    prefix_queries: int = 0
    prefix_hits: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    ttft_s: list[float] = field(default_factory=list)
    itl_s: list[float] = field(default_factory=list)
    finished: list[FinishedTimes] = field(default_factory=list)
    arrived: list[ArrivalRecord] = field(default_factory=list)
    paused: list[str] = field(default_factory=list)
    resumed: list[str] = field(default_factory=list)
    preempted: list[PreemptionRecord] = field(default_factory=list)
    _closed: deque[_Moves] = field(default_factory=deque)  # one for each step in flight but the newest

    def arrive(self, spec: GenerateRequest) -> None:
        """A request is known from now on."""
        self.arrived.append(
            ArrivalRecord(
                id=spec.id,
                arrival_s=spec.arrival_s,
                num_prompt=len(spec.prompt_ids),
                max_tokens=spec.sampling.max_tokens or 0,
                num_prior=len(spec.prior_output_ids),
                priority=spec.priority,
                parent=spec.fork_of,
                tenant=spec.tenant,
                received_s=spec.received_s,
            )
        )

    def preempt(self, request: Request, reason: PreemptionReason, by: Request | None = None) -> None:
        """A request is about to lose its place."""
        self.preempted.append(PreemptionRecord(request.spec.id, reason, by.spec.id if by else None, request.computed))

    def lookup(self, queries: int, hits: int) -> None:
        """A request looked for its prompt in the prefix cache."""
        self.prefix_queries += queries
        self.prefix_hits += hits

    def tokens(self, request: Request, count: int, now: float) -> None:
        """A request got tokens."""
        if request.first_token_s is None:
            request.first_token_s = now
            if not request.spec.prior_output_ids:  # or its first token came in another life
                self.ttft_s.append(now - request.arrival_s)
        else:
            self.itl_s.append((now - request.last_token_s) / count)
        request.last_token_s = now
        self.num_output_tokens += count

    def end(self, request: Request, reason: FinishReason, now: float) -> None:
        """A request ended, one way or another."""
        self.finished.append(
            FinishedTimes(
                id=request.spec.id,
                reason=reason,
                num_prompt=request.num_prompt,
                num_cached=request.cached or 0,
                num_output=request.num_output,
                max_tokens=request.spec.sampling.max_tokens or 0,
                num_preemptions=request.num_preemptions,
                arrival_s=request.arrival_s,
                scheduled_s=request.scheduled_s,
                first_token_s=request.first_token_s,
                finished_s=now,
            )
        )

    # -- what the planning of a step divides -----------------------------------------------------------------------------

    def close(self) -> None:
        """A step is about to be planned while another is in flight."""
        self._closed.append(self._moves())

    def reopen(self, count: int = 1) -> None:
        """Take back the last ``count`` times that ``close`` was called: no step came of it, or the steps are void."""
        book = self.book
        for _ in range(count):
            moves = self._closed.pop()
            self.preempted[:0] = moves.preempted
            book.released[:0] = moves.released
            book.kv.freed_again(moves.freed)

    def _moves(self) -> _Moves:
        book = self.book
        moves = _Moves(tuple(self.preempted), tuple(book.released), book.kv.take_freed(), book.kv.counts())
        self.preempted, book.released = [], []
        return moves

    # -- the record ------------------------------------------------------------------------------------------------------

    def rows(self, flight: Flight) -> tuple[RowRecord, ...]:
        """The rows of a step whose result is in but not taken yet: all tokens that it was given are known by now."""
        told = self.book.limits.record_tokens
        return tuple([
            RowRecord(
                e.request.spec.id, e.start, e.num_tokens, "prefill" if e.prefill else "decode", e.blocks, e.cached,
                tuple(e.request.token_ids[e.start : e.start + e.num_tokens]) if told else (),
            )
            for e in flight.entries
        ])  # fmt: skip

    def record(
        self,
        flight: Flight | None,
        times: StepTimes,
        now: float,
        rows: tuple[RowRecord, ...] = (),
        outputs: Sequence[tuple[int, ...]] = (),
    ) -> StepRecord:
        """What happened as a record; all begins anew. No ``flight``: no step was, and none is in flight."""
        book = self.book
        moves = self._closed.popleft() if self._closed else self._moves()
        record = StepRecord(
            step=flight.plan.step if flight else -1,
            scheduled_s=flight.scheduled_s if flight else now,
            launched_s=times.launched_s,
            finished_s=times.finished_s,
            collected_s=now,
            rows=rows,
            num_running=len(book.running),
            num_waiting=len(book.waiting),
            num_paused=len(book.paused),
            waits=flight.waits if flight else (),
            rest_waits=flight.rest_waits if flight else "",
            rest_behind=flight.rest_behind if flight else (),
            blocks_total=moves.counts.total,
            blocks_free=moves.counts.free,
            blocks_cached=moves.counts.cached,
            blocks_referenced=moves.counts.referenced,
            prefix_queries=self.prefix_queries,
            prefix_hits=self.prefix_hits,
            num_prompt_tokens=self.num_prompt_tokens,
            num_output_tokens=self.num_output_tokens,
            ttft_s=tuple(self.ttft_s),
            itl_s=tuple(self.itl_s),
            finished=tuple(self.finished),
            arrived=tuple(self.arrived),
            paused=tuple(self.paused),
            resumed=tuple(self.resumed),
            preempted=moves.preempted,
            released=moves.released,
            freed=moves.freed,
            outputs=tuple(outputs) if book.limits.record_tokens else (),
        )
        self.prefix_queries = self.prefix_hits = self.num_prompt_tokens = self.num_output_tokens = 0
        self.ttft_s, self.itl_s, self.finished = [], [], []
        self.arrived, self.paused, self.resumed = [], [], []
        return record

