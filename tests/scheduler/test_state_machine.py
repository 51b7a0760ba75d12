"""Scheduler and KV bookkeeping as a state machine: anything may happen in any order, and every invariant holds after each move.

Hypothesis draws additions, steps, late results, aborts, forks, texts with certain tokens, failed steps, requests that break
every step they are part of, want of memory, rows that are not finite, and option sets. The token runner checks at every step
that each row reads its own K/V, so the publishing rules are proved by what is read, not by how it is done. Whatever happens,
something gets on: within ``PROGRESS`` steps a request gets further than it ever was, or ends.
``benchmarks/reliability/state_machine.py`` drives the same machine for much longer.
"""

from collections import deque
from collections.abc import Sequence
from itertools import takewhile

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from record_watch import RecordWatch
from token_runner import TokenRunner, expected_tokens

from minivllm.errors import ContextTooLong, OutOfDeviceMemory, RequestFault
from minivllm.kv.allocator import Allocator
from minivllm.records import EngineOutput
from minivllm.scheduler.book import Limits
from minivllm.scheduler.request import MAX_EVICTIONS
from minivllm.scheduler.scheduler import Scheduler
from minivllm.scheduler.sharing import Sharing
from minivllm.types import GenerateRequest, SamplingParams, StepPlan

VOCAB = 31
BLOCK = 4
HEADS = ((), tuple(range(9)), tuple(range(16)), (5,) * 21)  # prompts share these beginnings
PROGRESS = 64
CURSES = ("step", "row", "memory", "plan", "apply")  # where a request breaks things


class Certain:
    """A grammar's stand-in: it knows the whole text, and that some runs of its tokens come for certain."""

    problem = "this token should not have come"

    def __init__(self, text: Sequence[int], prior: int) -> None:
        self.text, self.at, self.curse = text, prior, ""

    def ahead(self, skip: int, most: int) -> tuple[int, ...]:
        if self.curse == "plan":
            raise KeyError("cursed")
        certain = takewhile(lambda i: i % 7 > 2, range(self.at, len(self.text)))
        return tuple([self.text[i] for i in certain][skip : skip + most])

    def tell(self, token_ids: Sequence[int]) -> None:
        if self.curse == "tell":
            raise IndexError("cursed")
        due = self.text[self.at : self.at + len(token_ids)]
        right = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(token_ids, due, strict=False))))
        self.at += right
        self.taken = (right, "more" if right == len(token_ids) else "refused")

    def took(self) -> tuple[int, str]:
        if self.curse == "apply":
            raise IndexError("cursed")
        return self.taken


class SchedulerMachine(RuleBasedStateMachine):
    """Random lives of random requests over a small pool."""

    @initialize(
        num_blocks=st.integers(12, 40),
        max_num_seqs=st.integers(1, 6),
        budget=st.integers(12, 40),
        drafts=st.sampled_from((0, 0, 1, 4)),
        depth=st.integers(0, 2),
        batching=st.sampled_from(("mixed", "prefill-first", "separate")),
        scheduling=st.sampled_from(("fcfs", "priority")),
        caching=st.booleans(),
        seed=st.integers(0, 99),
    )
    def start(
        self, num_blocks: int, max_num_seqs: int, budget: int, drafts: int, depth: int, batching: str, scheduling: str,
        caching: bool, seed: int,
    ) -> None:  # fmt: skip
        budget = max(budget, max_num_seqs * (1 + drafts))
        limits = Limits(max_num_seqs, budget, 64, (3,), batching, scheduling, drafts, record_tokens=seed % 4 > 0)
        self.kv = Allocator((num_blocks,), BLOCK, caching)
        self.scheduler = Scheduler(limits, self.kv)
        self.records = RecordWatch(self.scheduler, self.kv)
        self.scheduler._book.sharing = Sharing(BLOCK, min_rows=2, min_tokens=2 * BLOCK)  # prompts are short here
        self.runner = TokenRunner(BLOCK, num_blocks, max_num_seqs, VOCAB, np.random.default_rng(seed) if drafts else None)
        self.runner.breaks = self._break
        self.depth = depth
        self.flights: deque = deque()
        self.now = 0.0
        self.asked: dict[str, GenerateRequest] = {}
        self.got: dict[str, list[int]] = {}
        self.told: dict[str, list[tuple[int, int]]] = {}
        self.ends: dict[str, str] = {}
        self.aborted: set[str] = set()
        self.paused: set[str] = set()
        self.poisoned: set[str] = set()
        self.cursed: dict[str, str] = {}
        self.unlucky: set[str] = set()  # were alone in a step that failed by accident
        self.names: dict[int, str] = {}  # of uids
        self.furthest: dict[str, int] = {}  # tokens computed, at best
        self.num_ended = self.num_steps = self.last_progress = 0

    # -- moves -----------------------------------------------------------------------------------------------------------

    def _add(self, request: GenerateRequest, guided: bool = False) -> None:
        guide = Certain(list(request.prior_output_ids) + self._expected(request), len(request.prior_output_ids))
        try:
            self.scheduler.add(request, guide if guided else None)
        except ContextTooLong:
            total = len(request.prompt_ids) + (request.sampling.max_tokens or 0)
            assert total > min(64, self.kv.capacity_tokens)
            return
        self.asked[request.id] = request
        self.got[request.id] = []
        self.told[request.id] = []

    @rule(
        head=st.sampled_from(HEADS), tail=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12),
        max_tokens=st.integers(1, 20), salt=st.sampled_from(("", "", "other")), priority=st.integers(0, 2),
        eos=st.booleans(), seed=st.integers(0, 2), tells=st.booleans(), guided=st.booleans(),
    )  # fmt: skip
    def add(
        self, head: tuple[int, ...], tail: list[int], max_tokens: int, salt: str, priority: int, eos: bool, seed: int,
        tells: bool, guided: bool,
    ) -> None:  # fmt: skip
        tell = 0 if tells else None
        sampling = SamplingParams(max_tokens=max_tokens, seed=seed, ignore_eos=not eos, prompt_logprobs=tell)
        name = f"r{len(self.asked)}"
        prompt = head + tuple(tail)
        self._add(
            GenerateRequest(
                id=name, prompt_ids=prompt, sampling=sampling, arrival_s=self.now, cache_salt=salt, priority=priority
            ),
            guided and not self.scheduler.limits.num_draft_tokens,  # certain tokens stand behind a known number of others
        )

    @precondition(lambda self: self._open())
    @rule(pick=st.integers(0, 1 << 30), seed=st.integers(3, 5), more=st.integers(1, 8))
    def fork(self, pick: int, seed: int, more: int) -> None:
        parent = self.asked[self._pick(pick)]
        prior = parent.prior_output_ids + tuple(self.got[parent.id])
        sampling = SamplingParams(max_tokens=len(prior) + more, seed=seed, ignore_eos=True)
        self._add(
            GenerateRequest(
                id=f"r{len(self.asked)}",
                prompt_ids=parent.prompt_ids,
                prior_output_ids=prior,
                sampling=sampling,
                arrival_s=self.now,
                cache_salt=parent.cache_salt,
                fork_of=parent.id,
            )
        )

    @precondition(lambda self: self._open())
    @rule(pick=st.integers(0, 1 << 30))
    def abort(self, pick: int) -> None:
        name = self._pick(pick)
        assert self.scheduler.abort([name], self.now) == 1
        self.aborted.add(name)
        self.paused.discard(name)

    @precondition(lambda self: self._open())
    @rule(pick=st.integers(0, 1 << 30))
    def pause(self, pick: int) -> None:
        """Its reader does not read: it holds nothing, whatever is in flight for it."""
        name = self._pick(pick)
        assert self.scheduler.pause([name, "nobody", name]) == (name not in self.paused)
        self.paused.add(name)
        request = self.scheduler._book.by_id[name]
        assert not request.running
        assert not self.kv.held_blocks(request.uid)

    @precondition(lambda self: self.paused)
    @rule(pick=st.integers(0, 1 << 30))
    def resume(self, pick: int) -> None:
        name = sorted(self.paused)[pick % len(self.paused)]
        self.paused.discard(name)
        assert self.scheduler.resume([name, "nobody"], self.now) == (name not in self.ends)

    @precondition(lambda self: len(self.flights) <= self.depth)
    @rule(fails=st.integers(0, 19))
    def plan(self, fails: int) -> None:
        self._plan(fails == 0)

    @precondition(lambda self: self.flights)
    @rule()
    def collect(self) -> None:
        self._collect()

    @rule(steps=st.integers(1, 6))
    def run_a_little(self, steps: int) -> None:
        for _ in range(steps):
            self._turn()

    @precondition(lambda self: self._open())
    @rule(pick=st.integers(0, 1 << 30))
    def poison(self, pick: int) -> None:
        """The model gives numbers that are not finite for one running request."""
        name = self._pick(pick)
        request = self.scheduler._book.by_id[name]
        if not request.in_flight and request.running:
            self.runner.bad_uids.add(request.uid)
            self.poisoned.add(name)

    @precondition(lambda self: self._open())
    @rule(pick=st.integers(0, 1 << 30), curse=st.sampled_from(CURSES))
    def curse(self, pick: int, curse: str) -> None:
        """From now on something breaks whenever it is this request's turn."""
        name = self._pick(pick)
        guide = self.scheduler._book.by_id[name].guide
        if guide is not None:
            guide.curse = curse
        if guide is not None or curse not in ("plan", "apply"):
            self.cursed[name] = curse

    @rule(tokens=st.sampled_from((None, None, 8, 16, 24)), rows=st.sampled_from((None, None, 1, 2)))
    def lose_memory(self, tokens: int | None, rows: int | None) -> None:
        """From now on larger steps run out of memory; or no step does."""
        self.runner.memory_tokens = None if tokens is None else max(tokens, 1 + self.scheduler.limits.num_draft_tokens, 16)
        self.runner.memory_rows = rows

    # -- what the moves are made of --------------------------------------------------------------------------------------

    def _open(self) -> list[str]:
        return [name for name in self.asked if name not in self.ends and name not in self.aborted]

    def _pick(self, pick: int) -> str:
        names = self._open()
        return names[pick % len(names)]

    def _break(self, plan: StepPlan) -> None:
        """What the device does with cursed requests."""
        self.names.update({new.uid: self.scheduler._book.live[new.uid].spec.id for new in plan.new_rows})
        self.runner.bad_uids |= {new.uid for new in plan.new_rows if self.names[new.uid] in self.poisoned}
        for work in plan.work:
            curse = self.cursed.get(self.names[work.uid])
            if curse == "row":
                raise RequestFault(work.uid)
            if curse == "memory":
                raise OutOfDeviceMemory("cursed")
            if curse == "step":
                raise ValueError("cursed")

    def _plan(self, fails: bool = False) -> bool:
        self.now += 1.0
        try:
            plan = self.scheduler.schedule(self.now)
            if plan is None:
                able = set(self._open()) - self.paused
                assert self.flights or not able, "nothing is in flight and something could run, but nothing runs"
                assert self.scheduler.has_work == bool(self.flights or able)
                return False
            self.num_steps += 1
            assert not {w.uid for w in plan.work} & {self.scheduler._book.by_id[name].uid for name in self.paused}
            assert sum(w.num_tokens for w in plan.work) <= self.scheduler.limits.max_num_batched_tokens
            if fails:
                self.runner.fail_steps.add(plan.step)
            self.flights.append((plan, self.runner.launch(plan)))
        except Exception as error:
            if isinstance(error, AssertionError):
                raise
            self._fail(error)
        return True

    def _collect(self) -> None:
        self.now += 1.0
        plan, pending = self.flights.popleft()
        try:
            result = pending.result()
        except RuntimeError as error:
            in_flight = {w.uid for p, _ in (*self.flights, (plan, None)) for w in p.work}
            self.unlucky |= {self.names[uid] for uid in in_flight} if len(in_flight) == 1 else set()
            self._fail(error)
            return
        self._note(self.scheduler.apply(plan, result, self.now))

    def _fail(self, error: Exception) -> None:
        self.flights.clear()
        culprit = error.uid if isinstance(error, RequestFault) else None
        self._note(self.scheduler.fail(self.now, culprit, out_of_memory=isinstance(error, OutOfDeviceMemory)))

    def _turn(self) -> None:
        planned = self._plan()
        if self.flights and (not planned or len(self.flights) > self.depth):
            self._collect()

    def _note(self, output: EngineOutput) -> None:
        for event in output.events:
            assert event.id not in self.ends, "an event after the end"
            assert event.id not in self.aborted, "an event after an abort"
            self.got[event.id] += event.token_ids
            self.told[event.id] += [(round(-found.logprob), found.rank) for found in event.prompt_logprobs]
            if event.finish_reason:
                self.ends[event.id] = event.finish_reason
                self.paused.discard(event.id)

    # -- what must hold --------------------------------------------------------------------------------------------------

    @invariant()
    def whole(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check()
        if not self.flights:
            self.scheduler.snapshot(self.now)
        live = self.scheduler._book.by_id
        assert all(r.evictions <= MAX_EVICTIONS for r in live.values()), "a request gave way too often"
        further = {name: r.computed for name, r in live.items() if r.computed > self.furthest.get(name, 0)}
        ended = len(self.ends) + len(self.aborted)
        if further or ended > self.num_ended or not live:
            self.furthest.update(further)
            self.num_ended, self.last_progress = ended, self.num_steps
        assert self.num_steps - self.last_progress <= PROGRESS, "nothing gets on"

    def _expected(self, request: GenerateRequest) -> list[int]:
        stop = frozenset() if request.sampling.ignore_eos else frozenset((3,))
        known = request.prompt_ids + request.prior_output_ids
        count = (request.sampling.max_tokens or 0) - len(request.prior_output_ids)
        return expected_tokens(known, count, VOCAB, request.sampling.seed or 0, stop)

    def teardown(self) -> None:
        """Everything comes to its end, with the text that each request has alone."""
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.resume(sorted(self.paused), self.now)
        self.paused.clear()
        for _ in range(5000):
            if not self.scheduler.has_work:
                break
            self._turn()
            self.whole()
        assert not self.scheduler.has_work, "it does not come to an end"
        assert self.kv.counts().referenced == 0
        for name, request in self.asked.items():
            expected, told = self._expected(request), self.told[name]
            prompt = list(enumerate(request.prompt_ids))[1:] if request.sampling.prompt_logprobs is not None else []
            assert told == prompt[: len(told)], "each token of a prompt is told once, in order"
            assert told == prompt or not self.got[name], "all of a prompt is told by its first token"
            if name in self.aborted or self.ends[name] == "error":
                assert self.got[name] == expected[: len(self.got[name])]
                guilty = self.poisoned | self.cursed.keys() | self.unlucky
                assert name in self.aborted or name in guilty, "it ended with an error that was not its own"
            else:
                assert self.got[name] == expected
                assert self.ends[name] in ("stop", "length")


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
