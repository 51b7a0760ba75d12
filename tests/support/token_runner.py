"""A runner without a model that notices every mistake in block tables, positions and sharing.

Its "K/V" of position p is a fingerprint of tokens 0 .. p. Computing a position checks that every earlier position's KV slot,
read through the row's block table, holds the fingerprint of this very sequence; the sampled token is a function of the
fingerprint alone. So any block that is shared wrongly, reused too early, published before it is written or copied from the
wrong place raises at once or changes the text.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from hashlib import sha256

import numpy as np

from minivllm.errors import OutOfDeviceMemory
from minivllm.types import WANT_PROMPT_LOGPROBS, WANT_SAMPLE, NewRow, RowWork, StepPlan, StepResult, StepTimes, TokenLogprobs


class Corruption(BaseException):
    """A mistake in the plan. Not an Exception: no loop may take it for a failed step and go on."""


def fingerprint(before: bytes, token: int) -> bytes:
    """The "K/V" of a token after a prefix."""
    return sha256(before + token.to_bytes(4, "little")).digest()


def next_token(mark: bytes, vocab_size: int, seed: int) -> int:
    """The token that follows a prefix: a function of the prefix and the seed, as with a real seeded model."""
    return int.from_bytes(sha256(mark + seed.to_bytes(8, "little", signed=True)).digest()[:4], "little") % vocab_size


def expected_tokens(prompt: tuple[int, ...], count: int, vocab_size: int, seed: int, stop: frozenset[int]) -> list[int]:
    """What a sequence generates when it is alone: the meaning that every schedule must keep."""
    mark = b""
    for token in prompt:
        mark = fingerprint(mark, token)
    out: list[int] = []
    while len(out) < count:
        out.append(next_token(mark, vocab_size, seed))
        if out[-1] in stop:
            break
        mark = fingerprint(mark, out[-1])
    return out


@dataclass
class _Row:
    uid: int
    seed: int
    tokens: list[int]
    blocks: list[int]
    computed: int
    num_prompt: int = 0
    broken: bool = False  # a failed step left it behind; whatever it gives must never be used


@dataclass
class _Pending:
    """A step whose result is asked for later; it was computed when launched, as a device's queue would."""

    outcome: StepResult | Exception
    spoiled: frozenset[int] = frozenset()  # blocks in which numbers stand that are not finite
    told: set[int] = field(default_factory=set)  # where to note these, once somebody has been told

    def sample(self, masks: None = None) -> None:
        """Nothing is left to do."""

    def result(self) -> StepResult:
        """The result, or the failure."""
        if isinstance(self.outcome, Exception):
            raise self.outcome
        self.told |= self.spoiled
        return self.outcome


@dataclass
class TokenRunner:
    """The device of the tests. Written by ``launch`` alone."""

    block_size: int
    num_blocks: int
    max_num_seqs: int
    vocab_size: int = 97
    accept: np.random.Generator | None = None  # draws how many drafts are accepted
    fail_steps: set[int] = field(default_factory=set)
    memory_tokens: int | None = None  # a step of more tokens runs out of memory
    memory_rows: int | None = None  # so does one of more rows
    breaks: Callable[[StepPlan], None] = lambda plan: None  # raises where the device is to fail at a plan
    bad_uids: set[int] = field(default_factory=set)
    bad_now: set[int] = field(default_factory=set)
    rows: dict[int, _Row] = field(default_factory=dict)
    slots: dict[tuple[int, int], bytes] = field(default_factory=dict)
    spoiled: set[int] = field(default_factory=set)  # blocks of which it was told that they hold what is not finite
    steps: int = 0
    num_shared: int = 0  # entries of plans that said which rows begin with the same blocks

    def launch(self, plan: StepPlan) -> _Pending:
        """Compute a step in stream order."""
        for _, block in plan.zeroed:
            self.spoiled.discard(block)
            for offset in range(self.block_size):
                self.slots.pop((block, offset), None)
        for row in plan.freed_rows:
            self.rows.pop(row, None)
        for new in plan.new_rows:
            self._add(new)
        for copy in plan.copies:
            for offset in range(self.block_size):
                if (copy.src, offset) in self.slots:
                    self.slots[copy.dst, offset] = self.slots[copy.src, offset]
        self._check_shared(plan)
        self.steps += 1
        self.breaks(plan)
        if plan.num_tokens > (self.memory_tokens or plan.num_tokens) or len(plan.work) > (self.memory_rows or len(plan.work)):
            raise OutOfDeviceMemory("more than the device has")
        if plan.step in self.fail_steps:
            for work in plan.work:  # what a broken step leaves behind is garbage
                row = self.rows[work.row]
                row.broken = True
                row.blocks += [b for group in work.new_block_ids for b in group]
                for position in range(row.computed, min(row.computed + work.num_tokens, len(row.blocks) * self.block_size)):
                    self.slots[self._slot(row, position)] = b"garbage"
            return _Pending(RuntimeError("the device broke this step"))
        for work in plan.work:
            self.rows[work.row].tokens += work.forced_ids
        # All rows write before any row reads, as in every layer of a real step.
        try:
            whole = [not self.rows[work.row].broken for work in plan.work]
            spans = [self._write(work) if ok else (0, 0) for work, ok in zip(plan.work, whole, strict=True)]
            self.bad_now = {work.uid for work in plan.work if work.uid in self.bad_uids}
            tokens = [self._read(work, span) if ok else (-1,) for work, span, ok in zip(plan.work, spans, whole, strict=True)]
        except (IndexError, KeyError) as error:
            raise Corruption("the plan does not fit the rows") from error
        bad = [i for i, work in enumerate(plan.work) if work.uid in self.bad_now]
        told = tuple([self._tell(work, span) for work, span in zip(plan.work, spans, strict=True)])
        spoiled = frozenset(b for i in bad for b in self.rows[plan.work[i].row].blocks if self._is_spoiled(b))
        result = StepResult(plan.step, tuple(tokens), StepTimes(0.0, 0.0), tuple(bad), (), told if any(told) else ())
        return _Pending(result, spoiled, self.spoiled)

    def _is_spoiled(self, block: int) -> bool:
        return any(self.slots.get((block, offset)) == b"not finite" for offset in range(self.block_size))

    def _give(self, blocks: Iterable[int]) -> None:
        """A row gets blocks: what is known to be in them must be harmless, also where nobody has written yet."""
        if any(block in self.spoiled and self._is_spoiled(block) for block in blocks):
            raise Corruption("a block is given again with numbers in it that are not finite")

    def prepare_more(self) -> bool:
        """There is nothing to prepare."""
        return False

    def _tell(self, work: RowWork, span: tuple[int, int]) -> tuple[TokenLogprobs, ...]:
        """Of each token of the prompt that follows one of the step, its position and itself."""
        row = self.rows[work.row]
        if not work.wants & WANT_PROMPT_LOGPROBS or row.broken:
            return ()
        after = range(span[0] + 1, min(span[1] + 1, row.num_prompt))
        if not after:
            raise Corruption("a step is to tell of a prompt, but none of it follows")
        return tuple(TokenLogprobs(-float(position), row.tokens[position]) for position in after)

    def _add(self, new: NewRow) -> None:
        if new.row in self.rows or not 0 <= new.row < self.max_num_seqs:
            raise Corruption(f"row {new.row} is taken or does not exist")
        (blocks,) = new.block_ids
        if not all(0 < b < self.num_blocks for b in blocks):
            raise Corruption("a block id outside the pool")
        self._give(blocks)
        self.rows[new.row] = _Row(new.uid, new.seed, list(new.token_ids), list(blocks), new.computed, new.num_prompt)

    def _check_shared(self, plan: StepPlan) -> None:
        """Rows that are said to begin with the same blocks do, and this step is the last that may write to these blocks."""
        named = [row for entry in plan.shared for row in entry.rows]
        if len(set(named)) != len(named) or not self.rows.keys() >= set(named):
            raise Corruption("a row shares its beginning twice, or is free")
        width = {work.row: work.num_tokens for work in plan.work}
        for entry in plan.shared:
            rows = [self.rows[row] for row in entry.rows]
            if list(entry.rows) != sorted(entry.rows) or len({tuple(r.blocks[: entry.num_blocks]) for r in rows}) != 1:
                raise Corruption(f"rows {entry.rows} are out of order or do not begin with the same blocks")
            for row, r in zip(entry.rows, rows, strict=True):
                if not r.broken and r.computed + width.get(row, 0) < entry.num_blocks * self.block_size:
                    raise Corruption(f"row {row} shares blocks that it does not see in this step")
        self.num_shared += len(plan.shared)

    def _slot(self, row: _Row, position: int) -> tuple[int, int]:
        return row.blocks[position // self.block_size], position % self.block_size

    def _true_token(self, row: _Row, position: int, marks: list[bytes]) -> int:
        """The token at a position: known, or the one that a perfect draft would propose."""
        return row.tokens[position] if position < len(row.tokens) else next_token(marks[-1], self.vocab_size, row.seed)

    def _write(self, work: RowWork) -> tuple[int, int]:
        row = self.rows[work.row]
        if row.uid != work.uid:
            raise Corruption("work for a row that holds another request")
        self._give(b for group in work.new_block_ids for b in group)
        row.blocks += [b for group in work.new_block_ids for b in group]
        start, end = row.computed, row.computed + work.num_tokens
        marks = [b""]
        for position in range(end):
            marks.append(fingerprint(marks[-1], self._true_token(row, position, marks)))
            if position >= start:
                good = work.uid not in self.bad_uids
                self.slots[self._slot(row, position)] = marks[-1] if good else b"not finite"
        return start, end

    def _read(self, work: RowWork, span: tuple[int, int]) -> tuple[int, ...]:
        row, end = self.rows[work.row], span[1]
        marks = [b""]
        for position in range(end):
            marks.append(fingerprint(marks[-1], self._true_token(row, position, marks)))
            slot = self.slots.get(self._slot(row, position))
            if slot == b"garbage":
                row.broken = True  # launched before anybody could know that the step before it broke
                return (-1,)
            if slot == b"not finite" or work.uid in self.bad_uids:  # whoever reads it gets the same
                self.bad_now.add(work.uid)
                for written in range(span[0], end):
                    self.slots[self._slot(row, written)] = b"not finite"
                row.tokens += [0] * (row.computed + work.num_tokens + 1 - len(row.tokens))
                row.computed = end
                return (-1,)
            if slot != marks[-1]:
                raise Corruption(f"row {work.row} reads foreign K/V at position {position}")
        if not work.wants & WANT_SAMPLE:
            row.computed = end
            return ()
        known = len(row.tokens)
        drafts = max(0, end - known)
        accepted = int(self.accept.integers(0, drafts + 1)) if self.accept is not None else 0
        row.computed = end - (drafts - accepted)
        for position in range(row.computed, end):
            self.slots[self._slot(row, position)] = b"rejected draft"
        new = [next_token(marks[known + i], self.vocab_size, row.seed) for i in range(accepted + 1)]
        row.tokens += new
        return tuple(new)
