"""The loop: plan a step, launch it, take the oldest result.

This is the only file that sees both halves. The scheduler plans without knowing tensors, the executor computes without knowing
requests; here they meet in a ``StepPlan`` one way and a ``StepResult`` the other. With ``overlap`` 0 a step's tokens are known
before the next is planned. With 1 the next step is planned and launched first, because the sampled tokens it needs are on the
device already: the device never waits for this loop. Same lines, another depth.

A step with rows that follow a grammar is launched as early as any other, but what its rows may say next depends on the tokens
of the steps before it. So its sampling waits for these, and the masks are computed while the device is at the step's body.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt

from minivllm.engine.grammars import AnyGuide, Grammars
from minivllm.engine.pace import Pace
from minivllm.errors import (
    DeviceLost,
    GenerationFailed,
    InvalidRequest,
    MiniVLLMError,
    OutOfDeviceMemory,
    RequestError,
    RequestFault,
)
from minivllm.records import EngineOutput
from minivllm.scheduler.scheduler import Scheduler
from minivllm.types import REFUSED, EngineInfo, GenerateRequest, StepPlan, StepResult, TokenEvent

_NOT_TAKEN = "The engine failed at taking this request; its log says why."
_PREPARING_S = 0.01  # how long an engine without other work waits at a time for a grammar that is being made
_LONG_STEP_S = 1.0  # somebody should know of such a step before it begins
_MOST_IDLE_TURNS = 1000  # of an engine that has work, plans none and waits for nothing

log = logging.getLogger("minivllm")


class Pending(Protocol):
    """A launched step."""

    def sample(self, masks: npt.NDArray[np.int32] | None) -> None:
        """Run head and sampler; the masks of the plan's grammar rows arrive here, computed while the body ran."""
        ...

    def result(self) -> StepResult:
        """Wait for the step's tokens: the only wait of the loop."""
        ...


class Executor(Protocol):
    """Wherever the runners live."""

    def launch(self, plan: StepPlan) -> Pending:
        """Start a step; steps run in the order of launching."""
        ...

    def prepare_more(self) -> bool:
        """Nothing else is to be done: make later steps faster, a little at a time. False: nothing is left to make."""
        ...


class Engine:
    """Requests in, tokens out. Written by one thread: whoever calls ``step``."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        info: EngineInfo,
        clock: Callable[[], float],
        overlap: int = 0,
        grammars: Grammars | None = None,
    ) -> None:
        self.info = info
        self._grammars = grammars
        self._preparing: dict[str, tuple[GenerateRequest, Future[AnyGuide]]] = {}  # whose grammars are being made
        self._pause_later: set[str] = set()  # of these, those that are to be paused
        self._scheduler = scheduler
        self._executor = executor
        self._clock = clock
        self._overlap = overlap
        self._in_flight: deque[tuple[StepPlan, Pending]] = deque()
        self._awaits_masks = False  # the newest step in flight
        self._changed = False  # something happened that no step has reported
        self._pace = Pace(info.weights_bytes, info.device)
        self._announce: Callable[[tuple[str, ...], float], None] | None = None
        self._idle_turns = 0  # in a row without a step though there is work

    def watch(self, announce: Callable[[tuple[str, ...], float], None]) -> None:
        """Call this before the launch of a step that somebody should know of: with the requests that join the batch, and how
        long the step is expected to take, in seconds."""
        self._announce = announce

    @property
    def has_work(self) -> bool:
        """True while ``step`` has something to do."""
        return self._scheduler.has_work or self._changed or bool(self._preparing)

    def add(self, request: GenerateRequest) -> None:
        """Queue a request; raises ``RequestError`` for one that can never run, and nothing else. Of one that follows a grammar
        it may only turn out later that it cannot run; its last event says so."""
        try:
            self._add(request)
        except RequestError:
            raise
        except Exception as error:
            log.exception("request %s could not be taken", request.id)
            self.abort([request.id])  # if it got half-way
            raise GenerationFailed(_NOT_TAKEN) from error

    def _add(self, request: GenerateRequest) -> None:
        if (grammar := request.sampling.grammar) is None:
            self._scheduler.add(request)
            return
        if self._grammars is None:
            raise InvalidRequest("This engine follows no grammars; leave out what asks for structured output.", "grammar")
        if request.id in self._preparing:
            raise InvalidRequest("A request with this id is running already; use another id.", "request_id")
        sampling = request.sampling
        # Tokens that are certain are not sampled, unless somebody has a say in them or wants to know how likely they were.
        hurries = sampling.logprobs is None and sampling.allowed_token_ids is None and not sampling.bad_word_ids
        self._preparing[request.id] = (request, self._grammars.prepare(grammar, hurries=hurries))

    def abort(self, ids: Iterable[str]) -> None:
        """End requests; their blocks are free before the next step is planned."""
        ids = list(ids)
        for request_id in ids:
            self._preparing.pop(request_id, None)
            self._pause_later.discard(request_id)
        self._changed = bool(self._scheduler.abort(ids, self._clock())) or self._changed

    def pause(self, ids: Iterable[str]) -> None:
        """Requests whose reader does not read: their blocks are free before the next step is planned, their tokens are kept."""
        ids = list(ids)
        self._pause_later.update(self._preparing.keys() & set(ids))
        self._changed = bool(self._scheduler.pause(ids)) or self._changed

    def resume(self, ids: Iterable[str]) -> None:
        """Paused requests go on."""
        ids = list(ids)
        self._pause_later.difference_update(ids)
        self._changed = bool(self._scheduler.resume(ids, self._clock())) or self._changed

    def prepare_more(self) -> bool:
        """While there is no work: make later steps faster, for some milliseconds. False: nothing is left to make."""
        return self._executor.prepare_more()

    def step(self) -> EngineOutput | None:
        """Plan and launch a step; collect the oldest once more than ``overlap`` are in flight. None: nothing to say yet.

        A step that fails ends at most the one request whose fault it is. Raises ``DeviceLost``, and RuntimeError where nobody
        can go on: whoever runs the engine has to end it."""
        if self._preparing and (refused := self._admit_prepared()):
            return EngineOutput(tuple(refused))
        try:
            output = self._step()
        except DeviceLost:
            raise
        except Exception as error:
            output = self._after(error)
        self._check_progress(output)
        if output is None and self._changed and not self._in_flight:
            output = EngineOutput((), self._scheduler.snapshot(self._clock()))
        self._changed = self._changed and output is None
        return output

    def _check_progress(self, output: EngineOutput | None) -> None:
        """Raise RuntimeError when there is work of which nothing comes, turn after turn: a fault of the scheduler, which only
        beginning again can mend."""
        stuck = output is None and not self._in_flight and not self._preparing and self._scheduler.has_work
        self._idle_turns = self._idle_turns + 1 if stuck else 0
        if self._idle_turns > _MOST_IDLE_TURNS:
            raise RuntimeError(f"the scheduler has work but planned no step {_MOST_IDLE_TURNS} times in a row")

    def _after(self, error: Exception) -> EngineOutput:
        """A step failed: begin again without it."""
        out_of_memory = isinstance(error, OutOfDeviceMemory)
        if out_of_memory:
            log.warning("the device is out of memory; the step's requests start over, in smaller steps")
        else:
            log.error("a step failed; its requests start over", exc_info=error)
        self._in_flight.clear()
        self._awaits_masks = False
        culprit = error.uid if isinstance(error, RequestFault) else None
        return self._scheduler.fail(self._clock(), culprit, out_of_memory=out_of_memory)

    def _admit_prepared(self) -> list[TokenEvent]:
        """Queue the requests whose grammars are there now; the last events of those that turned out not to be served."""
        if not self._scheduler.has_work:
            wait([future for _, future in self._preparing.values()], _PREPARING_S, "FIRST_COMPLETED")
        refused = []
        for request_id, (request, future) in list(self._preparing.items()):
            if not future.done():
                break  # in their order, so that the texts of one prompt are queued behind its first
            del self._preparing[request_id]
            paused = request_id in self._pause_later
            self._pause_later.discard(request_id)
            try:
                self._scheduler.add(request, _follow(request, future.result()))
                if paused:
                    self.pause([request_id])
            except RequestError as error:
                refused.append(TokenEvent(request_id, (), "error", REFUSED, error=error.message))
            except MiniVLLMError as error:
                refused.append(TokenEvent(request_id, (), "error", error=f"No grammar can be followed: {error}"))
            except Exception:
                log.exception("request %s could not be taken with its grammar", request_id)
                self._scheduler.abort([request_id], self._clock())  # if it got half-way
                refused.append(TokenEvent(request_id, (), "error", error=_NOT_TAKEN))
        return refused

    def _step(self) -> EngineOutput | None:
        plan = self._scheduler.schedule(self._clock())
        if self._awaits_masks:  # after planning, which the device need not wait for: it may be at the step's body still
            self._awaits_masks = False
            self._sample_guided(*self._in_flight[-1])
        if plan is not None:
            self._tell(plan)
            pending = self._executor.launch(plan)
            self._in_flight.append((plan, pending))
            if not plan.grammar_rows:
                pending.sample(None)
            elif len(self._in_flight) == 1:
                self._sample_guided(plan, pending)
            else:
                self._awaits_masks = True
        if not self._in_flight or (plan is not None and len(self._in_flight) <= self._overlap):
            return None
        oldest, pending = self._in_flight.popleft()
        result = pending.result()
        self._pace.took(oldest.num_tokens, result.times.finished_s - result.times.launched_s)
        return self._scheduler.apply(oldest, result, self._clock())

    def _tell(self, plan: StepPlan) -> None:
        """Announce a step if somebody should know of it."""
        if self._announce is None:
            return
        expected_s = self._pace.expected_s(plan.num_tokens)
        if plan.new_rows or expected_s > _LONG_STEP_S:
            self._announce(self._scheduler.names(plan), expected_s)

    def _sample_guided(self, plan: StepPlan, pending: Pending) -> None:
        """Sample a step with grammar rows; the tokens of all steps before it are known."""
        if self._grammars is None:
            raise RuntimeError("a plan has grammar rows, but nobody follows grammars")
        ours = cast("list[tuple[AnyGuide, int] | None]", self._scheduler.guides(plan))  # the scheduler was given no others
        pending.sample(self._grammars.masks(plan.grammar_rows, ours))

    def check(self) -> None:
        """Raise RuntimeError when an invariant of the scheduler is broken."""
        self._scheduler.check()


def _follow(request: GenerateRequest, guide: AnyGuide) -> AnyGuide:
    """A guide that has seen what the request brings of its output. Raises ``InvalidRequest`` for one that does not fit."""
    if request.prior_output_ids:
        guide.tell(request.prior_output_ids)
        if guide.took()[1] != "more":
            raise InvalidRequest("The prior output does not fit the grammar, or ends it.", "grammar")
    return guide
