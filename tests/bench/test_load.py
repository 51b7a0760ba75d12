"""The load generator against a server of known behaviour: what is counted, what is a failure, who waits for whom."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from minivllm.bench.client import RequestFailed, fetch_json, stream_events
from minivllm.bench.load import Outcome, Pace, Target, run_load
from minivllm.bench.workload import Item

Script = Callable[[dict[str, Any], asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Fake:
    """A one-route HTTP server. Written by its connections."""

    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    running: int = 0
    most_running: int = 0


@asynccontextmanager
async def serving(script: Script) -> AsyncIterator[Fake]:
    """Serve ``script`` for each request."""
    fake = Fake()

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = int(head.lower().split("content-length: ")[1].split("\r\n")[0])
        body = json.loads(await reader.readexactly(length) or b"{}")
        fake.heads.append(head)
        fake.bodies.append(body)
        fake.running += 1
        fake.most_running = max(fake.most_running, fake.running)
        try:
            await script(body, writer)
            await writer.drain()
        finally:
            fake.running -= 1
            writer.close()

    server = await asyncio.start_server(connection, "127.0.0.1", 0)
    fake.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/completions"
    async with server:
        yield fake


def head(writer: asyncio.StreamWriter, status: int = 200) -> None:
    writer.write(f"HTTP/1.1 {status} X\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n".encode())


def chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")


def event(writer: asyncio.StreamWriter, value: Any) -> None:
    text = value if isinstance(value, str) else json.dumps(value)
    chunk(writer, f"data: {text}\n\n".encode())


async def tokens(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    """Stream as many tokens as asked for, then usage, then the end."""
    head(writer)
    for i in range(body["max_tokens"]):
        event(writer, {"choices": [{"text": f"{i} "}]})
        await writer.drain()
        await asyncio.sleep(0.002)
    event(writer, {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": body["max_tokens"]}})
    event(writer, "[DONE]")
    chunk(writer, b"")


def load(script: Script, items: list[Item], pace: Pace | None = None) -> tuple[list[Outcome], Fake]:
    async def run() -> tuple[list[Outcome], Fake]:
        async with serving(script) as fake:
            target = Target(fake.url, "m", {"temperature": 0.0}, {"X-Key": "v"})
            outcomes, duration = await run_load(target, items, pace or Pace())
            assert duration > 0
            return outcomes, fake

    return asyncio.run(asyncio.wait_for(run(), 30))


def test_a_stream_is_measured_token_by_token() -> None:
    (outcome,), fake = load(tokens, [Item((1, 2, 3), 4)])
    assert outcome.ok
    assert outcome.text == "0 1 2 3 "
    assert (outcome.num_input, outcome.num_output) == (5, 4)  # as the server's usage says
    assert len(outcome.itl_s) == 3
    assert len(outcome.chunk_times_s) == 4
    assert 0 < outcome.ttft_s < outcome.latency_s
    assert outcome.latency_s == pytest.approx(outcome.ttft_s + sum(outcome.itl_s))
    assert outcome.tpot_s == pytest.approx(sum(outcome.itl_s) / 3)
    (body,) = fake.bodies
    assert body["prompt"] == [1, 2, 3]
    assert (body["model"], body["stream"], body["temperature"]) == ("m", True, 0.0)
    assert "X-Key: v" in fake.heads[0]


def test_an_event_may_arrive_in_pieces_and_hold_several_lines() -> None:
    async def pieces(_: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        head(writer)
        for part in (b"da", b"ta: one\r", b"\ndata: two\r\n\r\nevent: x\ndata:", b"three\n", b"\n: comment\n\n"):
            chunk(writer, part)
            await writer.drain()
            await asyncio.sleep(0.005)
        chunk(writer, b"")

    async def run() -> list[str]:
        async with serving(pieces) as fake:
            return [e async for e in stream_events(fake.url, {})]

    assert asyncio.run(run()) == ["one\ntwo", "three"]


async def refuse(_: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    body = json.dumps({"error": {"message": "The prompt is empty."}}).encode()
    writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n" % len(body) + body)


async def break_off(_: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    head(writer)
    event(writer, {"choices": [{"text": "a"}]})


async def fail_later(_: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    head(writer)
    event(writer, {"choices": [{"text": "a"}]})
    event(writer, {"error": {"message": "The engine process has ended."}})
    event(writer, "[DONE]")
    chunk(writer, b"")


async def no_end(_: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    head(writer)
    event(writer, {"choices": [{"text": "a"}]})
    chunk(writer, b"")


async def nothing(_: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    head(writer)
    event(writer, "[DONE]")
    chunk(writer, b"")


async def garbage(_: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(b"this is no HTTP\r\n\r\n")


@pytest.mark.parametrize(
    ("script", "words"),
    [(refuse, "answered 400: The prompt is empty."), (break_off, "closed the connection"), (fail_later, "engine process"),
     (no_end, "without [DONE]"), (nothing, "without a token"), (garbage, "broke")],
)  # fmt: skip
def test_a_failure_is_an_outcome_that_says_why(script: Script, words: str) -> None:
    (outcome,), _ = load(script, [Item("x", 3)])
    assert not outcome.ok
    assert words in outcome.error


def test_what_came_before_a_failure_is_kept() -> None:
    (outcome,), _ = load(break_off, [Item("x", 3)])
    assert (outcome.text, outcome.num_output, len(outcome.chunk_times_s)) == ("a", 1, 1)
    assert 0 < outcome.ttft_s == outcome.latency_s


async def forget_the_last_chunk(_: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    head(writer)
    event(writer, {"choices": [{"text": "a"}]})
    event(writer, "[DONE]")


def test_a_connection_may_break_after_the_end() -> None:
    (outcome,), _ = load(forget_the_last_chunk, [Item("x", 3)])
    assert outcome.ok
    assert outcome.num_output == 1


async def several_at_once(_: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    head(writer)
    events = [{"choices": [{"text": f"{i}"}]} for i in range(3)] + [{"choices": [], "usage": {"completion_tokens": 7}}]
    chunk(writer, b"".join(f"data: {json.dumps(e)}\n\n".encode() for e in events) + b"data: [DONE]\n\n")
    chunk(writer, b"")


def test_events_that_come_together_have_one_time() -> None:
    (outcome,), _ = load(several_at_once, [Item("x", 3)])
    assert outcome.ok
    assert (outcome.text, outcome.num_output) == ("012", 7)
    assert outcome.itl_s == [0.0, 0.0]


def test_max_concurrency_bounds_what_runs() -> None:
    outcomes, fake = load(tokens, [Item("x", 5)] * 12, Pace(max_concurrency=3))
    assert [o.ok for o in outcomes] == [True] * 12
    assert fake.most_running == 3


def test_without_a_bound_all_run_at_once() -> None:
    _, fake = load(tokens, [Item("x", 20)] * 12)
    assert fake.most_running == 12


def test_arrivals_are_poisson_by_default_and_bursty_or_even_on_request() -> None:
    num = 20_000

    def gaps(burstiness: float) -> Any:
        return np.diff(Pace(request_rate=50.0, burstiness=burstiness, seed=3).starts_s(num))

    for burstiness in (0.25, 1.0, 4.0):
        found = gaps(burstiness)
        assert found.mean() == pytest.approx(1 / 50, rel=0.05)
        assert found.std() / found.mean() == pytest.approx(burstiness**-0.5, rel=0.05)  # 1 for exponential gaps
    assert Pace().starts_s(3) == [0.0, 0.0, 0.0]
    assert Pace(10.0, seed=1).starts_s(5) == Pace(10.0, seed=1).starts_s(5) != Pace(10.0, seed=2).starts_s(5)


def test_a_server_that_is_not_there_is_one_sentence() -> None:
    with pytest.raises(RequestFailed, match="is it running"):
        asyncio.run(fetch_json("http://127.0.0.1:9/v1/models"))
    with pytest.raises(RequestFailed, match="is not a URL"):
        asyncio.run(fetch_json("127.0.0.1:8000/v1/models"))
