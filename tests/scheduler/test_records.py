"""What a step's record says of those who wait, who came, who gave way and why. That its blocks are right is seen in every test
that has a ``Bench``."""

import pytest
from scheduler_bench import Bench

from minivllm.records import WAIT_CODES, PreemptionRecord, StepRecord


def prompt(first: int, length: int) -> tuple[int, ...]:
    return tuple(range(first, first + length))


def codes(record: StepRecord) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Code and ``behind`` for each request that is named, "" for the rest."""
    found = {wait.id: (wait.reason.partition(":")[0], wait.behind) for wait in record.waits}
    assert {code for code, _ in found.values()} <= set(WAIT_CODES)
    return {**found, "": (record.rest_waits.partition(":")[0], record.rest_behind)}


def test_rows_are_what_is_missing() -> None:
    bench = Bench(max_num_seqs=2)
    for i in range(4):
        bench.add(f"r{i}", prompt(10 * i, 5))
    bench.step()
    assert codes(bench.records[0]) == {"r2": ("rows", ()), "": ("rows", ())}
    assert [a.id for a in bench.records[0].arrived] == ["r0", "r1", "r2", "r3"]


def test_the_budget_is_what_is_missing() -> None:
    bench = Bench(max_num_batched_tokens=16)
    for i in range(3):
        bench.add(f"r{i}", prompt(20 * i, 15))
    bench.step()
    assert [(row.id, row.num_tokens) for row in bench.records[0].rows] == [("r0", 15), ("r1", 1)]
    assert codes(bench.records[0]) == {"r2": ("budget", ()), "": ("budget", ())}


def test_blocks_are_what_is_missing() -> None:
    bench = Bench(num_blocks=9)
    bench.add("long", prompt(0, 20), max_tokens=4)
    bench.add("other", prompt(40, 20), max_tokens=4)
    bench.add("short", prompt(80, 2), max_tokens=4)
    bench.step()
    assert [row.id for row in bench.records[0].rows] == ["long", "short"]
    assert codes(bench.records[0]) == {"other": ("blocks", ()), "": ("", ())}


def test_one_that_was_overtaken_often_enough_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minivllm.scheduler.planner.MAX_OVERTAKEN", 1)
    bench = Bench(num_blocks=11)
    bench.add("first", prompt(0, 20), max_tokens=8)
    bench.add("large", prompt(40, 20), max_tokens=8)
    bench.add("small", prompt(80, 2), max_tokens=8)
    bench.add("late", prompt(90, 2), max_tokens=8)
    bench.step()
    assert [row.id for row in bench.records[0].rows] == ["first", "small", "late"]
    assert codes(bench.records[0]) == {"large": ("blocks", ()), "": ("", ())}
    bench.add("later", prompt(95, 2), max_tokens=8)
    bench.step()
    assert codes(bench.records[1]) == {"large": ("blocks", ()), "": ("order", ("large",))}


def test_those_that_do_not_fit_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minivllm.scheduler.planner.MAX_LOOKS", 2)
    bench = Bench(num_blocks=9)
    for i in range(4):
        bench.add(f"r{i}", prompt(25 * i, 20), max_tokens=4)
    bench.step()
    assert codes(bench.records[0]) == {"r1": ("blocks", ()), "r2": ("blocks", ()), "": ("blocks", ("r1", "r2"))}


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_who_was_let_ahead_is_named(policy: str) -> None:
    bench = Bench(max_num_seqs=2, scheduling_policy=policy)
    bench.add("running", prompt(0, 5), max_tokens=12, priority=9)
    bench.step()
    bench.add("low", prompt(10, 5), max_tokens=3, priority=5)
    bench.add("high", prompt(20, 5), max_tokens=6, priority=1)
    bench.step()
    by_priority = policy == "priority"
    assert codes(bench.records[1]) == {
        "low" if by_priority else "high": ("priority", ("high",)) if by_priority else ("rows", ()), "": ("rows", ()),
    }  # fmt: skip


def test_an_equal_priority_is_no_reason() -> None:
    bench = Bench(max_num_seqs=1, scheduling_policy="priority")
    bench.add("a", prompt(0, 5), priority=1)
    bench.add("b", prompt(10, 5), priority=1)
    bench.step()
    assert codes(bench.records[0])["b"] == ("rows", ())


def test_who_gives_way_to_whom() -> None:
    bench = Bench(num_blocks=8)
    bench.add("a", prompt(0, 10), max_tokens=12)
    bench.add("b", prompt(20, 10), max_tokens=12)
    bench.run()
    first = next(record for record in bench.records if record.preempted)
    (gone,) = first.preempted
    assert (gone.id, gone.reason, gone.by) == ("b", "blocks", "a")
    assert "b" in first.released and "b" not in {row.id for row in first.rows}
    rows = [row for record in bench.records for row in record.rows if row.id == "b"]
    known = max(row.start + row.num_tokens for record in bench.records[: bench.records.index(first)] for row in record.rows
                if row.id == "b")  # fmt: skip
    assert gone.num_computed == known
    again = rows[[row.kind for row in rows].index("prefill", 1)]
    assert again.start == again.cached <= gone.num_computed, "what it wrote may be found again"
    assert len(again.blocks[0]) >= 3, "its whole table"


def test_a_failed_step_says_so() -> None:
    bench = Bench()
    bench.add("a", prompt(0, 10))
    bench.add("b", prompt(20, 10))
    bench.runner.fail_steps.add(2)
    bench.run()
    assert [p for record in bench.records for p in record.preempted][:2] == [
        PreemptionRecord("a", "failed step", None, 11), PreemptionRecord("b", "failed step", None, 11),
    ]  # fmt: skip
    assert bench.records[2].step == -1 and set(bench.records[2].released) == {"a", "b"}
    on_trial = [codes(record) for record in bench.records if codes(record)[""][0] == "trial"]
    assert on_trial, "one of them waited for the other's trial"


def test_a_fork_names_its_parent() -> None:
    bench = Bench()
    bench.add("a", prompt(0, 10))
    bench.add("b", prompt(0, 10), fork_of="a", sampling={"seed": 1})
    bench.step()
    assert [(a.id, a.parent) for a in bench.records[0].arrived] == [("a", None), ("b", "a")]
    assert bench.records[0].rows[1].cached == 8, "what the first has published in this very step"


def test_pauses_are_told() -> None:
    bench = Bench()
    bench.add("a", prompt(0, 10))
    bench.step()
    bench.engine.pause(["a"])
    bench.step()
    assert (bench.records[-1].paused, bench.records[-1].released) == (("a",), ("a",))
    bench.engine.resume(["a"])
    bench.step()
    assert bench.records[-1].resumed == ("a",)


def test_with_overlap_a_record_says_what_was_before_the_next_step() -> None:
    """The next step is planned by the time that a record comes; what it was given is in its own record."""
    bench = Bench(overlap=1)
    bench.add("a", prompt(0, 4), max_tokens=9)
    bench.run()
    gained = [(record.step, len(row.blocks[0])) for record in bench.records for row in record.rows if row.blocks]
    assert gained == [(0, 1), (1, 1), (5, 1)]
    assert [record.blocks_referenced for record in bench.records] == [1, 2, 2, 2, 2, 3, 3, 3, 0]
