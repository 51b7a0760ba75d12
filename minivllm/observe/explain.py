"""From StepRecords to explanations: why each request took as long as it did.

``Explanations.observe`` takes one record after the other and moves each text that it names along its states: queue, prefill,
decode, preempted, paused. A state ends, and the next begins, with a stamp of the record in which that happened. What a face
knows besides (when it had the request, when its answer was out) lies in the request's ``Trail``. What is told in the end says
``explanation.py``; what steps and waiting cost is in ``rows.py`` and ``waits.py``.

A step costs a look at each of its rows and some work for those to which something happens. Kept are the requests that run and
those that ended last, up to ``capacity`` texts of them.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from minivllm.observe.course import MAX_LOSSES, NEVER, RUNNING, Course, Loss, Request
from minivllm.observe.explanation import Explanation
from minivllm.observe.rows import Rows
from minivllm.observe.telling import masked, phases_of, tell, tell_all
from minivllm.observe.trail import Trail
from minivllm.observe.waits import Waits
from minivllm.records import ArrivalRecord, PreemptionRecord, StepRecord
from minivllm.types import GenerateRequest

CAPACITY: Final = 1024
log = logging.getLogger("minivllm")


class Explanations:
    """Written by whoever reads the engine's outputs, in one thread; asked in the same one.

    With ``opened_only``, requests that no face has opened are passed over: a server's probes, the beams of a search.
    """

    def __init__(self, model: str, *, opened_only: bool = False, capacity: int = CAPACITY) -> None:
        self.on_delivered: Callable[[Explanation, Trail], None] | None = None  # told of each whose answer is out
        self._model = model
        self._opened_only = opened_only
        self._capacity = capacity
        self._requests: dict[str, Request] = {}  # by the id that the client saw
        self._of_text: dict[str, Request] = {}  # by the ids of its texts
        self._live: dict[str, Course] = {}  # texts that have not ended
        self._ended: OrderedDict[str, Request] = OrderedDict()  # whose every text has, the oldest first
        self._num_ended = 0  # texts of these
        self._waits = Waits()
        self._rows = Rows(self._admit)
        self._last_s = 0.0  # the newest record's stamp

    # -------------------------------------------------------------------------------------------------- what a face tells

    def open(self, request_id: str, wanted: Sequence[GenerateRequest], trail: Trail) -> None:
        """A face hands these texts of one request to the engine."""
        request = Request(request_id, trail)
        if self.on_delivered is not None:
            trail.on_delivered = partial(self._deliver, request)
        for one in wanted:
            self._begin(request, Course(one.id, one.arrival_s, len(one.prompt_ids), one.fork_of, request))

    def _deliver(self, request: Request) -> None:
        """A request's answer is out."""
        done_s = request.trail.delivered_s
        if self.on_delivered is not None and done_s is not None:
            try:
                self.on_delivered(self._tell(request, done_s), request.trail)
            except Exception:
                log.exception("nobody was told of request %s", request.id)

    def end(self, text_id: str, reason: str, num_output: int | None, now_s: float) -> None:
        """A text has ended in the eyes of its face: the engine ended it, a stop string came, or its client went away."""
        course = self._live.get(text_id)
        if course is not None:
            self._rows.part(course)
            at_s = course.last_s if course.state in RUNNING else now_s
            self._end(course, reason, num_output, max(at_s, course.since_s))
        elif num_output is not None and (request := self._of_text.get(text_id)) is not None:
            for known in request.courses:
                if known.id == text_id:  # the engine saw more tokens of it than the text has
                    known.reason, known.num_output = reason, num_output

    def restarted(self, died_s: float, ready_s: float) -> None:
        """The engine was dead meanwhile, and everything that it had was given to another."""
        for course in self._live.values():
            if course.since_s < ready_s:
                self._leave(course, died_s)
                course.state, course.arrived = "restart", False
                course.close(ready_s)
                self._enqueue(course, "queue", ready_s)
        self._waits.restart(ready_s)
        self._rows.restart()

    # ------------------------------------------------------------------------------------------------- what records tell

    def observe(self, record: StepRecord) -> None:
        """Take the next record."""
        if record.life and not self._opened_only:
            self.restarted(self._last_s, record.scheduled_s)
        for arrival in record.arrived:
            self._arrive(arrival)
        if record.paused or record.resumed:
            self._pause(record, before=True)
        if record.step >= 0:
            self._waits.decide(record, self._live)
            self._rows.take(record, self._live)
        for preemption in record.preempted:
            if (course := self._live.get(preemption.id)) is not None:
                self._preempt(course, preemption, record)
        if record.paused or record.resumed:
            self._pause(record, before=False)
        for finished in record.finished:
            if (course := self._live.get(finished.id)) is not None:
                self._end(course, finished.reason, finished.num_output, max(finished.finished_s, course.since_s))
        self._last_s = max(self._last_s, record.collected_s)

    def _begin(self, request: Request, course: Course) -> None:
        request.courses.append(course)
        request.num_open += 1
        if (before := self._of_text.get(course.id)) is not None and before is not request:
            self._forget(before)  # an id that is used again
        self._requests[request.id] = self._of_text[course.id] = request
        self._live[course.id] = course
        self._waits.begin(course)

    def _arrive(self, arrival: ArrivalRecord) -> None:
        course = self._live.get(arrival.id)
        if course is None:
            if self._opened_only:
                return
            parent = self._live.get(arrival.parent or "")
            request = _unopened(arrival) if parent is None else parent.request
            course = Course(arrival.id, arrival.arrival_s, arrival.num_prompt, arrival.parent, request)
            self._begin(request, course)
        course.arrived = True

    def _admit(self, course: Course, now_s: float) -> None:
        """It takes a row."""
        self._waits.admitted(course, now_s)
        course.close(now_s)
        if course.losses and course.losses[-1].until_s is None:
            course.losses[-1].until_s = now_s
        course.state = "prefill"

    def _preempt(self, course: Course, preemption: PreemptionRecord, record: StepRecord) -> None:
        """It lost its row when the step was planned; or when its result came, if it was in it."""
        self._rows.part(course)
        if course.state not in RUNNING:
            return
        late = record.step < 0 or course.last_turn == self._rows.turn
        at_s = max(record.collected_s if late else record.scheduled_s, course.last_s)
        if len(course.losses) < MAX_LOSSES:
            course.losses.append(Loss(at_s, preemption.reason, preemption.by, preemption.num_computed))
        self._leave(course, at_s)
        self._enqueue(course, "preempted", at_s)
        if at_s <= record.scheduled_s:
            self._waits.begin_with(course)  # for the reason that this very step gives

    def _pause(self, record: StepRecord, *, before: bool) -> None:
        """Nobody reads what some say, or reads it again: ``before`` the step was planned, but for those who were in it when
        they were paused."""
        rows = {row.id for row in record.rows}.difference(record.resumed)
        for name in record.paused:
            if (course := self._live.get(name)) is not None and (name not in rows) == before:
                self._leave(course, record.scheduled_s if before else record.collected_s)
                self._enqueue(course, "paused", course.since_s)
        for name in record.resumed if before else ():
            if (course := self._live.get(name)) is not None:
                self._leave(course, record.scheduled_s)
                self._enqueue(course, "queue", record.scheduled_s)

    def _leave(self, course: Course, at_s: float) -> None:
        """What it was at ends, and if it had a row, that is gone."""
        self._rows.part(course)
        at_s = max(at_s, course.last_s)
        self._waits.over(course, at_s)
        course.close(at_s)
        course.last_turn = NEVER

    def _enqueue(self, course: Course, state: str, at_s: float) -> None:
        course.state = state
        course.since_s = max(course.since_s, at_s)
        if state != "paused":
            self._waits.begin(course)

    def _end(self, course: Course, reason: str, num_output: int | None, at_s: float) -> None:
        self._leave(course, at_s)
        course.num_output = course.output_tokens if num_output is None else num_output
        course.reason, course.ended_s = reason, at_s
        del self._live[course.id]
        request = course.request
        request.num_open -= 1
        if not request.num_open:
            if not request.has_face:
                request.trail.delivered_s = at_s
            self._ended[request.id] = request
            self._num_ended += len(request.courses)
            while self._num_ended > self._capacity and len(self._ended) > 1:
                self._forget(next(iter(self._ended.values())))

    def _forget(self, request: Request) -> None:
        """A request is too long ago."""
        if self._ended.pop(request.id, None) is not None:
            self._num_ended -= len(request.courses)
        if self._requests.get(request.id) is request:
            del self._requests[request.id]
        for course in request.courses:
            if self._of_text.get(course.id) is request:
                del self._of_text[course.id]

    # ------------------------------------------------------------------------------------------------- what may be asked

    @property
    def ids(self) -> list[str]:
        """The requests that are known, in the order of their arrival."""
        return list(self._requests)

    def explain(self, name: str, now_s: float, tenant: str | None = None) -> Explanation | None:
        """The explanation of a request, by its id or by that of one of its texts. None: it is not known, or it is not the
        ``tenant``'s who asks; a tenant with a name is not told who else there is."""
        request = self._requests.get(name) or self._of_text.get(name)
        if request is None or (tenant is not None and request.trail.tenant != tenant):
            return None
        if name != request.id and len(request.courses) > 1:
            (course,) = [course for course in request.courses if course.id == name]
            self._rows.catch_up(course)
            told = tell(self._model, course, now_s, self._waits, delivers=False)
        else:
            told = self._tell(request, now_s)
        return masked(told, self._is_own(tenant)) if tenant else told

    def _tell(self, request: Request, now_s: float) -> Explanation:
        for course in request.courses:
            self._rows.catch_up(course)
        return tell_all(self._model, request, now_s, self._waits)

    def _is_own(self, tenant: str) -> Callable[[str], bool]:
        def own(name: str) -> bool:
            request = self._of_text.get(name)
            return request is not None and request.trail.tenant == tenant

        return own

    def spans(self, text_id: str, now_s: float) -> list[tuple[str, float, float]]:
        """The phases of one text, on time.monotonic(), in their order."""
        request = self._of_text.get(text_id)
        found = [course for course in request.courses if course.id == text_id] if request is not None else []
        return phases_of(found[0], now_s) if found else []


def _unopened(arrival: ArrivalRecord) -> Request:
    """A request of which only records tell."""
    received_s = arrival.arrival_s if arrival.received_s is None else arrival.received_s
    trail = Trail(received_s, arrival.tenant)
    if received_s < arrival.arrival_s:
        trail.received(arrival.arrival_s)
    return Request(arrival.id, trail, has_face=False)
