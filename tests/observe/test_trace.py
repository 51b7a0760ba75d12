"""Traces of what the real scheduler did: by the rules of the format, and with everything that the records say."""

from typing import Any

import msgspec
import numpy as np
import pytest
from chrome_trace import Trace
from scheduler_bench import VOCAB, Bench

from minivllm.observe.explain import Explanations
from minivllm.observe.trace import ENGINE, REQUESTS, trace_events
from minivllm.records import StepRecord


def busy(overlap: int, num_requests: int = 20) -> Bench:
    """Requests that wait, are preempted, share prompts and are cut into chunks."""
    bench = Bench(20, overlap, max_model_len=70, max_num_batched_tokens=24)
    rng = np.random.default_rng(5)
    for i in range(num_requests):
        prompt = tuple(range(9)) + tuple(int(t) for t in rng.integers(0, VOCAB, rng.integers(1, 30)))
        bench.add(f"r{i}", prompt, max_tokens=1 + i)
        bench.step()
    bench.run()
    return bench


def drawn(records: list[StepRecord]) -> Trace:
    """As a file has it."""
    events = msgspec.json.decode(msgspec.json.encode(list(trace_events(records, "tiny"))))
    return Trace({"traceEvents": events, "displayTimeUnit": "ms"})


def named(trace: Trace, pid: int, name: str) -> list[dict[str, Any]]:
    (tid,) = [tid for (p, tid), found in trace.names.items() if (p, found) == (pid, name)]
    return trace.slices[pid, tid]


@pytest.mark.parametrize("overlap", [0, 1])
def test_every_step_and_every_request_is_there(overlap: int) -> None:
    bench = busy(overlap)
    zero_s = min(r.arrival_s for r in bench.requests.values())
    trace = drawn(bench.records)
    steps = [r for r in bench.records if r.step >= 0]
    lanes = [tid for pid, tid in trace.slices if pid == ENGINE]
    assert len(lanes) == 1 + overlap
    slices = sorted((e for lane in lanes for e in trace.slices[ENGINE, lane] if "args" in e), key=lambda e: e["args"]["step"])
    assert [e["args"]["step"] for e in slices] == [r.step for r in steps]
    for event, record in zip(slices, steps, strict=True):
        assert event["ts"] == round((record.scheduled_s - zero_s) * 1e6)
        assert event["ts"] + event["dur"] == round((record.collected_s - zero_s) * 1e6)
        assert event["args"]["tokens"] == sum(row.num_tokens for row in record.rows)
        assert event["args"].get("waiting for", "") == record.rest_waits
    for part in ("plan", "device", "collect"):
        assert sum(e["name"] == part for lane in lanes for e in trace.slices[ENGINE, lane]) == len(steps)

    book = Explanations("tiny", capacity=10**6)
    for record in bench.records:
        book.observe(record)
    for name in bench.requests:
        track = named(trace, REQUESTS, name)
        told = book.explain(name, 1e9)
        assert told is not None
        (whole,) = [e for e in track if e["name"] == "request"]
        assert whole["args"]["output_tokens"] == told.output_tokens and whole["args"]["finish_reason"] == "length"
        phases = sorted((e for e in track if "args" not in e), key=lambda e: e["ts"])
        arrival_us = round((bench.requests[name].arrival_s - zero_s) * 1e6)
        wanted = [(p.name, round(p.began_s * 1e6) + arrival_us, round(p.ended_s * 1e6) + arrival_us) for p in told.phases]
        assert [(e["name"], e["ts"], e["ts"] + e["dur"]) for e in phases] == wanted
        assert sum("step" in e.get("args", {}) for e in track) == told.steps
    marks = [e for e in trace.events if e["ph"] == "i"]
    assert len(marks) == sum(len(r.preempted) for r in bench.records) > 0
    assert marks[0]["args"]["reason"] == "blocks"


@pytest.mark.parametrize("overlap", [0, 1])
def test_arrows_lead_from_arrivals_to_steps(overlap: int) -> None:
    bench = busy(overlap)
    zero_s = min(r.arrival_s for r in bench.requests.values())
    trace = drawn(bench.records)
    assert len(trace.flows) == len(bench.requests)
    for name, request in bench.requests.items():
        (number,) = [tid for (pid, tid), found in trace.names.items() if (pid, found) == (REQUESTS, name)]
        begin, *steps, end = trace.flows[number]
        assert (begin["pid"], begin["tid"], begin["ts"]) == (REQUESTS, number, round((request.arrival_s - zero_s) * 1e6))
        prefills = [r.scheduled_s for r in bench.records for row in r.rows if row.id == name and row.kind == "prefill"]
        assert [e["ts"] for e in steps] == [round((at_s - zero_s) * 1e6) for at_s in prefills]
        (last_s,) = [r.scheduled_s for r in bench.records if any(f.id == name for f in r.finished)]
        assert end["ts"] == round((last_s - zero_s) * 1e6) and end["pid"] == ENGINE


def test_counters_are_those_of_the_records() -> None:
    bench = busy(0, 12)
    trace = drawn(bench.records)
    counted: dict[str, list[dict[str, int]]] = {}
    for event in trace.events:
        if event["ph"] == "C":
            counted.setdefault(event["name"], []).append(event["args"])
    assert [(c["held"], c["cached"], c["free"]) for c in counted["KV blocks"]] == [
        (r.blocks_referenced, r.blocks_cached, r.blocks_free) for r in bench.records
    ]
    states = [(c["running"], c["waiting"]) for c in counted["requests"]]
    assert states == [(r.num_running, r.num_waiting) for r in bench.records]
    assert [c["prefill"] + c["decode"] for c in counted["batch tokens"]] == [
        sum(row.num_tokens for row in r.rows) for r in bench.records
    ]


def test_a_recording_that_stops_in_the_middle_and_one_of_nothing() -> None:
    bench = busy(1)
    for count in (0, 1, 5, len(bench.records) // 2):
        trace = drawn(bench.records[:count])
        assert {e["pid"] for e in trace.events if e["ph"] == "M"} == {ENGINE, REQUESTS}
        assert sum(e["name"] == "plan" for e in trace.events) == count
    reborn = msgspec.structs.replace(bench.records[0], life=1)
    assert [e["name"] for e in drawn([reborn]).events if e["ph"] == "i"] == ["engine restarted"]


@pytest.mark.parametrize(
    "event",
    [
        {"name": "a", "ph": "X", "pid": 1, "tid": 1, "ts": 0},
        {"name": "a", "ph": "X", "pid": 1, "tid": 1, "ts": -1, "dur": 1},
        {"name": "a", "ph": "X", "pid": 1, "tid": 1, "ts": 5, "dur": 10},
        {"name": "a", "ph": "C", "pid": 1, "tid": 1, "ts": 5, "args": {"x": "1"}},
        {"name": "a", "ph": "s", "pid": 1, "tid": 1, "ts": 5, "id": 1, "cat": "c"},
        {"name": "a", "ph": "Q", "pid": 1, "tid": 1, "ts": 5},
    ],
)
def test_the_checker_sees_what_is_wrong(event: dict[str, Any]) -> None:
    right = {"name": "b", "ph": "X", "pid": 1, "tid": 1, "ts": 0, "dur": 10}
    Trace({"traceEvents": [right]})
    with pytest.raises((AssertionError, KeyError)):
        Trace({"traceEvents": [right, event]})
