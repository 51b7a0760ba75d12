"""The fold of records. That it is right in every step of every life is seen in tests/scheduler, where ``RecordWatch`` compares
it with the scheduler; here: what it says of prefixes, snapshots, new lives, and of records that do not add up."""

import msgspec
import pytest
from scheduler_bench import Bench

from minivllm.observe.state import State
from minivllm.records import ArrivalRecord, StepRecord

PROMPT = tuple(range(1, 14))  # three blocks of 4 and one more


def fold(records: list[StepRecord]) -> State:
    state = State(4)
    for record in records:
        state.apply(record)
        state.check(record)
    return state


def test_what_is_in_a_block_and_who_shares_it() -> None:
    bench = Bench()
    bench.add("a", PROMPT, max_tokens=9)
    bench.step()
    bench.add("b", (*PROMPT[:8], 50, 51, 52), max_tokens=9)
    bench.step()
    base = fold(bench.records).snapshot().base()
    a, b = base.requests
    assert (a.id, a.state, a.num_prompt, a.num_computed, a.tokens) == ("a", "running", 13, 14, PROMPT + tuple(bench.text("a")))
    assert a.table[0][:2] == b.table[0][:2] and a.table[0][2] != b.table[0][2]
    assert b.tokens == (*PROMPT[:8], 50, 51, 52, *bench.text("b"))
    held = {(group, block): ids for group, block, ids in base.blocks.held}
    assert [held[0, block] for block in a.table[0]] == [("a", "b"), ("a", "b"), ("a",), ("a",)]
    assert base.blocks.cached == ()
    bench.run()
    state = fold(bench.records)
    assert not state.requests
    cached = {tokens for _, _, tokens in state.snapshot().base().blocks.cached}
    assert {PROMPT[:4], PROMPT[4:8], PROMPT[8:12], (50, 51, 52, bench.text("b")[0])} <= cached


def test_a_fork_knows_what_is_in_its_copied_block() -> None:
    bench = Bench()
    bench.add("a", PROMPT[:10], max_tokens=12)
    bench.step()
    bench.step()
    text = tuple(bench.text("a"))
    bench.add("b", PROMPT[:10], max_tokens=12, prior_output_ids=text, fork_of="a", sampling={"seed": 1})
    bench.step()
    row = next(row for row in bench.records[-1].rows if row.id == "b")
    assert (row.start, row.cached, row.tokens) == (11, 11, text[1:])
    assert fold(bench.records).requests["b"].tokens == [*PROMPT[:10], *text, *bench.text("b")]


@pytest.mark.parametrize("when", [1, 3, 5, 8])
def test_a_snapshot_and_the_records_after_it_are_all_there_is_to_know(when: int) -> None:
    """The snapshot shares lists with the state that goes on, and must not notice."""
    bench = Bench(num_blocks=14)
    for i in range(4):
        bench.add(f"r{i}", (*PROMPT[:4], *range(20 + i, 30 + i)), max_tokens=10)
    bench.run()
    assert any(record.preempted for record in bench.records)
    state = fold(bench.records[:when])
    snapshot, base = state.snapshot(), state.snapshot().base()
    for record in bench.records[when:]:
        state.apply(record)
    assert snapshot.base() == base == fold(bench.records[:when]).snapshot().base()
    assert state.snapshot().base() != base


def test_paused_requests_hold_nothing() -> None:
    bench = Bench()
    bench.add("a", PROMPT)
    bench.step()
    bench.engine.pause(["a"])
    bench.step()
    (a,) = fold(bench.records).snapshot().base().requests
    assert (a.state, a.table, a.num_computed) == ("paused", (), 0)
    bench.engine.resume(["a"])
    bench.engine.pause(["a"])
    bench.engine.resume(["a"])
    bench.step()
    (a,) = fold(bench.records).snapshot().base().requests
    assert (a.state, len(a.table[0])) == ("running", 4)


def test_another_life_begins_anew() -> None:
    bench = Bench()
    bench.add("a", PROMPT)
    bench.step()
    state = fold(bench.records)
    other = Bench()
    other.add("z", PROMPT)
    other.step()
    state.apply(msgspec.structs.replace(other.records[0], life=1))
    assert state.snapshot().base() == fold(other.records).snapshot().base()


def test_an_id_may_come_again_while_its_blocks_are_still_held() -> None:
    """With overlap a request that ended lets go of its blocks in the next record."""
    bench = Bench(overlap=1)
    bench.add("a", PROMPT, max_tokens=20)
    for _ in range(4):
        bench.step()
    bench.engine.abort(["a"])
    bench.add("a", (7, 7, 7), max_tokens=3)
    bench.run()
    assert not fold(bench.records).requests
    assert [f.reason for r in bench.records for f in r.finished] == ["abort", "length"]


def test_records_that_do_not_add_up_are_noticed() -> None:
    bench = Bench()
    bench.add("a", PROMPT)
    bench.run()
    missing = next(i for i, record in enumerate(bench.records) if i and record.rows[0].blocks)
    state = fold(bench.records[:missing])
    state.apply(bench.records[missing + 1])
    with pytest.raises(RuntimeError, match="do not add up after step 5"):
        state.check(bench.records[missing + 1])


def test_without_tokens_tables_are_known_all_the_same() -> None:
    bench = Bench(record_tokens=False)
    bench.add("a", PROMPT)
    bench.run()
    assert all(not row.tokens for record in bench.records for row in record.rows)
    assert all(not record.outputs for record in bench.records)
    cached = fold(bench.records).snapshot().base().blocks.cached
    assert len(cached) == 5 and {tokens for _, _, tokens in cached} == {()}


def test_an_arrival_says_what_came() -> None:
    bench = Bench()
    bench.add("a", PROMPT, 20, prior_output_ids=(5, 6), priority=3, tenant="t", received_s=0.5)
    bench.step()
    arrival = ArrivalRecord("a", 0.0, 13, 20, num_prior=2, priority=3, tenant="t", received_s=0.5)
    assert bench.records[0].arrived == (arrival,)
