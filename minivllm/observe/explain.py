"""From StepRecords to explanations: why each request took as long as it did.

``Explanations.observe`` takes one record after the other and moves each request that it names along its states: queue,
prefill, decode, preempted, paused. A state ends, and the next begins, with a stamp of the record in which that happened. What a
face knows besides (when it had the request, when its answer was out) lies in the request's ``Trail``. ``explanation.py`` says
what comes of it.

A step costs a look at each of its rows and some work for those to which something happens. What happens to many at once is
summed up once, and each remembers the sums of the moment when it joined in; the difference is its own, whenever somebody asks.
So it is with those that decode in every step, and with those that wait and are not named, all for the same reason
(``StepRecord.rest_waits``).

Kept are the requests that run and the last texts that ended, ``capacity`` of them.
"""

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from minivllm.observe.explanation import (
    MAX_BEHIND,
    MAX_CHUNKS,
    Explanation,
    Phase,
    Preempted,
    Sharing,
    Waiting,
    uncovered_s,
)
from minivllm.observe.trail import Trail
from minivllm.records import ArrivalRecord, PreemptionRecord, RowRecord, StepRecord
from minivllm.types import GenerateRequest

CAPACITY = 1024
_MAX_WAITS = 32  # different reasons of one request
_MAX_LOSSES = 64  # preemptions and restarts of one request that are told in full
_NOT_TAKEN = "engine: it had not taken the request in yet (a step was running, or its grammar was being made)"
_BETWEEN = "engine: between steps it told results, took in requests and planned"
_SAT_OUT = "policy: the steps held other requests' work alone"
_PREFILL, _DECODE = "prefill", "decode"
_RUNNING = (_PREFILL, _DECODE)
_QUEUED = ("queue", "preempted")
_NEVER = -1
_Sums = dict[str, tuple[float, int]]  # seconds and steps for each reason


class _Wait:
    """One reason. Written by its sequence."""

    __slots__ = ("behind", "seconds", "steps")

    def __init__(self) -> None:
        self.seconds = 0.0
        self.steps = 0
        self.behind: dict[str, None] = {}


class _Steps(NamedTuple):
    """Sums over all steps so far."""

    turn: int = 0  # their number
    others: int = 0  # rows but one
    between_s: float = 0.0  # from one's end to the planning of the next
    ended_s: float = 0.0  # when the result of the last was in


@dataclass(slots=True)
class _Loss:
    """A preemption. Written by ``Explanations``."""

    at_s: float
    reason: str
    by: str | None
    tokens: int
    until_s: float | None = None  # when it had a row again


class _Sequence:
    """One text on its way through the engine. Written by ``Explanations``."""

    __slots__ = (
        "arrival_s", "arrived", "between_s", "cached", "chunks", "ended_s", "id", "joined", "last_s", "last_turn", "losses",
        "most", "named", "num_output", "num_prompt", "parent", "phases", "reason", "request", "rest", "shared", "since_s",
        "state", "steps", "turn", "waits",
    )  # fmt: skip

    def __init__(self, name: str, arrival_s: float, num_prompt: int, parent: str | None, request: "_Request") -> None:
        self.id = name
        self.arrival_s = arrival_s
        self.num_prompt = num_prompt
        self.parent = parent
        self.request = request
        self.state = "queue"
        self.since_s = arrival_s
        self.arrived = False  # the scheduler knows it
        self.phases: list[tuple[str, float, float]] = []
        self.waits: dict[str, _Wait] = {}
        self.named: tuple[str, float, tuple[str, ...]] | None = None  # the reason of its own, since when, behind whom
        self.rest: tuple[_Sums, tuple[str, ...]] | None = None  # the sums when it began to wait unnamed, and who was ahead
        self.cached: int | None = None
        self.chunks: list[int] = []
        self.steps = self.shared = self.most = 0
        self.last_turn = _NEVER  # its last step, unless it decodes in every one
        self.last_s = arrival_s  # when the result of that was in
        self.turn = _NEVER  # the newest step, if it decodes in every one
        self.joined = _Steps()  # the sums when it began to
        self.between_s = 0.0
        self.losses: list[_Loss] = []
        self.num_output: int | None = None
        self.reason: str | None = None
        self.ended_s: float | None = None

    def close(self, at_s: float) -> None:
        """The state ends now; states that took no time leave no trace."""
        if at_s > self.since_s:
            self.phases.append((self.state, self.since_s, at_s))
        self.since_s = max(at_s, self.since_s)

    def wait(self, text: str, seconds: float, steps: int, behind: Sequence[str] = ()) -> None:
        """It has waited for a reason."""
        found = self.waits.get(text)
        if found is None:
            if len(self.waits) == _MAX_WAITS:
                return
            found = self.waits[text] = _Wait()
        found.seconds += seconds
        found.steps += steps
        for name in behind:
            if len(found.behind) < MAX_BEHIND and name != self.id:
                found.behind[name] = None


class _Request:
    """What one caller asked for: one text or several. Written by ``Explanations``."""

    __slots__ = ("id", "num_open", "sequences", "tenant", "trail")

    def __init__(self, name: str, trail: Trail | None, tenant: str) -> None:
        self.id = name
        self.trail = trail
        self.tenant = tenant
        self.sequences: list[_Sequence] = []
        self.num_open = 0


class Explanations:
    """Written by whoever reads the engine's outputs, in one thread; asked in the same one.

    With ``opened_only``, requests that no face has opened are passed over: a server's probes, the beams of a search.
    """

    def __init__(self, model: str, *, opened_only: bool = False, capacity: int = CAPACITY) -> None:
        self._model = model
        self._opened_only = opened_only
        self._capacity = capacity
        self._requests: dict[str, _Request] = {}  # by the id that the client saw
        self._live: dict[str, _Sequence] = {}  # that have not ended
        self._of_sequence: dict[str, _Request] = {}
        self._ended: OrderedDict[str, _Request] = OrderedDict()  # whose every text has, the oldest first
        self._num_ended = 0  # texts of these
        self._fresh: list[_Sequence] = []  # in the queue, but no step has been planned since
        self._named: list[_Sequence] = []  # those with a reason of their own in the step before
        self._rest: _Sums = {}  # of those that are not named
        self._rest_now = ("", 0.0)  # their reason, and since when
        self._ahead: tuple[str, ...] = ()  # of them, in the newest step
        self._was_ahead: tuple[str, ...] = ()  # in the one before
        self._before: tuple[str, ...] = ()  # who had a row in the step before the newest
        self._steps = _Steps()
        self._peaks: list[tuple[int, int]] = []  # turn and others, falling: what is largest since a turn is the first behind it
        self._streaks: dict[str, _Sequence] = {}  # those that decode in every step
        self._last_s = 0.0  # the newest record's stamp

    # -------------------------------------------------------------------------------------------------- what a face tells

    def open(self, request_id: str, wanted: Sequence[GenerateRequest], trail: Trail) -> None:
        """A face hands these sequences of one request to the engine."""
        request = _Request(request_id, trail, trail.tenant)
        for one in wanted:
            self._begin(request, one.id, one.arrival_s, len(one.prompt_ids), one.fork_of)

    def end(self, sequence_id: str, reason: str, num_output: int | None, now_s: float) -> None:
        """A text has ended in the eyes of its face: the engine ended it, a stop string came, or its client went away."""
        sequence = self._live.get(sequence_id)
        if sequence is not None:
            self._part(sequence)
            at_s = sequence.last_s if sequence.state in _RUNNING else now_s
            self._end(sequence, reason, num_output, max(at_s, sequence.since_s))
        elif num_output is not None and (request := self._of_sequence.get(sequence_id)) is not None:
            for known in request.sequences:
                if known.id == sequence_id:  # the engine saw more tokens of it than the text has
                    known.reason, known.num_output = reason, num_output

    def restarted(self, died_s: float, ready_s: float) -> None:
        """The engine was dead meanwhile, and everything that it had was given to another."""
        for sequence in self._live.values():
            if sequence.since_s < ready_s:
                self._settle(sequence, died_s, self._ahead)
                self._leave(sequence, died_s)
                sequence.state, sequence.arrived = "restart", False
                sequence.close(ready_s)
                self._enqueue(sequence, "queue", ready_s)
        self._named, self._before, self._rest_now = [], (), ("", ready_s)

    # ------------------------------------------------------------------------------------------------- what records tell

    def observe(self, record: StepRecord) -> None:
        """Take the next record."""
        if record.life and not self._opened_only:
            self.restarted(self._last_s, record.scheduled_s)
        for arrival in record.arrived:
            self._arrive(arrival)
        if record.step >= 0:
            self._decide(record)
            self._run(record)
        for preemption in record.preempted:
            self._preempt(preemption, record)
        for name in record.paused:
            self._set_state(name, "paused", record)
        for name in record.resumed:
            self._set_state(name, "queue", record)
        for finished in record.finished:
            sequence = self._live.get(finished.id)
            if sequence is not None:
                self._end(sequence, finished.reason, finished.num_output, max(finished.finished_s, sequence.since_s))
        self._last_s = max(self._last_s, record.collected_s)

    def _begin(self, request: _Request, name: str, arrival_s: float, num_prompt: int, parent: str | None) -> _Sequence:
        sequence = _Sequence(name, arrival_s, num_prompt, parent, request)
        request.sequences.append(sequence)
        request.num_open += 1
        if (before := self._of_sequence.get(name)) is not None and before is not request:
            self._forget(before)  # an id that is used again
        self._requests[request.id] = self._of_sequence[name] = request
        self._live[name] = sequence
        self._fresh.append(sequence)
        return sequence

    def _arrive(self, arrival: ArrivalRecord) -> None:
        sequence = self._live.get(arrival.id)
        if sequence is None:
            if self._opened_only:
                return
            parent = self._live.get(arrival.parent or "")
            received_s = arrival.arrival_s if arrival.received_s is None else arrival.received_s
            request = parent.request if parent is not None else _Request(arrival.id, Trail(received_s), arrival.tenant)
            sequence = self._begin(request, arrival.id, arrival.arrival_s, arrival.num_prompt, arrival.parent)
        sequence.arrived = True

    def _decide(self, record: StepRecord) -> None:
        """A step was planned: whoever waited has waited until now, and waits on for the reasons that the record gives."""
        now_s = record.scheduled_s
        text, since_s = self._rest_now
        if text:
            seconds, steps = self._rest.get(text, (0.0, 0))
            self._rest[text] = (seconds + max(0.0, now_s - since_s), steps + 1)
        self._rest_now = (record.rest_waits, now_s)
        self._was_ahead = self._ahead
        rows = tuple([row.id for row in record.rows[:MAX_BEHIND]]) if record.num_waiting or record.waits else ()
        self._ahead = record.rest_behind[:MAX_BEHIND] or rows
        named, self._named = self._named, []
        for sequence in named:
            if sequence.named is not None:
                self._settle(sequence, now_s, ())
                sequence.rest = (dict(self._rest), self._ahead)
        if self._fresh:
            self._fresh = [sequence for sequence in self._fresh if self._stays_fresh(sequence, now_s)]
        for wait in record.waits:
            waiting = self._live.get(wait.id)
            if waiting is not None and waiting.state in _QUEUED:
                self._settle(waiting, now_s, self._was_ahead)
                waiting.named = (wait.reason, max(now_s, waiting.since_s), wait.behind or rows)
                self._named.append(waiting)

    def _stays_fresh(self, sequence: _Sequence, now_s: float) -> bool:
        """Whether a step that was planned now was planned without a look at it: it came later, or is not there."""
        if sequence.ended_s is not None or sequence.rest is not None or sequence.state not in _QUEUED:
            return False
        if not sequence.arrived or sequence.since_s > now_s:
            return True
        sequence.wait(_NOT_TAKEN, now_s - sequence.since_s, 0)
        sequence.rest = (dict(self._rest), self._ahead)
        return False

    def _settle(self, sequence: _Sequence, now_s: float, ahead: tuple[str, ...]) -> None:
        """Put down what a waiting sequence waited for, up to now; ``ahead``: who was, of those that are not named."""
        if sequence.named is not None:
            text, since_s, behind = sequence.named
            sequence.wait(text, max(0.0, now_s - since_s), 1, behind)
            sequence.named = None
        if sequence.rest is not None:
            sums, was_ahead = sequence.rest
            for text, seconds, steps in self._rest_since(sums):
                sequence.wait(text, seconds, steps, (*was_ahead, *ahead))
            sequence.rest = None

    def _rest_since(self, then: dict[str, tuple[float, int]]) -> list[tuple[str, float, int]]:
        """What those who are not named have waited for since the sums were ``then``."""
        found = []
        for text, (seconds, steps) in self._rest.items():
            had_s, had = then.get(text, (0.0, 0))
            if steps > had:
                found.append((text, seconds - had_s, steps - had))
        return found

    def _run(self, record: StepRecord) -> None:
        """The rows of a step."""
        live, before = self._live, self._steps
        turn, others = before.turn + 1, len(record.rows) - 1
        different: list[tuple[RowRecord, _Sequence]] = []
        num_streaks = 0
        for row in record.rows:
            sequence = live.get(row.id)
            if sequence is None:
                continue
            if sequence.turn == before.turn:  # nearly every row of nearly every step
                sequence.turn = turn
                num_streaks += 1
            else:
                different.append((row, sequence))
        if num_streaks < len(self._streaks):
            for sequence in [s for s in self._streaks.values() if s.turn != turn]:
                self._part(sequence)
        between_s = before.between_s + max(0.0, record.scheduled_s - before.ended_s)
        self._steps = steps = _Steps(turn, before.others + others, between_s, record.collected_s)
        while self._peaks and self._peaks[-1][1] <= others:
            self._peaks.pop()
        self._peaks.append((turn, others))
        for row, sequence in different:
            if sequence.state not in _RUNNING and (sequence.state == "paused" or record.scheduled_s < sequence.since_s):
                continue  # the step was in flight when it lost its row
            self._row(row, sequence, record)
            sequence.last_turn, sequence.last_s = turn, record.collected_s
            sequence.steps += 1
            sequence.shared += others
            sequence.most = max(sequence.most, others)
            if sequence.state == _DECODE:
                sequence.turn, sequence.joined = turn, steps
                self._streaks[sequence.id] = sequence
        self._before = tuple([row.id for row in record.rows[:MAX_BEHIND]])

    def _row(self, row: RowRecord, sequence: _Sequence, record: StepRecord) -> None:
        """A row whose sequence did not decode in the step before."""
        now_s, missed = record.scheduled_s, self._steps.turn - 1 - sequence.last_turn
        if sequence.state not in _RUNNING:
            self._admit(sequence, now_s)
        elif not missed:
            sequence.between_s += max(0.0, now_s - sequence.last_s)
        else:
            sequence.wait(_SAT_OUT, max(0.0, now_s - sequence.last_s), missed, self._before)
        if row.kind == _PREFILL:
            if sequence.cached is None:
                sequence.cached = min(row.cached, sequence.num_prompt)
            _add_chunk(sequence.chunks, row.num_tokens)
        elif sequence.state == _PREFILL:
            sequence.close(max(sequence.last_s, sequence.since_s))
            sequence.state = _DECODE

    def _catch_up(self, sequence: _Sequence) -> None:
        """Give a sequence that decodes in every step its share of the sums."""
        if sequence.turn != _NEVER:
            now, then = self._steps, sequence.joined
            if now.turn > then.turn:
                sequence.steps += now.turn - then.turn
                sequence.shared += now.others - then.others
                sequence.between_s += now.between_s - then.between_s
                peak = self._peaks[bisect_left(self._peaks, (then.turn + 1, -1))][1]
                sequence.most = max(sequence.most, peak)
            sequence.last_turn, sequence.last_s, sequence.joined = now.turn, now.ended_s, now

    def _part(self, sequence: _Sequence) -> None:
        """It does not decode in every step any more; the newest step that was summed up was its last."""
        if sequence.turn != _NEVER:
            self._catch_up(sequence)
            sequence.turn = _NEVER
            del self._streaks[sequence.id]

    def _admit(self, sequence: _Sequence, now_s: float) -> None:
        """It takes a row."""
        self._settle(sequence, now_s, self._was_ahead)
        sequence.close(now_s)
        if sequence.losses and sequence.losses[-1].until_s is None:
            sequence.losses[-1].until_s = now_s
        sequence.state = _PREFILL

    def _preempt(self, preemption: PreemptionRecord, record: StepRecord) -> None:
        """It lost its row when the step was planned; or when its result came, if it was in it."""
        sequence = self._live.get(preemption.id)
        if sequence is None:
            return
        self._part(sequence)
        was_in = record.step >= 0 and sequence.last_turn == self._steps.turn
        at_s = max(record.collected_s if was_in or record.step < 0 else record.scheduled_s, sequence.last_s)
        if sequence.state in _RUNNING:
            if len(sequence.losses) < _MAX_LOSSES:
                sequence.losses.append(_Loss(at_s, preemption.reason, preemption.by, preemption.num_computed))
            self._leave(sequence, at_s)
            self._enqueue(sequence, "preempted", at_s)
            if at_s <= record.scheduled_s:  # it waits for the reason that this very step gives
                sequence.rest = (dict(self._rest), self._ahead)

    def _leave(self, sequence: _Sequence, at_s: float) -> None:
        """Its row is gone: what it was at ends."""
        self._part(sequence)
        sequence.close(at_s)
        sequence.last_turn = _NEVER

    def _set_state(self, name: str, state: str, record: StepRecord) -> None:
        """The engine let go of a sequence for its reader's sake, or takes it back."""
        sequence = self._live.get(name)
        if sequence is not None:
            self._settle(sequence, record.collected_s, self._ahead)
            self._leave(sequence, record.collected_s)
            self._enqueue(sequence, state, record.collected_s)

    def _enqueue(self, sequence: _Sequence, state: str, at_s: float) -> None:
        sequence.state = state
        sequence.since_s = max(sequence.since_s, at_s)
        sequence.named = sequence.rest = None
        if state != "paused":
            self._fresh.append(sequence)

    def _end(self, sequence: _Sequence, reason: str, num_output: int | None, at_s: float) -> None:
        self._part(sequence)
        self._settle(sequence, at_s, self._ahead)
        sequence.num_output = _num_output(sequence) if num_output is None else num_output
        sequence.close(at_s)
        sequence.reason, sequence.ended_s = reason, at_s
        if sequence.between_s:
            sequence.wait(_BETWEEN, sequence.between_s, 0)
        del self._live[sequence.id]
        request = sequence.request
        request.num_open -= 1
        if not request.num_open:
            self._ended[request.id] = request
            self._num_ended += len(request.sequences)
            while self._num_ended > self._capacity and len(self._ended) > 1:
                self._forget(next(iter(self._ended.values())))

    def _forget(self, request: _Request) -> None:
        """A request is too long ago."""
        if self._ended.pop(request.id, None) is not None:
            self._num_ended -= len(request.sequences)
        self._requests.pop(request.id, None)
        for sequence in request.sequences:
            if self._of_sequence.get(sequence.id) is request:
                del self._of_sequence[sequence.id]

    # ------------------------------------------------------------------------------------------------- what may be asked

    @property
    def ids(self) -> list[str]:
        """The requests that are known, in the order of their arrival."""
        return list(self._requests)

    def explain(self, name: str, now_s: float, tenant: str | None = None) -> Explanation | None:
        """The explanation of a request, by its id or by that of one of its texts. None: it is not known, or it is not
        ``tenant``'s."""
        request = self._requests.get(name) or self._of_sequence.get(name)
        if request is None or (tenant is not None and request.tenant != tenant):
            return None
        if name != request.id and len(request.sequences) > 1:
            (sequence,) = [s for s in request.sequences if s.id == name]
            return self._tell(request, sequence, now_s)
        return self._whole(request, now_s)

    def _whole(self, request: _Request, now_s: float) -> Explanation:
        """Of a request: the text that ended last says what took long."""
        each, trail = request.sequences, request.trail
        last = max(each, key=lambda s: now_s if s.ended_s is None else s.ended_s)
        told = self._tell(request, last, now_s, delivers=True)
        if len(each) == 1:
            return told
        told_each = tuple(self._tell(request, s, now_s) for s in each)
        of_prompts = [s for s in each if s.parent is None]
        return msgspec.structs.replace(
            told,
            id=request.id,
            prompt_tokens=sum(s.num_prompt for s in of_prompts),
            cached_tokens=sum(s.cached or 0 for s in of_prompts),
            output_tokens=sum(s.output_tokens for s in told_each),
            sequences=told_each,
            first_text_s=None if trail is None or trail.first_text_s is None else trail.first_text_s - trail.received_s,
        )

    def _tell(self, request: _Request, s: _Sequence, now_s: float, *, delivers: bool = False) -> Explanation:
        """Of one text; ``delivers``: up to the end of its answer, not of the text."""
        self._catch_up(s)
        trail = request.trail
        zero_s = s.arrival_s if trail is None else trail.received_s
        ended_s = now_s if s.ended_s is None else s.ended_s
        spans = [*(() if trail is None else trail.phases), *s.phases]
        first = None
        if s.ended_s is None:
            spans.append((s.state, s.since_s, max(now_s, s.since_s)))
        elif delivers and trail is not None:
            done_s = now_s if trail.delivered_s is None else trail.delivered_s
            spans.append(("deliver", ended_s, max(done_s, ended_s)))
            ended_s = max(done_s, ended_s)
        if delivers and trail is not None and trail.first_text_s is not None:
            first = trail.first_text_s - zero_s
        phases = tuple(Phase(name, begin_s - zero_s, end_s - zero_s) for name, begin_s, end_s in spans)
        total_s = ended_s - zero_s
        return Explanation(
            id=request.id if len(request.sequences) == 1 else s.id,
            model=self._model,
            prompt_tokens=s.num_prompt,
            cached_tokens=s.cached or 0,
            output_tokens=_num_output(s),
            finish_reason=s.reason,
            total_s=total_s,
            first_text_s=first,
            phases=phases,
            unexplained_s=uncovered_s(total_s, phases),
            waits=self._waits(s, now_s),
            chunks=tuple(s.chunks),
            steps=s.steps,
            shared_with=Sharing(s.shared / s.steps if s.steps else 0.0, s.most),
            preemptions=tuple(_preempted(loss, zero_s) for loss in s.losses),
        )

    def _waits(self, s: _Sequence, now_s: float) -> tuple[Waiting, ...]:
        """Its reasons, those of a wait that goes on included."""
        found = {text: (w.seconds, w.steps, tuple(w.behind)) for text, w in s.waits.items()}

        def add(text: str, seconds: float, steps: int, behind: Sequence[str]) -> None:
            had_s, had, names = found.get(text, (0.0, 0, ()))
            both = tuple(dict.fromkeys([*names, *(name for name in behind if name != s.id)]))
            found[text] = (had_s + max(0.0, seconds), had + steps, both[:MAX_BEHIND])

        if s.ended_s is None:
            if s.named is not None:
                add(s.named[0], now_s - s.named[1], 1, s.named[2])
            if s.rest is not None:
                for text, seconds, steps in self._rest_since(s.rest[0]):
                    add(text, seconds, steps, (*s.rest[1], *self._ahead))
                if self._rest_now[0]:
                    add(self._rest_now[0], now_s - self._rest_now[1], 1, self._ahead)
            if s.between_s:
                add(_BETWEEN, s.between_s, 0, ())
        told = [Waiting(text.partition(":")[0], text.partition(": ")[2], *values) for text, values in found.items()]
        return tuple(sorted(told, key=lambda w: -w.seconds))


def _add_chunk(chunks: list[int], num_tokens: int) -> None:
    if len(chunks) < MAX_CHUNKS:
        chunks.append(num_tokens)
    else:
        chunks[-1] += num_tokens


def _num_output(s: _Sequence) -> int:
    """Tokens generated: of one that runs, a token for each step behind its last chunk, and one for that."""
    return max(0, s.steps - len(s.chunks) + (s.state == _DECODE)) if s.num_output is None else s.num_output


def _preempted(loss: _Loss, zero_s: float) -> Preempted:
    away_s = None if loss.until_s is None else loss.until_s - loss.at_s
    return Preempted(loss.at_s - zero_s, loss.reason, loss.by, loss.tokens, away_s)
