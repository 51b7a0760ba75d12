"""Every record of a scheduler is folded, and compared with what the scheduler and its allocator have themselves."""

from collections import deque
from dataclasses import dataclass
from typing import Any

from token_runner import Corruption

from minivllm.kv.allocator import Allocator, PoolCounts
from minivllm.kv.prefix import PrefixKeys
from minivllm.observe.state import State
from minivllm.records import EngineOutput, StepRecord
from minivllm.scheduler.scheduler import Scheduler


@dataclass(frozen=True)
class Picture:
    """The truth about blocks at one moment."""

    tables: dict[str, tuple[tuple[int, ...], ...]]
    counts: PoolCounts
    cached: tuple[dict[int, bytes | None], ...]  # per group: block -> key


class RecordWatch:
    """Takes the place of a scheduler's methods, and raises ``Corruption`` when a record does not tell the truth."""

    def __init__(self, scheduler: Scheduler, kv: Allocator) -> None:
        self.state = State(kv.block_size)
        self.num_records = 0
        self._late = False  # a request had ended by the time of its first row, so what it found in its blocks was not seen
        self._scheduler, self._kv = scheduler, kv
        self._pictures: deque[Picture] = deque()  # from just before each step in flight but the oldest was planned
        self._known: dict[str, list[int]] = {}  # tokens of each request, of ended ones too
        self._keys: dict[bytes, tuple[int, ...]] = {}  # of every full block that anybody ever had
        self._chains: dict[str, PrefixKeys] = {}
        self._methods: dict[str, Any] = {
            name: getattr(scheduler, name) for name in ("add", "schedule", "apply", "fail", "snapshot")
        }
        for name in self._methods:
            setattr(scheduler, name, getattr(self, name))

    # -- what is watched -------------------------------------------------------------------------------------------------

    def add(self, spec: Any, guide: Any = None) -> None:
        self._methods["add"](spec, guide)
        self._known[spec.id] = self._scheduler._book.by_id[spec.id].token_ids
        self._chains[spec.id] = PrefixKeys(self._kv.block_size, spec.cache_salt, "")

    def schedule(self, now: float) -> Any:
        if self._scheduler._flights:
            self._pictures.append(self._picture())
        plan = self._methods["schedule"](now)
        if plan is None and self._scheduler._flights:
            self._pictures.pop()
        return plan

    def apply(self, plan: Any, result: Any, now: float) -> EngineOutput:
        output: EngineOutput = self._methods["apply"](plan, result, now)
        assert output.record is not None
        self._compare(output.record, self._pictures.popleft() if self._scheduler._flights else self._picture())
        return output

    def fail(self, *args: Any, **more: Any) -> EngineOutput:
        self._pictures.clear()
        output: EngineOutput = self._methods["fail"](*args, **more)  # calls ``snapshot``
        return output

    def snapshot(self, now: float) -> StepRecord:
        record: StepRecord = self._methods["snapshot"](now)
        self._compare(record, self._picture())
        return record

    # -- truth and fold --------------------------------------------------------------------------------------------------

    def _picture(self) -> Picture:
        held = self._kv._held
        tables = {
            r.spec.id: tuple(tuple(ids) for ids in held[r.uid].blocks)
            for r in self._scheduler._book.live.values()
            if any(held[r.uid].blocks)
        }
        cached = tuple({b: pool._keys[b] for b in pool._cached} for pool in self._kv._pools)
        return Picture(tables, self._kv.counts(), cached)

    def _compare(self, record: StepRecord, truth: Picture) -> None:
        try:
            self._agree(record, truth)
        except AssertionError as error:
            raise Corruption from error  # no loop takes it for a failed step

    def _agree(self, record: StepRecord, truth: Picture) -> None:
        self.num_records += 1
        state, counts = self.state, truth.counts
        self._late = self._late or not {r.id for r in record.rows} <= state.requests.keys() | {a.id for a in record.arrived}
        state.apply(record)
        state.check(record)
        assert (record.blocks_total, record.blocks_free) == (counts.total, counts.free)
        assert (record.blocks_cached, record.blocks_referenced) == (counts.cached, counts.referenced)
        tables = {name: tuple(tuple(ids) for ids in r.table) for name, r in state.requests.items() if r.table}
        assert tables == truth.tables
        live = self._scheduler._book.by_id
        assert {name for name, r in state.requests.items() if not r.ended} == live.keys()
        paused = {r.spec.id for r in self._scheduler._book.paused.values()}
        assert {name for name, r in state.requests.items() if r.paused and not r.ended} == paused
        for group, blocks in enumerate(truth.cached):
            assert set(state.cached(group)) == blocks.keys()
        if self._scheduler.limits.record_tokens:
            self._compare_tokens(truth)

    def _compare_tokens(self, truth: Picture) -> None:
        size = self._kv.block_size
        for name, tokens in self._known.items():
            full = len(tokens) // size
            keys = self._chains[name].extend(tokens, full)
            self._keys.update((keys[i], tuple(tokens[i * size : (i + 1) * size])) for i in range(full))
        for name, request in self.state.requests.items():
            assert request.tokens == self._known[name][: len(request.tokens)]
            whole = len(request.tokens) >= min(request.computed, len(self._known[name]))
            assert whole or (self._late and request.ended)
        for group, blocks in enumerate(truth.cached):
            for block, key in blocks.items():
                assert key is not None
                told = self.state.contents(group, block)
                assert told == self._keys[key] or (self._late and not told)
        for r in self._scheduler._book.running:
            for i, block in enumerate(truth.tables.get(r.spec.id, ((),))[0][: r.computed // size]):
                told = tuple(self.state.contents(0, block))
                assert told == tuple(r.token_ids[i * size : (i + 1) * size])[: len(told)]
