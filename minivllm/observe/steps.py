"""The last records of steps, ready to be sent, and where a reader begins who did not see those before.

Each record gets a number that rises by one, whatever becomes of engines; and it is written as JSON once, for all readers. They
come with the number that they want next: nobody has a queue here, so a reader who is slow or gone costs nothing. One who has
fallen behind what is kept begins anew with a base.

Records are kept in segments. A segment knows the state before its first record, so the oldest can be dropped without looking
into it, and bytes are bounded as well as records: a step of many rows is long.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Final

import msgspec

from minivllm.observe.recording import Recorder
from minivllm.observe.state import Snapshot, State
from minivllm.records import StepRecord

SEGMENTS: Final = 8
MAX_BYTES: Final = 64 * 2**20  # of JSON; at 256 rows a step's is 25 kB
PAGE_BYTES: Final = 4 * 2**20


@dataclass(frozen=True)
class Page:
    """Records that follow each other, as JSON, and how to go on."""

    base: Snapshot | None  # the state before the first of them, where the reader cannot know it
    records: list[bytes]
    next: int


@dataclass
class _Segment:
    """Written by ``Steps`` alone."""

    first: int  # number of its first record
    before: Snapshot
    records: list[bytes] = field(default_factory=list)
    num_bytes: int = 0


class Steps:
    """What became of all steps. Written by whoever gets the engine's outputs, one ``add`` a record; read in the same thread."""

    def __init__(self, block_size: int, most: int, recorder: Recorder | None = None, max_bytes: int = MAX_BYTES) -> None:
        """At least the last ``most`` records are kept, or fewer that are ``max_bytes``; 0: none. A ``recorder`` gets all."""
        self.next = 0  # number of the record that comes next
        self._most, self._max_bytes = most, max_bytes
        self._segment_length, self._segment_bytes = max(1, most // SEGMENTS), max_bytes // SEGMENTS
        self._state = State(block_size)
        self._segments = deque([_Segment(0, self._state.snapshot())])
        self._life: int | None = None
        self._recorder = recorder
        self._encode = msgspec.json.Encoder().encode

    def add(self, record: StepRecord, life: int) -> StepRecord:
        """Keep one more. ``life``: engines that were before the one that it is of; the first of a life is returned with it."""
        if life != self._life:
            self._life = life
            record = msgspec.structs.replace(record, life=life)
        if self._recorder is not None:
            self._recorder.add(record)
        if self._most:
            self._keep(b'{"seq":%d,' % self.next + self._encode(record)[1:])
            self._state.apply(record)
        self.next += 1
        return record

    def _keep(self, line: bytes) -> None:
        segments, segment = self._segments, self._segments[-1]
        if len(segment.records) >= self._segment_length or segment.num_bytes >= self._segment_bytes:
            segment = _Segment(self.next, self._state.snapshot())
            segments.append(segment)
            while self.next - segments[1].first >= self._most or sum(s.num_bytes for s in segments) > self._max_bytes:
                segments.popleft()
        segment.records.append(line)
        segment.num_bytes += len(line)

    def now(self) -> Page:
        """The state as it is, and no records."""
        return Page(self._state.snapshot(), [], self.next)

    def read(self, since: int | None, limit: int, most_bytes: int = PAGE_BYTES) -> Page:
        """At most ``limit`` records, and at most ``most_bytes`` of them but for one, from number ``since`` on; from the oldest
        on, behind a base, where that is not given, is not there any more or never was."""
        oldest = self._segments[0]
        known = since is not None and oldest.first <= since <= self.next
        at = since if since is not None and known else oldest.first
        found: list[bytes] = []
        num_bytes = 0
        for segment in self._segments:
            if segment.first + len(segment.records) <= at:
                continue
            for line in segment.records[at - segment.first :]:
                num_bytes += len(line)
                if len(found) == limit or (found and num_bytes > most_bytes):
                    return Page(None if known else oldest.before, found, at)
                found.append(line)
                at += 1
        return Page(None if known else oldest.before, found, at)
