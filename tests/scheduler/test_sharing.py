"""Which rows begin with the same blocks: the groups themselves, then what the scheduler's plans say of them."""

import itertools
from collections import deque

import numpy as np
import pytest
from token_runner import TokenRunner, _Pending

from minivllm.kv.allocator import Allocator
from minivllm.scheduler.book import Limits
from minivllm.scheduler.scheduler import Scheduler
from minivllm.scheduler.sharing import MIN_ROWS, MIN_TOKENS, Sharing, _common
from minivllm.types import GenerateRequest, SamplingParams, SharedPrefix, StepPlan

BLOCK = 16
LEAST = MIN_TOKENS // BLOCK  # 16 blocks
HEAD = tuple(range(1000, 1040))  # blocks of a system prompt


def groups(sharing: Sharing) -> list[tuple[tuple[int, ...], int]]:
    return [(s.rows, s.num_blocks) for s in sharing.current()]


def own(row: int, count: int = 3) -> tuple[int, ...]:
    """Blocks that nobody else has."""
    return tuple(range(10_000 + 100 * row, 10_000 + 100 * row + count))


# -- the class alone -----------------------------------------------------------------------------------------------------


def test_rows_of_a_common_beginning_are_told_from_the_fourth_on() -> None:
    sharing = Sharing(BLOCK)
    for row in (5, 2, 7):
        sharing.take(row, HEAD + own(row))
    assert sharing.current() == ()
    sharing.take(0, HEAD + own(0))
    sharing.take(1, own(1, 60))
    assert groups(sharing) == [((0, 2, 5, 7), 40)]
    sharing.leave(5)
    assert sharing.current() == ()
    assert MIN_ROWS == 4


def test_short_runs_are_not_told() -> None:
    for count, told in ((LEAST - 1, []), (LEAST, [((0, 1, 2, 3), LEAST)])):
        sharing = Sharing(BLOCK)
        for row in range(4):
            sharing.take(row, HEAD[:count] + own(row, 20))
        assert groups(sharing) == told
        for row in range(4):
            sharing.leave(row)


@pytest.mark.parametrize(("block_size", "least"), [(1, 256), (16, 16), (24, 11), (256, 1), (512, 1)])
def test_the_least_run_is_rounded_up_to_blocks(block_size: int, least: int) -> None:
    for count in (least - 1, least):
        sharing = Sharing(block_size)
        for row in range(4):
            sharing.take(row, tuple(range(1, count + 1)) + own(row))
        assert bool(sharing.current()) == (count == least)


def test_long_prompts_of_their_own_do_not_hide_what_is_common() -> None:
    """The first row's run is its whole prompt, many times what the others have in common with it."""
    sharing = Sharing(BLOCK)
    for row in range(5):
        sharing.take(row, HEAD[:20] + own(row, 90))
    assert groups(sharing) == [((0, 1, 2, 3, 4), 20)]


def test_a_run_shrinks_only_where_that_saves_reads() -> None:
    sharing = Sharing(BLOCK)
    for row in range(4):
        sharing.take(row, HEAD + own(row))
    sharing.take(4, HEAD[:35])
    assert groups(sharing) == [((0, 1, 2, 3, 4), 35)]
    sharing.take(5, HEAD[:17] + own(5))  # six rows at 17 would save less than five at 35: a group of its own
    assert groups(sharing) == [((0, 1, 2, 3, 4), 35)]
    for row in (6, 7, 8):
        sharing.take(row, HEAD[:17] + own(row))
    assert groups(sharing) == [((0, 1, 2, 3, 4), 35), ((5, 6, 7, 8), 17)]
    sharing.take(10, HEAD[:27] + own(10))  # five times 27 is less than four times 35; it is in line with the other group
    assert groups(sharing) == [((0, 1, 2, 3, 4), 35), ((5, 6, 7, 8, 10), 17)]
    sharing.take(9, HEAD[:28] + own(9))
    assert groups(sharing) == [((0, 1, 2, 3, 4, 9), 28), ((5, 6, 7, 8, 10), 17)]


def test_a_row_joins_where_the_common_run_is_longest() -> None:
    sharing = Sharing(BLOCK)
    for row in range(4):
        sharing.take(row, HEAD + own(row))
    for row in range(4, 8):
        sharing.take(row, HEAD[:17] + own(8, 60) + own(row))
    assert groups(sharing) == [((0, 1, 2, 3), 40), ((4, 5, 6, 7), 77)]
    sharing.take(9, HEAD[:17] + own(8, 60))
    sharing.take(8, HEAD + (1, 2))
    assert groups(sharing) == [((0, 1, 2, 3, 8), 40), ((4, 5, 6, 7, 9), 77)]


def test_equal_blocks_behind_a_different_one_do_not_count() -> None:
    """A row keeps a block of its own where an equal one was findable already, and later blocks of it are found by others."""
    sharing = Sharing(BLOCK)
    for row in range(4):
        sharing.take(row, HEAD)
    sharing.take(4, HEAD[:17] + (7,) + HEAD[18:])
    assert groups(sharing) == [((0, 1, 2, 3), 40)]
    sharing.take(5, HEAD[:30] + (7,) + HEAD[31:])
    assert groups(sharing) == [((0, 1, 2, 3, 5), 30)]


def test_a_run_does_not_grow_until_its_group_is_empty() -> None:
    sharing = Sharing(BLOCK)
    sharing.take(0, HEAD[:30])
    for row in range(1, 6):
        sharing.take(row, HEAD)
    sharing.leave(0)
    assert groups(sharing) == [((1, 2, 3, 4, 5), 30)]
    for row in range(1, 6):
        sharing.leave(row)
    assert sharing.current() == ()
    assert not sharing._by_start
    assert not sharing._group_of
    for row in range(4):
        sharing.take(row, HEAD)
    assert groups(sharing) == [((0, 1, 2, 3), 40)]


def test_the_object_changes_exactly_when_what_it_says_does() -> None:
    sharing = Sharing(BLOCK)
    for row in range(4):
        sharing.take(row, HEAD)
    before = sharing.current()
    assert sharing.current() is before
    sharing.take(4, own(4, 50))
    sharing.take(5, own(5, 1))
    sharing.leave(5)
    sharing.leave(6)  # was never told of
    assert sharing.current() is before
    sharing.leave(3)
    sharing.take(3, HEAD + own(3))  # the same rows of the same blocks
    assert sharing.current() is before
    for row in range(4):
        sharing.leave(row)
    for row in range(4):
        sharing.take(row, own(9, 40))
    after = sharing.current()
    assert after == before
    assert after is not before  # equal to look at, but these are other blocks


def test_a_row_is_not_taken_twice() -> None:
    sharing = Sharing(BLOCK)
    sharing.take(0, HEAD)
    with pytest.raises(ValueError, match="row 0 is taken twice"):
        sharing.take(0, HEAD)


def test_common_runs_are_counted_exactly() -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        known, length, equal = (int(n) for n in rng.integers(0, 40, 3))
        a = tuple(range(1000, 1000 + known + equal + length))
        b = a[: known + equal] + tuple(range(2000, 2000 + int(rng.integers(0, 40))))
        expected = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        assert _common(a, b, known) == _common(b, a, known) == expected


def test_random_lives_keep_every_group_true() -> None:
    rng = np.random.default_rng(1)
    heads = [HEAD[:n] + own(90 + n, 30) for n in (4, 10, 20, 21, 40)] + [own(99, 40)]
    sharing = Sharing(BLOCK, min_rows=2, min_tokens=3 * BLOCK)
    held: dict[int, tuple[int, ...]] = {}
    told = 0
    for _ in range(3000):
        row = int(rng.integers(32))
        if held.pop(row, None) is not None:
            sharing.leave(row)
        else:
            held[row] = heads[rng.integers(len(heads))][: rng.integers(1, 70)] + own(row, int(rng.integers(9)))
            sharing.take(row, held[row])
        entries = sharing.current()
        told += len(entries)
        named = [r for s in entries for r in s.rows]
        assert len(set(named)) == len(named)
        for s in entries:
            assert len(s.rows) >= 2
            assert s.num_blocks >= 3
            assert list(s.rows) == sorted(s.rows)
            (run,) = {held[r][: s.num_blocks] for r in s.rows}
            assert len(run) == s.num_blocks
    assert told > 3000
    for row in held:
        sharing.leave(row)
    assert sharing.current() == ()
    assert not sharing._by_start


# -- through the scheduler -----------------------------------------------------------------------------------------------


class Steps:
    """A scheduler over the token runner, which checks what every plan says of shared blocks against its own tables."""

    def __init__(self, num_blocks: int = 200, caching: bool = True, policy: str = "mixed") -> None:
        self.kv = Allocator((num_blocks,), BLOCK, caching)
        self.scheduler = Scheduler(Limits(8, 2000, 1500, batching_policy=policy), self.kv)
        self.runner = TokenRunner(BLOCK, num_blocks, 8)
        self.flights: deque[tuple[StepPlan, _Pending]] = deque()
        self.now = itertools.count()

    def add(self, name: str, prompt: tuple[int, ...], max_tokens: int = 40, **more: str) -> None:
        sampling = SamplingParams(max_tokens=max_tokens, seed=0, ignore_eos=True)
        self.scheduler.add(GenerateRequest(id=name, prompt_ids=prompt, sampling=sampling, arrival_s=0.0, **more))

    def plan(self) -> StepPlan:
        plan = self.scheduler.schedule(float(next(self.now)))
        assert plan is not None
        self.flights.append((plan, self.runner.launch(plan)))
        self.scheduler.check()
        return plan

    def collect(self) -> None:
        plan, pending = self.flights.popleft()
        self.scheduler.apply(plan, pending.result(), float(next(self.now)))
        self.scheduler.check()

    def step(self) -> tuple[SharedPrefix, ...]:
        plan = self.plan()
        self.collect()
        return plan.shared

    def names(self, shared: tuple[SharedPrefix, ...]) -> list[tuple[set[str], int]]:
        on_row = {r.row: r.spec.id for r in self.scheduler._book.running}
        return [({on_row[row] for row in s.rows}, s.num_blocks) for s in shared]


SYSTEM = tuple(i % 90 for i in range(20 * BLOCK + 5))  # 20 blocks and a begun one


def four_and_another(caching: bool = True, policy: str = "mixed") -> Steps:
    steps = Steps(caching=caching, policy=policy)
    for i in range(4):
        steps.add(f"r{i}", SYSTEM + (i, i))
    steps.add("other", tuple(reversed(SYSTEM)))
    return steps


def test_four_requests_of_a_common_prompt_are_told_and_another_is_not() -> None:
    """All are admitted in one step, which also computes the shared blocks: the first row writes what the others read."""
    steps = four_and_another()
    shared = steps.step()
    assert steps.names(shared) == [({"r0", "r1", "r2", "r3"}, 20)]
    assert steps.step() is shared
    steps.add("late", SYSTEM)
    assert steps.names(steps.step()) == [({"r0", "r1", "r2", "r3", "late"}, 20)]
    steps.scheduler.abort(["late"], 0.0)
    assert steps.names(steps.step()) == [({"r0", "r1", "r2", "r3"}, 20)]


def test_rows_without_work_in_a_step_are_told_all_the_same() -> None:
    steps = four_and_another(policy="separate")
    shared = steps.step()
    steps.add("alone", tuple(range(50)))
    plan = steps.plan()
    assert len(plan.work) == 1
    assert plan.shared is shared
    assert len(shared[0].rows) == 4
    steps.collect()


def test_a_row_that_finishes_is_told_no_more() -> None:
    steps = Steps()
    for i in range(5):
        steps.add(f"r{i}", SYSTEM + (i, i), max_tokens=2 if i == 1 else 30)
    assert steps.names(steps.step()) == [({"r0", "r1", "r2", "r3", "r4"}, 20)]
    steps.step()
    shared = steps.step()
    assert steps.names(shared) == [({"r0", "r2", "r3", "r4"}, 20)]
    while steps.scheduler.has_work:
        steps.step()
    assert steps.scheduler._book.sharing.current() == ()


def test_rows_that_are_aborted_are_told_no_more() -> None:
    steps = four_and_another()
    steps.step()
    steps.scheduler.abort(["r0"], 0.0)  # it wrote the blocks; the others keep them
    assert steps.step() == ()
    steps.add("again", SYSTEM + (7,))
    assert steps.names(steps.step()) == [({"again", "r1", "r2", "r3"}, 20)]


def test_a_plan_in_flight_does_not_hold_a_row_that_ended_before_it() -> None:
    steps = four_and_another()
    steps.plan()
    steps.plan()
    steps.scheduler.abort(["r2"], 0.0)
    plan = steps.plan()
    assert plan.shared == ()
    assert len(plan.freed_rows) == 1
    for _ in range(3):
        steps.collect()


def test_a_preempted_row_is_told_no_more_and_again_when_it_is_back() -> None:
    steps = Steps(num_blocks=1 + 20 + 16)  # the shared blocks, and two for each row; each comes to need three
    for i, max_tokens in enumerate((30, 32, 40, 40, 40, 40)):
        steps.add(str(i), SYSTEM + (i, i), max_tokens)
    told = []
    while steps.scheduler.has_work:
        told.append("".join(sorted(name for names, count in steps.names(steps.plan().shared) for name in names)))
        steps.collect()
    # The last gives way, the first two end, and then the last is back; when three more have ended it is alone.
    assert [names for names, _ in itertools.groupby(told)] == ["012345", "01234", "1234", "2345", ""]


def test_a_failed_step_starts_groups_anew() -> None:
    steps = four_and_another()
    steps.runner.fail_steps.add(1)
    steps.step()
    steps.plan()
    steps.flights.clear()
    steps.scheduler.fail(0.0)
    steps.scheduler.check()
    assert steps.scheduler._book.sharing.current() == ()
    while steps.scheduler._book.trials.group:
        steps.step()
    assert steps.names(steps.step()) == [({"r0", "r1", "r2", "r3"}, 20)]


def test_without_a_prefix_cache_only_forks_share() -> None:
    steps = four_and_another(caching=False)
    assert steps.step() == ()
    for i in range(3):
        steps.add(f"fork{i}", SYSTEM + (0, 0), fork_of="r0")
    assert steps.names(steps.step()) == [({"r0", "fork0", "fork1", "fork2"}, 20)]


def test_salts_keep_groups_apart() -> None:
    steps = Steps()
    for i in range(8):
        steps.add(f"r{i}", SYSTEM + (i, i), cache_salt=f"tenant {i % 2}")
    told = steps.names(steps.step())
    assert told == [({"r0", "r2", "r4", "r6"}, 20), ({"r1", "r3", "r5", "r7"}, 20)]
