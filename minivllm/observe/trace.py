"""A recording as a trace in Chrome's JSON format, which https://ui.perfetto.dev opens.

* Process "engine": a slice for each step from its planning to its result, and in it planning, device, collection. With overlap
  a step begins before the one before has ended, so there are as many lanes as steps in flight.
* Process "requests": a track for each request, with a slice for all of it, in that one for each phase, and in those one for
  each step. Preemptions and restarts are marks.
* Counters: tokens of the batch, blocks by state, requests by state.
* Arrows lead from a request's arrival to the steps that took its prompt, and to its last one.

Times are whole microseconds since the first record, so that slices that share a stamp share it in the file.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from minivllm.observe.explain import Explanations
from minivllm.records import StepRecord

ENGINE: Final = 1  # process ids of the file
REQUESTS: Final = 2
Event = dict[str, Any]


@dataclass(slots=True)
class _Track:
    """One request's. Written by ``_Tracer``."""

    number: int
    arrival_us: int
    drawn_us: int  # until when steps were drawn
    ended: bool = False
    last: tuple[int, int] | None = None  # when its last step began, and in which lane that is


class _Tracer:
    """What is drawn so far. Written by ``trace_events``."""

    def __init__(self, zero_s: float, model: str) -> None:
        self.book = Explanations(model, capacity=2**31)
        self._zero_s = zero_s
        self._tracks: dict[str, _Track] = {}
        self._lanes: list[int] = []  # until when each is taken

    def _us(self, at_s: float) -> int:
        return max(0, round((at_s - self._zero_s) * 1e6))

    def step(self, record: StepRecord) -> Iterator[Event]:
        """What a record adds."""
        if record.life:
            yield {"name": "engine restarted", "ph": "i", "s": "g", "pid": ENGINE, "tid": 1, "ts": self._us(record.scheduled_s)}
        for arrival in record.arrived:
            if arrival.id not in self._tracks:
                yield from self._arrive(arrival.id, arrival.arrival_s)
        if record.step >= 0:
            yield from self._slices(record)
        for lost in record.preempted:
            if (track := self._tracks.get(lost.id)) is not None:
                args = {"reason": lost.reason, "by": lost.by, "lost_tokens": lost.num_computed}
                yield {"name": "preempted", "ph": "i", "s": "t", "pid": REQUESTS, "tid": track.number,
                       "ts": max(self._us(record.scheduled_s), track.drawn_us), "args": args}  # fmt: skip
        yield from self._counters(record)
        for finished in record.finished:
            if (track := self._tracks.get(finished.id)) is not None:
                track.ended = True
                yield from self._arrow_ends(track)

    def _arrive(self, name: str, arrival_s: float) -> Iterator[Event]:
        number, at_us = len(self._tracks) + 1, self._us(arrival_s)
        self._tracks[name] = _Track(number, at_us, at_us)
        yield {"name": "thread_name", "ph": "M", "pid": REQUESTS, "tid": number, "args": {"name": name}}
        yield {"name": "thread_sort_index", "ph": "M", "pid": REQUESTS, "tid": number, "args": {"sort_index": number}}

    def _slices(self, record: StepRecord) -> Iterator[Event]:
        """The step in its lane, and in the tracks of its rows."""
        stamps, last_us = [], 0
        for at_s in (record.scheduled_s, record.launched_s, record.finished_s, record.collected_s):
            last_us = max(last_us, self._us(at_s))
            stamps.append(last_us)
        lane = next((i for i, until_us in enumerate(self._lanes) if until_us <= stamps[0]), len(self._lanes))
        if lane == len(self._lanes):
            self._lanes.append(0)
            yield {"name": "thread_name", "ph": "M", "pid": ENGINE, "tid": lane + 1, "args": {"name": f"steps {lane + 1}"}}
        self._lanes[lane] = stamps[3]
        tokens = sum(row.num_tokens for row in record.rows)
        args: Event = {"step": record.step, "rows": len(record.rows), "tokens": tokens, "waiting": record.num_waiting}
        if record.rest_waits:
            args["waiting for"] = record.rest_waits
        yield _slice(f"step of {len(record.rows)}", ENGINE, lane + 1, (stamps[0], stamps[3]), args)
        for part, begin_us, end_us in zip(("plan", "device", "collect"), stamps, stamps[1:], strict=False):
            yield _slice(part, ENGINE, lane + 1, (begin_us, end_us))
        for row in record.rows:
            track = self._tracks.get(row.id)
            if track is None or track.ended:
                continue  # it ended while this step was in flight
            if track.last is None:
                yield _flow("s", track.number, REQUESTS, track.number, track.arrival_us)
            begin_us = max(stamps[0], track.drawn_us)
            track.drawn_us = max(stamps[3], begin_us)
            told = {"step": record.step, "start": row.start, "tokens": row.num_tokens, "shared_with": len(record.rows) - 1}
            title = f"{row.kind} {row.num_tokens}" if row.kind == "prefill" else row.kind
            yield _slice(title, REQUESTS, track.number, (begin_us, track.drawn_us), told)
            if row.kind == "prefill":
                yield _flow("t", track.number, ENGINE, lane + 1, stamps[0])
            track.last = (stamps[0], lane + 1)

    def _counters(self, record: StepRecord) -> Iterator[Event]:
        prefill = sum(row.num_tokens for row in record.rows if row.kind == "prefill")
        decode = sum(row.num_tokens for row in record.rows) - prefill
        blocks = {"held": record.blocks_referenced, "cached": record.blocks_cached, "free": record.blocks_free}
        states = {"running": record.num_running, "waiting": record.num_waiting, "paused": record.num_paused}
        values = {"batch tokens": {"prefill": prefill, "decode": decode}, "KV blocks": blocks, "requests": states}
        for name, counted in values.items():
            yield {"name": name, "ph": "C", "pid": ENGINE, "tid": 0, "ts": self._us(record.collected_s), "args": counted}

    def _arrow_ends(self, track: _Track) -> Iterator[Event]:
        if track.last is not None:
            begin_us, lane = track.last
            yield _flow("f", track.number, ENGINE, lane, begin_us)

    def finish(self, now_s: float) -> Iterator[Event]:
        """The requests with their phases, and the arrows of those that run still."""
        for name, track in self._tracks.items():
            if not track.ended:
                yield from self._arrow_ends(track)
            told, spans = self.book.explain(name, now_s), self.book.spans(name, now_s)
            if told is None or not spans:
                continue
            args = {
                "prompt_tokens": told.prompt_tokens, "cached_tokens": told.cached_tokens, "output_tokens": told.output_tokens,
                "finish_reason": told.finish_reason, "preemptions": len(told.preemptions),
                **{f"waited for {wait.reason}: {wait.text}": f"{wait.seconds:.6f} s" for wait in told.waits},
            }  # fmt: skip
            until_us = self._us(max(end_s for _, _, end_s in spans))
            yield _slice("request", REQUESTS, track.number, (self._us(spans[0][1]), until_us), args)
            for phase, begin_s, end_s in spans:
                yield _slice(phase, REQUESTS, track.number, (self._us(begin_s), self._us(end_s)))


def _slice(name: str, pid: int, tid: int, span_us: tuple[int, int], args: Event | None = None) -> Event:
    begin_us, end_us = span_us
    event = {"name": name, "ph": "X", "cat": "minivllm", "pid": pid, "tid": tid, "ts": begin_us, "dur": end_us - begin_us}
    return event if args is None else {**event, "args": args}


def _flow(kind: str, number: int, pid: int, tid: int, at_us: int) -> Event:
    event = {"name": "steps", "ph": kind, "cat": "arrival", "id": number, "pid": pid, "tid": tid, "ts": at_us}
    return event if kind == "s" else {**event, "bp": "e"}


def trace_events(records: Iterable[StepRecord], model: str) -> Iterator[Event]:
    """The events of a trace; nothing of records that never came."""
    tracer, last_s = None, 0.0
    for pid, name in ((ENGINE, "engine"), (REQUESTS, "requests")):
        yield {"name": "process_name", "ph": "M", "pid": pid, "tid": 0, "args": {"name": name}}
    for record in records:
        if tracer is None:
            began = [at for a in record.arrived for at in (a.arrival_s, a.received_s) if at is not None]
            tracer = _Tracer(min([record.scheduled_s, *began]), model)
        tracer.book.observe(record)
        yield from tracer.step(record)
        last_s = max(last_s, record.collected_s)
    if tracer is not None:
        yield from tracer.finish(last_s)
