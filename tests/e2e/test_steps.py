"""Records of steps of the real server: what /steps says, what the file says, and what the engine did are one thing."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from live_server import LiveServer, serve

from minivllm.observe.recording import Recording
from minivllm.observe.state import Base, State
from minivllm.records import StepRecord

STORY = "Once upon a time there was a little fox who lived in a deep dark forest with her mother and two brothers. " * 3


def ask(server: LiveServer, prompt: str, **more: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "max_tokens": 20, "temperature": 0, **more}
    reply = httpx.post(server.url + "/v1/completions", json=body, timeout=60)
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def all_steps(server: LiveServer) -> list[StepRecord]:
    """Every record since the start."""
    found: list[StepRecord] = []
    page = httpx.get(server.url + "/steps").json()
    assert page["base"]["requests"] == []
    while True:
        found += [msgspec.convert(record, StepRecord) for record in page["steps"]]
        if not page["steps"]:
            return found
        page = httpx.get(server.url + "/steps", params={"since": page["next"]}).json()


def test_the_route_the_file_and_the_engine_agree(tmp_path: Path) -> None:
    path = tmp_path / "steps"
    with serve("--record-steps", str(path), "--max-num-seqs", "4", "--num-gpu-blocks-override", "40") as server:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda i: ask(server, STORY + "x" * i, n=1 + i % 2, temperature=i % 2), range(8)))
        metrics = server.wait_idle()
        records = all_steps(server)
        state = State(httpx.get(server.url + "/steps").json()["info"]["block_size"])
        for record in records:
            state.apply(record)
            state.check(record)
        now = httpx.get(server.url + "/steps?limit=0").json()
        assert state.snapshot().base() == msgspec.convert(now["base"], Base)
        assert state.requests == {} and len(now["base"]["blocks"]["cached"]) == records[-1].blocks_cached > 0
        assert sum(record.num_output_tokens for record in records) == metrics["total_tokens_generated"]
        assert len(records) == metrics["total_steps"]
        assert sum(len(r.preempted) for r in records) == metrics["total_preemptions"]
        assert any(row.cached for record in records for row in record.rows)
        assert {len(record.rows) for record in records} >= {4}
        assert server.stop() == 0
    assert list(Recording(path)) == records
    assert sum(len(tokens) for record in records for tokens in record.outputs) == metrics["total_tokens_generated"]


def test_another_engine_is_another_life(tmp_path: Path) -> None:
    with serve("--record-steps", str(tmp_path / "steps")) as server, ThreadPoolExecutor(2) as pool:
        more = {"max_tokens": 300, "ignore_eos": True, "n": 16, "temperature": 1}
        told = [pool.submit(ask, server, STORY, **more) for _ in range(2)]
        while httpx.get(server.url + "/steps?limit=0").json()["next"] < 20:
            time.sleep(0.01)
        os.kill(server.engine_pid, signal.SIGKILL)
        for one in told:
            assert one.result()["usage"]["completion_tokens"] == 16 * 300
        records = all_steps(server)
        lives = {record.life: i for i, record in enumerate(records) if record.life is not None}
        assert list(lives) == [0, 1]
        again = [arrival for record in records[lives[1] :] for arrival in record.arrived]
        assert len(again) == 32 and all(arrival.num_prior > 0 for arrival in again)
        assert {arrival.id for arrival in again} == {arrival.id for record in records[: lives[1]] for arrival in record.arrived}
        state = State(16)
        for record in records:
            state.apply(record)
            state.check(record)
        assert state.requests == {}


@pytest.mark.parametrize("options", [(), ("--record-tokens",)])
def test_who_has_a_key_reads_no_prompts_of_others_unasked(options: tuple[str, ...], tmp_path: Path) -> None:
    with serve("--api-key", "a-key-of-somebody", "--record-steps", str(tmp_path / "steps"), *options) as server:
        headers = {"Authorization": "Bearer a-key-of-somebody"}
        assert httpx.get(server.url + "/steps").status_code == 401
        body = {"prompt": STORY, "max_tokens": 5}
        assert httpx.post(server.url + "/v1/completions", json=body, headers=headers, timeout=60).status_code == 200
        records = [
            msgspec.convert(record, StepRecord)
            for record in httpx.get(server.url + "/steps", headers=headers).json()["steps"]
        ]
        told = [row.tokens for record in records for row in record.rows] + [tokens for r in records for tokens in r.outputs]
        assert any(told) == bool(options)
        assert server.stop() == 0
    recorded = [row.tokens for record in Recording(tmp_path / "steps") for row in record.rows]
    assert recorded and any(recorded) == bool(options)


def test_a_file_that_cannot_be_written_is_told_before_a_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="cannot be written"), serve("--record-steps", str(tmp_path / "no" / "file")):
        pass
