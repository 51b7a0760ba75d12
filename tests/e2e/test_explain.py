"""Explanations by the real server: planted causes are the ones named, and stamps of two processes fit together."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from chrome_trace import Trace
from live_server import LiveServer, command, serve

LONG = "The little bear went into the wood to look for honey. "
CHAT = [{"role": "user", "content": "Tell me a story."}]


def ask(live: LiveServer, path: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    """A whole reply that explains itself."""
    body = {"temperature": 0, "ignore_eos": True, "explain": True, **body}
    reply = httpx.post(live.url + path, json=body, timeout=90)
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


@contextmanager
def running(live: LiveServer, **body: Any) -> Iterator[str]:
    """A request that runs meanwhile: its id, once its first token is there."""
    body = {"prompt": "Once", "temperature": 0, "ignore_eos": True, "stream": True, **body}
    with httpx.stream("POST", live.url + "/v1/completions", json=body, timeout=90) as stream:
        lines = stream.iter_lines()
        yield json.loads(next(lines).removeprefix("data: "))["id"]


def check(told: dict[str, Any]) -> None:
    """Phases are in order, lie inside the request's time, and what they leave out is what is unexplained."""
    until_s = 0.0
    for phase in told["phases"]:
        assert until_s <= phase["began_s"] <= phase["ended_s"] <= told["total_s"]
        until_s = phase["ended_s"]
    covered_s = sum(p["ended_s"] - p["began_s"] for p in told["phases"])
    assert told["unexplained_s"] == pytest.approx(told["total_s"] - covered_s, abs=1e-4)
    for text in told["sequences"]:
        check(text)


def names(told: dict[str, Any]) -> list[str]:
    return [phase["name"] for phase in told["phases"]]


def waits(told: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {wait["reason"]: wait for wait in told["waits"] if wait["reason"] != "engine"}


@pytest.fixture(scope="module")
def narrow() -> Iterator[LiveServer]:
    """One row, by priority."""
    with serve("--max-num-seqs", "1", "--scheduling-policy", "priority") as live:
        yield live


@pytest.fixture(scope="module")
def small() -> Iterator[LiveServer]:
    """A small cache and small steps."""
    with serve("--num-gpu-blocks-override", "40", "--max-num-batched-tokens", "32", "--max-num-seqs", "8") as live:
        yield live


def test_a_reply_says_where_its_time_went(narrow: LiveServer) -> None:
    reply = ask(narrow, "/v1/chat/completions", messages=CHAT, max_tokens=8)
    told, usage = reply["explain"], reply["usage"]
    check(told)
    assert names(told) == ["received", "tokenize", "admit", "queue", "prefill", "decode", "deliver"]
    assert told["id"] == reply["id"] and told["model"] == reply["model"] and told["finish_reason"] == "length"
    assert (told["prompt_tokens"], told["output_tokens"]) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert told["chunks"] == [usage["prompt_tokens"]] and told["steps"] == 8 and told["shared_with"] == {"mean": 0.0, "max": 0}
    later = httpx.get(f"{narrow.url}/requests/{reply['id']}").json()
    check(later)
    assert later["phases"][:-1] == told["phases"][:-1]
    assert later["total_s"] > told["total_s"]  # the reply was not delivered when it was written
    again = ask(narrow, "/v1/chat/completions", messages=CHAT, max_tokens=8)["explain"]
    assert 0 < again["cached_tokens"] < again["prompt_tokens"]


def test_a_stream_says_it_in_its_last_chunk(narrow: LiveServer) -> None:
    for path, body in (("/v1/completions", {"prompt": "Once"}), ("/v1/chat/completions", {"messages": CHAT})):
        for options in ({}, {"stream_options": {"include_usage": True}}):
            asked = {**body, **options, "stream": True, "explain": True, "max_tokens": 6}
            with httpx.stream("POST", narrow.url + path, json=asked, timeout=60) as stream:
                events = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
            assert events[-1] == "[DONE]"
            chunks = [json.loads(event) for event in events[:-1]]
            assert [("explain" in chunk, "usage" in chunk) for chunk in chunks[:-1]] == [(False, False)] * (len(chunks) - 1)
            last = chunks[-1]
            assert last["choices"] == [] and ("usage" in last) == bool(options)
            check(last["explain"])
            assert 0 < last["explain"]["first_text_s"] <= last["explain"]["total_s"]


def test_a_stop_string_ends_the_text_where_its_reader_saw_it_end(narrow: LiveServer) -> None:
    text = ask(narrow, prompt="Once upon a time", max_tokens=30)["choices"][0]["text"]
    reply = ask(narrow, prompt="Once upon a time", max_tokens=200, stop=[text[20:26]])
    told = reply["explain"]
    check(told)
    assert told["finish_reason"] == "stop" and told["output_tokens"] == reply["usage"]["completion_tokens"] < 30


def test_the_limit_of_sequences_and_the_priority_are_named_and_behind_whom(narrow: LiveServer) -> None:
    with running(narrow, max_tokens=300) as first, ThreadPoolExecutor(2) as pool:
        low = pool.submit(ask, narrow, prompt="A low one", max_tokens=4, priority=5)
        time.sleep(0.1)
        high = pool.submit(ask, narrow, prompt="A high one", max_tokens=60, priority=1)
        told_low, told_high = low.result()["explain"], high.result()["explain"]
    for told in (told_low, told_high):
        check(told)
        assert waits(told)["rows"]["behind"][0] == f"{first}-0"
        assert waits(told)["rows"]["seconds"] > 0.05
    assert set(waits(told_high)) == {"rows"}
    assert waits(told_low)["priority"]["behind"] == [f"{told_high['id']}-0"]
    assert told_low["waits"][0]["reason"] in ("rows", "priority")


def test_one_that_runs_can_be_asked_about_and_one_whose_client_left(narrow: LiveServer) -> None:
    with ThreadPoolExecutor(1) as pool:
        with running(narrow, max_tokens=400) as first:
            told = httpx.get(f"{narrow.url}/requests/{first}").json()
            assert told["finish_reason"] is None and names(told)[-1] == "decode" and told["output_tokens"] >= 1
            check(told)
            asked = pool.submit(ask, narrow, prompt="B", max_tokens=2)
            while not narrow.metrics()["waiting_requests"]:
                time.sleep(0.01)
        behind = asked.result()["explain"]
    gone = httpx.get(f"{narrow.url}/requests/{first}").json()
    check(gone)
    assert gone["finish_reason"] == "abort" and gone["output_tokens"] < 400
    assert waits(behind)["rows"]["behind"] == [f"{first}-0"]


def test_too_few_blocks_are_named_and_who_holds_them(small: LiveServer) -> None:
    with running(small, prompt=LONG * 20, max_tokens=200) as holder:
        told = ask(small, prompt="Another " * 300, max_tokens=2)["explain"]
    check(told)
    assert waits(told)["blocks"]["behind"] == [f"{holder}-0"] and waits(told)["blocks"]["seconds"] > 0.01


def test_a_taken_budget_is_named_and_whose_prompt_took_it(small: LiveServer) -> None:
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, small, prompt=f"{i} " + "word " * 60, max_tokens=2) for i in range(8)]
        told = [one.result()["explain"] for one in asked]
    held_up = [one for one in told if "budget" in waits(one)]
    assert held_up
    every = {f"{one['id']}-0" for one in told}
    for one in held_up:
        check(one)
        assert set(waits(one)["budget"]["behind"]) <= every - {f"{one['id']}-0"} and waits(one)["budget"]["behind"]
    assert all(len(one["chunks"]) > 1 and max(one["chunks"]) <= 32 for one in told)


def test_a_preemption_is_told_with_who_took_the_blocks(small: LiveServer) -> None:
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, small, prompt=f"Story {i}. " + LONG, max_tokens=150) for i in range(8)]
        told = [one.result()["explain"] for one in asked]
    for one in told:
        check(one)
        assert one["output_tokens"] == 150
    victims = [one for one in told if one["preemptions"]]
    assert victims
    every = {f"{one['id']}-0" for one in told}
    for one in victims:
        assert names(one).count("preempted") == len(one["preemptions"]) < names(one).count("prefill")
        for lost in one["preemptions"]:
            assert lost["reason"] == "blocks" and lost["by"] in every and lost["lost_tokens"] > 0 and lost["away_s"] >= 0


def test_several_texts_are_told_together_and_each(small: LiveServer) -> None:
    reply = ask(small, prompt=["Once upon a time", "The"], n=2, max_tokens=5, temperature=1)
    told = reply["explain"]
    check(told)
    assert [s["id"] for s in told["sequences"]] == [reply["id"] + end for end in ("-0", "-0-1", "-1", "-1-1")]
    assert told["prompt_tokens"] == reply["usage"]["prompt_tokens"]
    assert told["output_tokens"] == sum(s["output_tokens"] for s in told["sequences"]) == 20
    one = httpx.get(f"{small.url}/requests/{reply['id']}-1").json()
    assert (one["id"], one["output_tokens"], one["sequences"]) == (f"{reply['id']}-1", 5, [])


def test_another_engine_is_a_phase_of_its_own() -> None:
    with serve("--max-num-seqs", "4") as live, ThreadPoolExecutor(1) as pool:
        with running(live, max_tokens=10):
            asked = pool.submit(ask, live, prompt="Once upon a time", max_tokens=400)
            while live.metrics()["total_tokens_generated"] < 60:
                time.sleep(0.01)
        os.kill(live.engine_pid, signal.SIGKILL)
        reply = asked.result()
        told = reply["explain"]
        check(told)
        assert told["output_tokens"] == 400 and told["finish_reason"] == "length" and told["preemptions"] == []
        assert names(told) == [
            "received", "tokenize", "admit", "queue", "prefill", "decode", "restart", "queue", "prefill", "decode", "deliver"
        ]  # fmt: skip
        away_s = told["phases"][6]["ended_s"] - told["phases"][6]["began_s"]
        assert away_s > 0 and told["unexplained_s"] < told["total_s"] - away_s
        fresh = ask(live, prompt="The", max_tokens=2)["explain"]
        check(fresh)
        assert "restart" not in names(fresh)


def test_a_recording_explains_as_the_server_does(tmp_path: Path) -> None:
    path = tmp_path / "steps.bin"
    with serve("--max-num-seqs", "1", "--record-steps", str(path)) as live, ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(ask, live, prompt=f"Story {i}", max_tokens=20) for i in range(3)]
        told = {reply["id"]: reply["explain"] for reply in (one.result() for one in asked)}
        assert live.stop() == 0
    done = subprocess.run(command("explain", str(path), "--json"), capture_output=True, text=True, check=True)
    recorded = {one["id"].removesuffix("-0"): one for one in map(json.loads, done.stdout.splitlines())}
    assert told.keys() <= recorded.keys()
    for name, one in told.items():
        check(recorded[name])
        inside = [p for p in one["phases"] if p["name"] in ("queue", "prefill", "decode")]
        spans = [(p["name"], p["began_s"], p["ended_s"]) for p in recorded[name]["phases"][1:]]
        assert recorded[name]["phases"][0]["name"] == "received"  # and all that was done before the queue
        for (kind, began_s, ended_s), phase in zip(spans, inside, strict=True):
            assert kind == phase["name"]
            assert (began_s, ended_s) == pytest.approx((phase["began_s"], phase["ended_s"]), abs=3e-6)
        for key in ("steps", "chunks", "output_tokens", "finish_reason", "waits", "shared_with"):
            assert recorded[name][key] == one[key]
    subprocess.run(command("trace", str(path), "-o", str(tmp_path / "trace.json")), capture_output=True, check=True)
    trace = Trace(json.loads((tmp_path / "trace.json").read_text()))
    assert sum(pid == 2 for pid, _ in trace.names) == len(recorded)
