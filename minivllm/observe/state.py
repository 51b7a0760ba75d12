"""Who runs and what is in every block, known from the records of steps alone.

Records tell differences. ``State.apply`` adds one to what the records before it told, so whoever has all records of an engine,
or a ``Snapshot`` and all records after it, has the block table of every request, the contents of every block and who holds it.
``check`` compares that with the counts that each record brings of its own. The page does the same in its own language.

A block that nobody holds is *free* or *cached*. Records name the blocks that came free; one that is let go and not named is
cached. It leaves the cache when somebody is given it, be it for what is in it (a hit) or for the room (an eviction).
"""

from collections.abc import Sequence
from itertools import repeat
from typing import Final

import msgspec

from minivllm.records import ArrivalRecord, RowRecord, StepRecord

RUNNING: Final = "running"
WAITING: Final = "waiting"
PAUSED: Final = "paused"


class RequestState:
    """What is known of one request. Written by ``State`` alone. The lists only grow: where a table empties, new ones take
    their place, so that a ``Snapshot`` need not copy them."""

    __slots__ = ("arrival", "computed", "ended", "paused", "table", "tokens")

    def __init__(self, arrival: ArrivalRecord) -> None:
        self.arrival = arrival
        self.computed = 0
        self.table: list[list[int]] = []  # per KV group; empty while it does not run
        self.tokens: list[int] = []  # prompt and output, as far as records told
        self.paused = 0  # 1 while nobody reads its text
        self.ended = False  # its blocks are let go with the next record


class _Held:
    """A block that requests hold. Written by ``State`` alone. What is in it stands in the tokens of the newest."""

    __slots__ = ("count", "index", "tokens")

    def __init__(self, tokens: list[int], index: int) -> None:
        self.count = 1
        self.tokens = tokens
        self.index = index  # of the block in the table


_Part = tuple[list[int], int]  # a list that may have grown since, and how long it was


class Snapshot(msgspec.Struct, frozen=True):
    """A ``State`` as it was. Cheap to make; it shares the state's lists, of which it knows how long they were."""

    requests: tuple[tuple[ArrivalRecord, int, str, tuple[_Part, ...], _Part], ...]  # computed, state, table, tokens
    cached: tuple[dict[int, tuple[int, ...]], ...]
    total: int

    def base(self) -> "Base":
        """The same in full. Takes milliseconds where there are many tokens, and may be called in any thread."""
        requests = []
        holders: dict[tuple[int, int], list[str]] = {}
        for arrival, computed, state, parts, (tokens, count) in self.requests:
            table = tuple([tuple(ids[:length]) for ids, length in parts])
            for group, ids in enumerate(table):
                for block in ids:
                    holders.setdefault((group, block), []).append(arrival.id)
            requests.append(
                RequestBase(
                    arrival.id, arrival.num_prompt, arrival.max_tokens, computed, arrival.arrival_s, arrival.priority, state,
                    table, tuple(tokens[:count]),
                )
            )  # fmt: skip
        held = tuple([(group, block, tuple(ids)) for (group, block), ids in holders.items()])
        cached = tuple([(g, block, tokens) for g, blocks in enumerate(self.cached) for block, tokens in blocks.items()])
        return Base(tuple(requests), BlocksBase(self.total, held, cached))


class RequestBase(msgspec.Struct, frozen=True):
    """A request in a ``Base``."""

    id: str
    num_prompt: int
    max_tokens: int
    num_computed: int
    arrival_s: float
    priority: int
    state: str  # waiting, running or paused
    table: tuple[tuple[int, ...], ...]  # per KV group
    tokens: tuple[int, ...]


class BlocksBase(msgspec.Struct, frozen=True):
    """The blocks in a ``Base``; those that it does not name are free."""

    total: int
    held: tuple[tuple[int, int, tuple[str, ...]], ...]  # group, block, by whom
    cached: tuple[tuple[int, int, tuple[int, ...]], ...]  # group, block, tokens


class Base(msgspec.Struct, frozen=True):
    """What a reader begins with: everything that records before told and that still matters."""

    requests: tuple[RequestBase, ...]
    blocks: BlocksBase


class State:
    """The fold of all records so far. Written by whoever gets the records: one ``apply`` each, in their order."""

    def __init__(self, block_size: int) -> None:
        self.requests: dict[str, RequestState] = {}
        self._block_size = block_size
        self._total = 0
        self._held: list[dict[int, _Held]] = []  # per KV group, by block
        self._cached: list[dict[int, tuple[int, ...]]] = []  # per KV group: block -> tokens

    # -- one record ------------------------------------------------------------------------------------------------------

    def apply(self, record: StepRecord) -> None:
        """Go on by one record."""
        requests, outputs = self.requests, record.outputs
        if record.life is not None:
            requests.clear()
            self._held, self._cached = [], []
        self._total = record.blocks_total
        for arrival in record.arrived:
            self._arrive(arrival)
        for row, got in zip(record.rows, outputs or repeat(()), strict=False):
            if (request := requests.get(row.id)) is None:  # it ended while this step, its first, was in flight
                request = self._arrive(ArrivalRecord(row.id, record.scheduled_s, 0, 0))
                request.ended = True
            if row.blocks:
                self._gain(request, row)
            tokens = request.tokens
            request.computed = end = row.start + row.num_tokens
            if len(tokens) < end and row.start <= len(tokens):
                tokens += row.tokens[len(tokens) - row.start :]
            tokens += got
        for request_id in record.released:
            if (gone := requests.get(request_id)) is not None:
                self._release(gone)
        for group, block in record.freed:
            if group < len(self._cached):
                self._cached[group].pop(block, None)
        if record.finished or record.paused or record.resumed:
            self._move(record)

    def _arrive(self, arrival: ArrivalRecord) -> RequestState:
        """A request is known. Its id may be that of one which ended, but whose blocks are let go with the next record."""
        before = self.requests.get(arrival.id)
        request = self.requests[arrival.id] = RequestState(arrival)
        if before is not None:
            request.table = before.table
        return request

    def _gain(self, request: RequestState, row: RowRecord) -> None:
        """A request's table grows."""
        while len(self._held) < len(row.blocks):
            self._held.append({})
            self._cached.append({})
        if row.cached and row.tokens:
            self._find(request, row)
        if not request.table:
            request.table = [[] for _ in row.blocks]
        for table, blocks, held, cached in zip(request.table, row.blocks, self._held, self._cached, strict=True):
            for block in blocks:
                if (there := held.get(block)) is None:
                    held[block] = _Held(request.tokens, len(table))
                    cached.pop(block, None)
                else:  # a hit, or its holder let it go for this one in this very step: then what is in it is new
                    there.count += 1
                    there.tokens, there.index = request.tokens, len(table)
                table.append(block)

    def _find(self, request: RequestState, row: RowRecord) -> None:
        """Tokens that were not computed: what is in the blocks that were found, and a fork's begun block."""
        tokens, size = request.tokens, self._block_size
        for i in range(len(tokens) // size, row.cached // size):
            found = self.contents(0, row.blocks[0][i])
            if len(found) < size:
                return
            tokens.extend(found[len(tokens) - i * size :])
        parent = self.requests.get(request.arrival.parent or "")
        if parent is not None:
            tokens.extend(parent.tokens[len(tokens) : row.cached])

    def _release(self, request: RequestState) -> None:
        """A request lets go of all blocks."""
        size = self._block_size
        for table, held, cached in zip(request.table, self._held, self._cached, strict=False):
            for block in table:
                there = held[block]
                there.count -= 1
                if not there.count:
                    at = there.index * size
                    cached[block] = tuple(there.tokens[at : at + size])
                    del held[block]
        request.table = []
        request.computed = 0
        if request.ended:
            del self.requests[request.arrival.id]

    def _move(self, record: StepRecord) -> None:
        """Who ended, who is paused."""
        requests = self.requests
        for change, ids in ((1, record.paused), (-1, record.resumed)):  # counted: both may be in one record, in any order
            for request_id in ids:
                if (request := requests.get(request_id)) is not None:
                    request.paused += change
        for finished in record.finished:
            request = requests.get(finished.id)
            if request is None or request.arrival.arrival_s != finished.arrival_s:
                continue
            request.ended = True
            if not request.table:
                del requests[finished.id]

    # -- questions -------------------------------------------------------------------------------------------------------

    def contents(self, group: int, block: int) -> Sequence[int]:
        """The tokens in a block that is held or cached, as far as records told them."""
        if (there := self._held[group].get(block)) is not None:
            at = there.index * self._block_size
            return there.tokens[at : at + self._block_size]
        return self._cached[group].get(block, ())

    def cached(self, group: int) -> Sequence[int]:
        """The blocks that nobody holds and a lookup would find."""
        return tuple(self._cached[group]) if group < len(self._cached) else ()

    def check(self, record: StepRecord) -> None:
        """Raise RuntimeError unless the blocks are as many as the record that was applied last says."""
        held, cached = sum(map(len, self._held)), sum(map(len, self._cached))
        mine = {"free": self._total - held - cached, "cached": cached, "held": held}
        theirs = {"free": record.blocks_free, "cached": record.blocks_cached, "held": record.blocks_referenced}
        if mine != theirs:
            raise RuntimeError(f"records of steps do not add up after step {record.step}: {mine}, but it says {theirs}")

    def snapshot(self) -> Snapshot:
        """The state as it is now."""
        return Snapshot(
            tuple([
                (r.arrival, r.computed, PAUSED if r.paused else RUNNING if r.table else WAITING,
                 tuple([(ids, len(ids)) for ids in r.table]), (r.tokens, len(r.tokens)))
                for r in self.requests.values()
            ]),
            tuple([dict(blocks) for blocks in self._cached]),
            self._total,
        )  # fmt: skip
