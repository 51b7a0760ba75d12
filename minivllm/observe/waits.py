"""Why requests wait, and for how long: the reasons that records give, added up for each of those who wait.

A reason holds from the planning of the step that gives it to the planning of the next. A record names few of those who wait;
the others, who may be thousands, share one reason (``StepRecord.rest_waits``). For these there is one sum for each reason, and
who begins to wait with them remembers the sums of that moment: so a step costs the same however many wait.
"""

from collections.abc import Iterator, Mapping
from typing import Final

from minivllm.observe.course import QUEUED, Course, Sums
from minivllm.observe.explanation import MAX_BEHIND
from minivllm.records import StepRecord

_NOT_TAKEN: Final = "engine: it had not taken the request in yet (a step was running, or its grammar was being made)"

_UNSAID: Final = "order: the step was planned before it waited"  # its row was taken away in the same planning


class Waits:
    """Written by ``Explanations``."""

    def __init__(self) -> None:
        self._fresh: list[Course] = []  # in the queue, but no step was planned with a look at them yet
        self._named: list[Course] = []  # those with a reason of their own in the newest step
        self._rest: Sums = {}  # of the others
        self._now = (_UNSAID, 0.0)  # their reason, and since when
        self._ahead: tuple[str, ...] = ()  # who is ahead of them in the newest step
        self._was_ahead: tuple[str, ...] = ()  # and in the one before

    def begin(self, course: Course) -> None:
        """It waits from now on."""
        course.named = course.rest = None
        self._fresh.append(course)

    def begin_with(self, course: Course) -> None:
        """It waits for the reason that the newest step gives to those whom it does not name."""
        course.named, course.rest = None, (dict(self._rest), self._ahead)

    def restart(self, now_s: float) -> None:
        """Nothing that was said holds any more."""
        self._named, self._now = [], (_UNSAID, now_s)

    def decide(self, record: StepRecord, live: Mapping[str, Course]) -> None:
        """A step was planned: whoever waited has waited until now, and waits on for the reasons that the record gives."""
        now_s = record.scheduled_s
        text, since_s = self._now
        seconds, steps = self._rest.get(text, (0.0, 0))
        self._rest[text] = (seconds + max(0.0, now_s - since_s), steps + 1)
        self._now = (record.rest_waits or _UNSAID, now_s)
        rows = tuple([row.id for row in record.rows[:MAX_BEHIND]]) if record.num_waiting or record.waits else ()
        self._was_ahead, self._ahead = self._ahead, record.rest_behind[:MAX_BEHIND] or rows
        named, self._named = self._named, []
        for course in named:
            if course.named is not None:
                self._put_down(course, now_s, ())
                self.begin_with(course)
        if self._fresh:
            self._fresh = [course for course in self._fresh if self._stays_fresh(course, now_s)]
        for wait in record.waits:
            waiting = live.get(wait.id)
            if waiting is not None and waiting.state in QUEUED:
                self._put_down(waiting, now_s, self._was_ahead)
                waiting.named = (wait.reason, max(now_s, waiting.since_s), wait.behind or rows)
                self._named.append(waiting)

    def _stays_fresh(self, course: Course, now_s: float) -> bool:
        """Whether a step that was planned now was planned without a look at it: it came later, or is not there."""
        if course.ended_s is not None or course.rest is not None or course.state not in QUEUED:
            return False
        if not course.arrived or course.since_s > now_s:
            return True
        course.wait(_NOT_TAKEN, now_s - course.since_s, 0)
        self.begin_with(course)
        return False

    def admitted(self, course: Course, now_s: float) -> None:
        """It waits no more, since the newest step has a row for it."""
        self._put_down(course, now_s, self._was_ahead)

    def over(self, course: Course, now_s: float) -> None:
        """It waits no more, for another reason."""
        if course.rest is not None:
            course.wait(self._now[0], max(0.0, now_s - self._now[1]), 1, self._ahead)
        self._put_down(course, now_s, self._ahead)

    def _put_down(self, course: Course, now_s: float, ahead: tuple[str, ...]) -> None:
        """Put down what it waited for, up to now; ``ahead``: who was in its way at last, if it was not named."""
        if course.named is not None:
            text, since_s, behind = course.named
            course.wait(text, max(0.0, now_s - since_s), 1, behind)
            course.named = None
        if course.rest is not None:
            sums, was_ahead = course.rest
            for text, seconds, steps in self._since(sums):
                course.wait(text, seconds, steps, (*was_ahead, *ahead))
            course.rest = None

    def _since(self, then: Sums) -> Iterator[tuple[str, float, int]]:
        """What those who are not named have waited for since the sums were ``then``."""
        for text, (seconds, steps) in self._rest.items():
            had_s, had = then.get(text, (0.0, 0))
            if steps > had:
                yield text, seconds - had_s, steps - had

    def going_on(self, course: Course, now_s: float) -> Iterator[tuple[str, float, int, tuple[str, ...]]]:
        """What it waits for and is not put down yet: reason, seconds, steps, behind whom."""
        if course.named is not None:
            text, since_s, behind = course.named
            yield text, max(0.0, now_s - since_s), 1, behind
        if course.rest is not None:
            sums, was_ahead = course.rest
            for text, seconds, steps in self._since(sums):
                yield text, seconds, steps, (*was_ahead, *self._ahead)
            yield self._now[0], max(0.0, now_s - self._now[1]), 1, self._ahead
