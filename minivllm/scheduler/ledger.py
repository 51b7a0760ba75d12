"""What a step's record says: counts gathered while the scheduler works, told once as a StepRecord."""

from dataclasses import dataclass, field

from minivllm.kv.allocator import PoolCounts
from minivllm.scheduler.draft import Flight
from minivllm.scheduler.request import Request
from minivllm.types import FinishedTimes, FinishReason, StepRecord, StepTimes


@dataclass
class Ledger:
    """Counts since the last record. Written by the ``Scheduler`` alone."""

    prefix_queries: int = 0
    prefix_hits: int = 0
    num_preempted: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    ttft_s: list[float] = field(default_factory=list)
    itl_s: list[float] = field(default_factory=list)
    finished: list[FinishedTimes] = field(default_factory=list)

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

    def record(
        self, flight: Flight | None, times: StepTimes, queues: tuple[int, int, int], blocks: PoolCounts, now: float
    ) -> StepRecord:
        """The counts as a record; they begin anew. ``queues``: running, waiting, paused; no ``flight``: no step was."""
        record = StepRecord(
            step=flight.plan.step if flight else -1,
            scheduled_s=flight.scheduled_s if flight else now,
            launched_s=times.launched_s,
            finished_s=times.finished_s,
            collected_s=now,
            rows=flight.rows if flight else (),
            num_running=queues[0],
            num_waiting=queues[1],
            num_paused=queues[2],
            waits=flight.waits if flight else (),
            rest_waits=flight.rest_waits if flight else "",
            blocks_total=blocks.total,
            blocks_free=blocks.free,
            blocks_cached=blocks.cached,
            blocks_referenced=blocks.referenced,
            prefix_queries=self.prefix_queries,
            prefix_hits=self.prefix_hits,
            num_prompt_tokens=self.num_prompt_tokens,
            num_output_tokens=self.num_output_tokens,
            num_preempted=self.num_preempted,
            ttft_s=tuple(self.ttft_s),
            itl_s=tuple(self.itl_s),
            finished=tuple(self.finished),
        )
        self.prefix_queries = self.prefix_hits = self.num_preempted = self.num_prompt_tokens = self.num_output_tokens = 0
        self.ttft_s, self.itl_s, self.finished = [], [], []
        return record
