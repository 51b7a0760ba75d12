"""What steps did for the texts that had a row in them: how many, beside how many others, and the time between.

Nearly every row of nearly every step decodes, as it did in the step before. All of these share what happens: so there are sums
over all steps, and a text remembers those of the step when it began to decode. Only rows to which something else happens are
looked into.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping
from typing import Final

from minivllm.observe.course import NEVER, RUNNING, Course, StepSums
from minivllm.observe.explanation import MAX_BEHIND
from minivllm.records import RowRecord, StepRecord

_SAT_OUT: Final = "policy: the steps held other requests' work alone"


class Rows:
    """Written by ``Explanations``."""

    def __init__(self, admit: Callable[[Course, float], None]) -> None:
        """``admit`` is called when a text has a row that had none, with the time."""
        self._admit = admit
        self._sums = StepSums()
        self._peaks: list[tuple[int, int]] = []  # turn and others, falling: the most since a turn are in the first behind it
        self._streaks: dict[str, Course] = {}  # those that decode in every step
        self._before: tuple[str, ...] = ()  # who had a row in the newest step

    @property
    def turn(self) -> int:
        """Steps so far."""
        return self._sums.turn

    def take(self, record: StepRecord, live: Mapping[str, Course]) -> None:
        """The rows of a step."""
        before = self._sums
        turn, others = before.turn + 1, len(record.rows) - 1
        different: list[tuple[RowRecord, Course]] = []
        num_streaks = 0
        for row in record.rows:
            course = live.get(row.id)
            if course is None:
                continue
            if course.turn == before.turn:  # nearly every row of nearly every step
                course.turn = turn
                num_streaks += 1
            else:
                different.append((row, course))
        if num_streaks < len(self._streaks):
            for course in [c for c in self._streaks.values() if c.turn != turn]:
                self.part(course)
        between_s = before.between_s + max(0.0, record.scheduled_s - before.ended_s)
        self._sums = sums = StepSums(turn, before.others + others, between_s, record.collected_s)
        while self._peaks and self._peaks[-1][1] <= others:
            self._peaks.pop()
        self._peaks.append((turn, others))
        for row, course in different:
            if course.state not in RUNNING and (course.state == "paused" or record.scheduled_s < course.since_s):
                continue  # the step was in flight when it lost its row
            self._row(row, course, record.scheduled_s)
            course.last_turn, course.last_s = turn, record.collected_s
            course.steps += 1
            course.shared += others
            course.most = max(course.most, others)
            if course.state == "decode":
                course.turn, course.joined = turn, sums
                self._streaks[course.id] = course
        self._before = tuple([row.id for row in record.rows[:MAX_BEHIND]])

    def _row(self, row: RowRecord, course: Course, now_s: float) -> None:
        """A row whose text did not decode in the step before."""
        missed = self._sums.turn - 1 - course.last_turn
        if course.state not in RUNNING:
            self._admit(course, now_s)
        elif not missed:
            course.between_s += max(0.0, now_s - course.last_s)
        else:
            course.wait(_SAT_OUT, max(0.0, now_s - course.last_s), missed, self._before)
        if row.kind == "prefill":
            if course.cached is None:
                course.cached = min(row.cached, course.num_prompt)
            course.add_chunk(row.num_tokens)
        elif course.state == "prefill":
            course.close(course.last_s)
            course.state = "decode"

    def catch_up(self, course: Course) -> None:
        """Give a text that decodes in every step its share of the sums."""
        if course.turn == NEVER:
            return
        now, then = self._sums, course.joined
        if now.turn > then.turn:
            course.steps += now.turn - then.turn
            course.shared += now.others - then.others
            course.between_s += now.between_s - then.between_s
            course.most = max(course.most, self._peaks[bisect_left(self._peaks, (then.turn + 1, -1))][1])
        course.last_turn, course.last_s, course.joined = now.turn, now.ended_s, now

    def part(self, course: Course) -> None:
        """It does not decode in every step any more; the newest step that was summed up was its last."""
        if course.turn != NEVER:
            self.catch_up(course)
            course.turn = NEVER
            del self._streaks[course.id]

    def restart(self) -> None:
        """Whoever has a row from now on was in none of the steps before."""
        self._before = ()
