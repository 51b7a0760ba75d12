"""Explanations of what the real scheduler did, on a clock that ticks at every look: each second has its cause."""

import itertools
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
from scheduler_bench import VOCAB, Bench

from minivllm.observe.explain import Explanations
from minivllm.observe.explanation import Explanation, Phase, Waiting, uncovered_s
from minivllm.observe.trail import Trail
from minivllm.records import StepRecord

IN_ANY_PHASE = ("engine: between steps", "policy: the steps held")


def fold(records: Sequence[StepRecord], **options: Any) -> Explanations:
    book = Explanations("tiny", **options)
    for record in records:
        book.observe(record)
    return book


def explained(bench: Bench, name: str) -> Explanation:
    found = fold(bench.records).explain(name, float(next(bench.now)))
    assert found is not None
    return found


def reasons(told: Explanation) -> dict[str, Waiting]:
    """The waits in a queue by their code, of which each has one sentence here."""
    found = [w for w in told.waits if not f"{w.reason}: {w.text}".startswith(IN_ANY_PHASE)]
    assert len({w.reason for w in found}) == len(found)
    return {w.reason: w for w in found}


def spent(told: Explanation, *names: str) -> float:
    return sum(p.ended_s - p.began_s for p in told.phases if p.name in names)


def check_phases(told: Explanation) -> None:
    """They are in order, do not overlap, lie inside the request's time, and what they leave is what is unexplained."""
    until_s = 0.0
    for phase in told.phases:
        assert until_s <= phase.began_s <= phase.ended_s <= told.total_s
        until_s = phase.ended_s
    covered_s = sum(p.ended_s - p.began_s for p in told.phases)
    assert told.unexplained_s == pytest.approx(told.total_s - covered_s, abs=1e-5)


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("policy", ["mixed", "prefill-first", "separate"])
@pytest.mark.parametrize("num_blocks", [65, 20])
def test_every_second_of_every_request_has_its_cause(overlap: int, policy: str, num_blocks: int) -> None:
    bench = Bench(num_blocks, overlap, batching_policy=policy, max_model_len=70)
    rng = np.random.default_rng(3)
    head = tuple(range(9))
    for i in range(24):
        bench.add(f"r{i}", head + tuple(int(t) for t in rng.integers(0, VOCAB, rng.integers(1, 30))), max_tokens=1 + i)
        bench.step()
    bench.run()
    book = fold(bench.records)
    assert book.ids == [f"r{i}" for i in range(24)]
    num_preempted = 0
    for i, name in enumerate(book.ids):
        told = book.explain(name, 1e9)
        assert told is not None
        check_phases(told)
        assert told.unexplained_s == 0
        queued_s = sum(w.seconds for w in told.waits if not f"{w.reason}: {w.text}".startswith(IN_ANY_PHASE))
        assert spent(told, "queue", "preempted") == pytest.approx(queued_s)
        ours = [(record, row) for record in bench.records for row in record.rows if row.id == name]
        if overlap and told.steps < len(ours):
            ours.pop()  # planned before its end was known
        others = [len(record.rows) - 1 for record, _ in ours]
        assert (told.steps, told.shared_with.max) == (len(ours), max(others))
        assert told.shared_with.mean == pytest.approx(sum(others) / len(others))
        assert list(told.chunks) == [row.num_tokens for _, row in ours if row.kind == "prefill"]
        (ended,) = [f for record in bench.records for f in record.finished if f.id == name]
        assert (told.output_tokens, told.cached_tokens, told.finish_reason) == (1 + i, ended.num_cached, "length")
        lost = [p for record in bench.records for p in record.preempted if p.id == name]
        assert [(p.reason, p.by, p.lost_tokens) for p in told.preemptions] == [(p.reason, p.by, p.num_computed) for p in lost]
        assert spent(told, "preempted") == pytest.approx(sum(p.away_s or 0 for p in told.preemptions))
        num_preempted += len(lost)
    assert (num_preempted > 0) == (num_blocks == 20)


def test_time_between_steps_and_steps_sat_out_are_told() -> None:
    bench = Bench(batching_policy="separate", max_num_batched_tokens=16)
    bench.add("a", (1, 2, 3), 10)
    bench.step()
    bench.step()
    bench.add("b", tuple(range(40)), 1)
    bench.run()
    told = explained(bench, "a")
    waits = {w.reason: w for w in told.waits if f"{w.reason}: {w.text}".startswith(IN_ANY_PHASE)}
    assert waits["policy"].steps == 3 and waits["policy"].behind == ("b",)  # three chunks
    ours = [r for r in bench.records if any(row.id == "a" for row in r.rows)]
    gaps = {after.step - before.step: 0.0 for before, after in itertools.pairwise(ours)}  # by how many steps lie between
    for before, after in itertools.pairwise(ours):
        gaps[after.step - before.step] += after.scheduled_s - before.collected_s
    assert waits["policy"].seconds == pytest.approx(gaps[4]) and waits["engine"].seconds == pytest.approx(gaps[1])
    assert set(gaps) == {1, 4}


# ---------------------------------------------------------------------------------------------------------- planted causes


def test_the_limit_of_sequences_is_named_and_who_runs() -> None:
    bench = Bench(max_num_seqs=2)
    bench.add("a", (1, 2), 12)
    bench.add("b", (3, 4), 12)
    bench.step()
    bench.add("late", (5, 6), 2)
    bench.run()
    told = explained(bench, "late")
    wait = reasons(told)["rows"]
    assert set(wait.behind) == {"a", "b"} and wait.steps == 11
    assert wait.seconds == pytest.approx(spent(told, "queue") - reasons(told)["engine"].seconds)
    assert set(reasons(told)) == {"rows", "engine"}


def test_hundreds_who_are_not_named_have_their_cause_too() -> None:
    bench = Bench(max_num_seqs=1)
    for i in range(200):
        bench.add(f"r{i}", (i % VOCAB, 1), 1)
    bench.run()
    book = fold(bench.records)
    for i in range(1, 200):
        told = book.explain(f"r{i}", 1e9)
        assert told is not None
        wait = reasons(told)["rows"]
        assert wait.steps == i and spent(told, "queue") == pytest.approx(wait.seconds + reasons(told)["engine"].seconds)
        assert wait.behind[0] == "r0" and f"r{i - 1}" in (*wait.behind, f"r{i - 1}" if i > 8 else "")
        assert len(wait.behind) <= 8 and f"r{i}" not in wait.behind


def test_too_few_blocks_are_named_and_who_holds_them() -> None:
    bench = Bench(num_blocks=17, max_model_len=64)  # 64 tokens
    bench.add("holder", tuple(range(20)), 20)
    bench.step()
    bench.add("big", tuple(range(50, 90)), 8)
    bench.run()
    wait = reasons(explained(bench, "big"))["blocks"]
    assert wait.behind == ("holder",) and wait.steps > 10
    assert explained(bench, "holder").waits[0].reason == "engine"


def test_a_taken_budget_is_named_and_whose_prompt_took_it() -> None:
    bench = Bench(max_num_batched_tokens=16)
    bench.add("long", tuple(range(90)), 4)
    bench.add("short", (1, 2, 3), 2)
    bench.run()
    told = explained(bench, "short")
    wait = reasons(told)["budget"]
    assert wait.behind == ("long",) and wait.steps == 5
    assert explained(bench, "long").chunks == (16, 16, 16, 16, 16, 10)


def test_priority_is_named_and_who_was_let_ahead() -> None:
    bench = Bench(max_num_seqs=1, scheduling_policy="priority")
    bench.add("first", (9, 9), 3, priority=0)
    bench.step()
    bench.add("low", (1, 2), 2, priority=5)
    bench.add("high", (3, 4), 6, priority=1)
    bench.run()
    told = reasons(explained(bench, "low"))
    assert told["priority"].behind == ("high",) and told["priority"].steps == 6
    assert told["rows"].behind == ("first",)
    assert set(reasons(explained(bench, "high"))) == {"rows", "engine"}


def test_what_is_not_looked_at_waits_behind_those_who_are() -> None:
    bench = Bench(num_blocks=17, max_model_len=64)
    bench.add("holder", tuple(range(20)), 20)
    bench.step()
    for i in range(12):
        bench.add(f"big{i}", tuple(range(50, 90)), 2)
    bench.run()
    wait = next(w for w in explained(bench, "big11").waits if w.text == "several requests ahead do not fit")
    assert wait.reason == "blocks" and "big0" in wait.behind and "big11" not in wait.behind


# ------------------------------------------------------------------------------------------------------- what else happens


def test_a_preemption_says_by_whom_what_was_lost_and_for_how_long() -> None:
    bench = Bench(num_blocks=13, max_model_len=40, scheduling_policy="priority", max_num_seqs=2)
    bench.add("low", tuple(range(8)), 25, priority=5)
    bench.step()
    bench.add("high", tuple(range(16, 24)), 30, priority=0)
    bench.run()
    told = explained(bench, "low")
    (lost,) = told.preemptions
    assert (lost.reason, lost.by) == ("blocks", "high") and lost.lost_tokens > 8
    assert lost.away_s == pytest.approx(spent(told, "preempted")) and lost.away_s > 10
    assert [p.name for p in told.phases] == ["queue", "prefill", "decode", "preempted", "prefill", "decode"]
    assert told.phases[3].began_s == lost.at_s
    assert {"priority", "blocks"} & reasons(told).keys()


def test_cached_tokens_are_those_of_the_first_run() -> None:
    bench = Bench()
    bench.add("a", tuple(range(17)), 2)
    bench.run()
    bench.add("b", (*range(17), 50), 2)
    bench.run()
    assert explained(bench, "a").cached_tokens == 0
    told = explained(bench, "b")
    assert (told.prompt_tokens, told.cached_tokens, told.chunks) == (18, 16, (2,))


def test_texts_of_one_prompt_are_told_together_and_each() -> None:
    bench = Bench()
    bench.add("a", tuple(range(17)), 4)
    for i in (1, 2):
        bench.add(f"a-{i}", tuple(range(17)), 4 + 4 * i, fork_of="a", sample_index=i, sampling={"seed": i})
    bench.run()
    book = fold(bench.records)
    assert book.ids == ["a"]
    told = book.explain("a", 1e9)
    assert told is not None
    assert [(s.id, s.output_tokens) for s in told.sequences] == [("a", 4), ("a-1", 8), ("a-2", 12)]
    assert (told.id, told.prompt_tokens, told.output_tokens) == ("a", 17, 24)
    assert told.phases == told.sequences[2].phases  # the last to end
    assert all(s.sequences == () and s.phases[-1].name == "decode" for s in told.sequences)
    assert book.explain("a-1", 1e9) == told.sequences[1]


def test_a_failed_step_takes_the_place_and_says_so() -> None:
    bench = Bench()
    bench.runner.fail_steps.add(3)
    bench.add("a", (1, 2, 3), 8)
    bench.run()
    told = explained(bench, "a")
    assert [p.reason for p in told.preemptions] == ["failed step"]
    assert [p.name for p in told.phases] == ["queue", "prefill", "decode", "preempted", "prefill", "decode"]
    check_phases(told)


@pytest.mark.parametrize("overlap", [0, 1])
def test_a_pause_is_a_phase(overlap: int) -> None:
    bench = Bench(overlap=overlap)
    bench.add("a", (1, 2, 3), 8)
    bench.add("b", (4, 5, 6), 20)
    for _ in range(4):
        bench.step()
    bench.engine.pause(["a"])
    for _ in range(4):
        bench.step()
    bench.engine.resume(["a"])
    bench.run()
    told = explained(bench, "a")
    check_phases(told)
    again = ["queue"] if overlap else []  # without, the step is planned at the moment that is known of
    assert [p.name for p in told.phases] == ["queue", "prefill", "decode", "paused", *again, "prefill", "decode"]
    assert spent(told, "paused") > 4 and told.preemptions == ()
    assert not any(p.name == "paused" for p in explained(bench, "b").phases)


def test_a_request_that_runs_is_explained_up_to_now() -> None:
    bench = Bench(max_num_seqs=1)
    bench.add("a", (1, 2, 3), 8)
    bench.add("b", (1, 2, 3), 8)
    for _ in range(3):
        bench.step()
    book = fold(bench.records)
    now_s = bench.records[-1].collected_s + 5
    a, b = book.explain("a", now_s), book.explain("b", now_s)
    assert a is not None and b is not None
    assert (a.finish_reason, a.output_tokens, [p.name for p in a.phases]) == (None, 3, ["queue", "prefill", "decode"])
    assert [p.name for p in b.phases] == ["queue"] and reasons(b)["rows"].behind == ("a",)
    for told in (a, b):
        check_phases(told)
        assert told.unexplained_s == 0 and told.total_s == now_s - bench.requests[told.id].arrival_s
    assert reasons(b)["rows"].seconds == pytest.approx(b.total_s - reasons(b)["engine"].seconds)
    assert book.explain("a", now_s) == a  # asking changes nothing
    bench.run()
    assert [f.id for r in bench.records for f in r.finished] == ["a", "b"]


def test_another_engine_is_a_phase_of_its_own() -> None:
    first, second = Bench(), Bench()
    first.add("a", (1, 2, 3), 20)
    for _ in range(4):
        first.step()
    died_s = first.records[-1].collected_s
    for _ in range(50):
        next(second.now)
    second.add("a", (1, 2, 3), 20, prior_output_ids=tuple(first.text("a")))
    second.run()
    born = msgspec.structs.replace(second.records[0], life=1)
    book = fold([*first.records, born, *second.records[1:]])
    told = book.explain("a", 1e9)
    assert told is not None
    assert [p.name for p in told.phases] == ["queue", "prefill", "decode", "restart", "prefill", "decode"]
    restart = told.phases[3]
    arrival_s = first.requests["a"].arrival_s
    assert restart == Phase("restart", died_s - arrival_s, born.scheduled_s - arrival_s)
    assert told.output_tokens == 20 and told.preemptions == ()
    assert (len(told.chunks), told.steps) == (2, 4 + len(second.records))


# -------------------------------------------------------------------------------------------------------------- the book


def test_only_so_many_that_ended_are_remembered() -> None:
    bench = Bench()
    for i in range(30):
        bench.add(f"r{i}", (i,), 1)
    bench.run()
    bench.add("runs", (1,), 9)
    bench.step()
    book = fold(bench.records, capacity=10)
    assert book.ids == [*(f"r{i}" for i in range(20, 30)), "runs"]
    assert book.explain("r19", 1e9) is None and book.explain("r20", 1e9) is not None
    assert len(book._of_text) == 11 and len(book._live) == 1


def test_requests_that_no_face_opened_are_passed_over_by_a_server() -> None:
    bench = Bench()
    bench.add("probe", (1,), 3)
    bench.run()
    assert fold(bench.records, opened_only=True).ids == []


def test_a_text_that_its_face_ends_is_over_whatever_the_engine_does_with_it() -> None:
    bench = Bench()
    bench.add("a", (1, 2, 3), 20)
    for _ in range(5):
        bench.step()
    trail = Trail(bench.requests["a"].arrival_s - 2, "ann")
    trail.received(bench.requests["a"].arrival_s - 1)
    book = Explanations("tiny", opened_only=True)
    book.open("reply-a", [bench.requests["a"]], trail)
    for record in bench.records:
        book.observe(record)
    book.end("a", "stop", 4, bench.records[-1].collected_s + 1)
    bench.run()
    for record in bench.records[5:]:
        book.observe(record)
    trail.delivered(bench.records[4].collected_s + 3)
    told = book.explain("reply-a", 1e9, "ann")
    assert told is not None
    assert (told.finish_reason, told.output_tokens, told.steps) == ("stop", 4, 5)
    assert [p.name for p in told.phases] == ["received", "queue", "prefill", "decode", "deliver"]
    check_phases(told)
    assert told.unexplained_s == 1.0  # between what was received and the queue, nobody stamped anything
    assert spent(told, "deliver") == 3
    assert book.explain("reply-a", 1e9, "bob") is None and book.explain("reply-a", 1e9, "") is None


def test_a_tenant_is_not_told_who_else_there_is() -> None:
    bench = Bench(max_num_seqs=1)
    bench.add("a", (1, 2), 5)
    bench.add("b", (3, 4), 5)
    bench.add("c", (3, 4), 5)
    bench.run()
    book = Explanations("tiny", opened_only=True)
    for name, tenant in (("a", "ann"), ("b", "bob"), ("c", "bob")):
        book.open(name, [bench.requests[name]], Trail(0.0, tenant))
    for record in bench.records:
        book.observe(record)
    told = book.explain("c", 1e9, "bob")
    assert told is not None
    assert reasons(told)["rows"].behind == ("another key's request", "b")


def test_what_no_phase_covers_is_found_whatever_the_order() -> None:
    spans = (Phase("b", 2.0, 4.0), Phase("a", 1.0, 3.0), Phase("c", 6.0, 9.0))
    assert uncovered_s(8.0, spans) == pytest.approx(1 + 2)
    assert uncovered_s(3.0, ()) == 3.0
