"""The loop: plan a step, launch it, take the oldest result.

This is the only file that sees both halves. The scheduler plans without knowing tensors, the executor computes without knowing
requests; here they meet in a ``StepPlan`` one way and a ``StepResult`` the other. With ``overlap`` 0 a step's tokens are known
before the next is planned. With 1 the next step is planned and launched first, because the sampled tokens it needs are on the
device already: the device never waits for this loop. Same lines, another depth.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

from minivllm.errors import OutOfDeviceMemory
from minivllm.scheduler.scheduler import Scheduler
from minivllm.types import EngineInfo, EngineOutput, GenerateRequest, StepPlan, StepResult

log = logging.getLogger("minivllm")


class Pending(Protocol):
    """A launched step."""

    def sample(self, masks: None) -> None:
        """Run head and sampler; grammar masks arrive here, computed while the body ran."""
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
        self, scheduler: Scheduler, executor: Executor, info: EngineInfo, clock: Callable[[], float], overlap: int = 0
    ) -> None:
        self.info = info
        self._scheduler = scheduler
        self._executor = executor
        self._clock = clock
        self._overlap = overlap
        self._in_flight: deque[tuple[StepPlan, Pending]] = deque()
        self._changed = False  # something happened that no step has reported

    @property
    def has_work(self) -> bool:
        """True while ``step`` has something to do."""
        return self._scheduler.has_work or self._changed

    def add(self, request: GenerateRequest) -> None:
        """Queue a request; raises ``RequestError`` for one that can never run."""
        self._scheduler.add(request)

    def abort(self, ids: Iterable[str]) -> None:
        """End requests; their blocks are free before the next step is planned."""
        self._changed = bool(self._scheduler.abort(ids, self._clock())) or self._changed

    def prepare_more(self) -> bool:
        """While there is no work: make later steps faster, for some milliseconds. False: nothing is left to make."""
        return self._executor.prepare_more()

    def step(self) -> EngineOutput | None:
        """Plan and launch a step; collect the oldest once more than ``overlap`` are in flight. None: nothing to say yet."""
        try:
            output = self._step()
        except Exception as error:
            out_of_memory = isinstance(error, OutOfDeviceMemory)
            if out_of_memory:
                log.warning("the device is out of memory; the step's requests start over, in smaller steps")
            else:
                log.exception("a step failed; its requests start over")
            self._in_flight.clear()
            message = "The engine could not compute this request; try it again."
            output = self._scheduler.fail(message, self._clock(), out_of_memory)
        if output is None and self._changed and not self._in_flight:
            output = EngineOutput((), self._scheduler.snapshot(self._clock()))
        self._changed = self._changed and output is None
        return output

    def _step(self) -> EngineOutput | None:
        plan = self._scheduler.schedule(self._clock())
        if plan is not None:
            pending = self._executor.launch(plan)
            pending.sample(None)
            self._in_flight.append((plan, pending))
        if not self._in_flight or (plan is not None and len(self._in_flight) <= self._overlap):
            return None
        oldest, pending = self._in_flight.popleft()
        return self._scheduler.apply(oldest, pending.result(), self._clock())

    def check(self) -> None:
        """Raise RuntimeError when an invariant of the scheduler is broken."""
        self._scheduler.check()
