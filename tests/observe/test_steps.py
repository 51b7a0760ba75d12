"""The ring of records: numbers without gaps, bounds on records and bytes, and a base from which the rest follows."""

import msgspec
import pytest
from scheduler_bench import Bench

from minivllm.observe.state import State
from minivllm.observe.steps import PAGE_BYTES, Page, Steps
from minivllm.records import StepRecord


@pytest.fixture(scope="module")
def records() -> list[StepRecord]:
    """Two hundred steps with hits, preemptions, forks and aborts."""
    bench = Bench(num_blocks=20)
    while len(bench.records) < 200:
        n = len(bench.requests)
        bench.add(f"r{n}", (*range(1, 9), *range(n % 90, n % 90 + n % 7 + 1)), max_tokens=20 + n % 17)
        bench.add(f"f{n}", bench.requests[f"r{n}"].prompt_ids, max_tokens=25, fork_of=f"r{n}", sampling={"seed": 1})
        for _ in range(4):
            bench.step()
        if n % 5 == 0:
            bench.engine.abort([f"r{n}"])
    assert any(r.preempted for r in bench.records) and any(r.prefix_hits for r in bench.records)
    return bench.records[:200]


def numbers(page: Page) -> list[int]:
    return [msgspec.json.decode(line)["seq"] for line in page.records]


def filled(records: list[StepRecord], most: int, **more: int) -> Steps:
    steps = Steps(4, most, **more)
    for record in records:
        steps.add(record, 0)
    return steps


def folded(records: list[StepRecord]) -> object:
    state = State(4)
    for record in records:
        state.apply(record)
    return state.snapshot().base()


@pytest.mark.parametrize("most", [1, 7, 16, 64, 199, 1000])
def test_what_is_kept_and_what_was_before_it(records: list[StepRecord], most: int) -> None:
    """At every moment: at least the last records that were asked for, not many more, and the state before the first of them."""
    steps = Steps(4, most)
    for count, record in enumerate(records, start=1):
        steps.add(record, 0)
        page = steps.read(None, 10**6)
        found = numbers(page)
        assert found == list(range(count - len(found), count)) and page.next == count
        assert min(most, count) <= len(found) <= most + max(1, most // 8)
        assert page.base is not None
        if count % 20 == 0:
            assert page.base.base() == folded(records[: count - len(found)])
    now = steps.now()
    assert (now.records, now.next) == ([], 200)
    assert now.base is not None and now.base.base() == folded(records)


def test_a_record_is_the_one_that_came(records: list[StepRecord]) -> None:
    page = filled(records, 1000).read(None, 1000)
    decoded = [msgspec.json.decode(line, type=StepRecord) for line in page.records]
    assert decoded[1:] == records[1:]
    assert decoded[0] == msgspec.structs.replace(records[0], life=0)


def test_readers_go_on_where_they_were(records: list[StepRecord]) -> None:
    steps = filled(records, 64)
    oldest = numbers(steps.read(None, 1))[0]
    at, seen = oldest, []
    while len((page := steps.read(at, 10)).records):
        assert page.base is None and len(page.records) <= 10
        seen += numbers(page)
        at = page.next
    assert seen == list(range(oldest, 200)) and at == 200
    for unknown in (oldest - 1, 0, 201, 10**9):  # dropped, or of another server
        page = steps.read(unknown, 5)
        assert page.base is not None and numbers(page) == list(range(oldest, oldest + 5))


def test_bytes_are_bounded_too(records: list[StepRecord]) -> None:
    sizes = [len(msgspec.json.encode(record)) for record in records]
    most_bytes = sum(sizes) // 4
    steps = filled(records, 10**6, max_bytes=most_bytes)
    kept = steps.read(None, 10**6).records
    assert most_bytes / 2 < sum(map(len, kept)) <= most_bytes * 9 / 8 + max(sizes)


def test_a_page_is_bounded_but_has_something_in_it(records: list[StepRecord]) -> None:
    long = msgspec.structs.replace(records[0], rest_waits="x" * (PAGE_BYTES // 3))
    steps = filled([long] * 5, 100)
    assert numbers(steps.read(None, 100)) == [0, 1]
    assert numbers(steps.read(2, 100)) == [2, 3]
    longer = msgspec.structs.replace(records[0], rest_waits="x" * (PAGE_BYTES + 1))
    assert numbers(filled([longer] * 3, 100).read(None, 100)) == [0]


def test_another_engine_begins_another_life(records: list[StepRecord]) -> None:
    steps = Steps(4, 100)
    told = [steps.add(record, life) for record, life in zip(records, (0, 0, 1, 1, 3, 3), strict=False)]
    assert [record.life for record in told] == [0, None, 1, None, 3, None]
    assert numbers(steps.read(None, 100)) == [0, 1, 2, 3, 4, 5]
    now = steps.now().base
    assert now is not None and now.base() == folded(records[4:6])
    assert told[1] is records[1]


def test_none_are_kept_where_none_are_wanted(records: list[StepRecord]) -> None:
    steps = filled(records, 0)
    assert steps.next == 200 and steps.read(None, 10).records == []
