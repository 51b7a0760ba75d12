"""GET /steps: pages of records, and records as they come, on an engine whose steps are known."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from scripted_engine import Live

from minivllm.server.connection import WIDE_BUFFER_BYTES, Connection
from minivllm.server.routes import steps as routes

Until = Callable[[Callable[[], bool]], None]


def generate(live: Live, num_tokens: int = 5) -> None:
    """As many steps as tokens, more or less."""
    body = {"prompt": "a fox", "max_tokens": num_tokens}
    assert httpx.post(live.url + "/v1/completions", json=body, timeout=30).status_code == 200


def steps(live: Live, **query: Any) -> dict[str, Any]:
    reply = httpx.get(live.url + "/steps", params=query)
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"] == "application/json"
    return dict(reply.json())


def events(stream: httpx.Response) -> Iterator[tuple[str, Any]]:
    """Name and data of each event."""
    name = ""
    for line in stream.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def test_before_the_first_step_there_is_a_base_all_the_same(start: Callable[..., Live]) -> None:
    found = steps(start())
    assert found["base"] == {"requests": [], "blocks": {"total": 0, "held": [], "cached": []}}
    assert (found["steps"], found["next"]) == ([], 0)


def test_pages_follow_each_other(start: Callable[..., Live]) -> None:
    live = start()
    generate(live, 30)
    first = steps(live, limit=7)
    assert first["info"] | {"model": "fox", "block_size": 16, "max_model_len": 512} == first["info"]
    assert abs(first["now_s"] - time.monotonic()) < 60
    assert [record["seq"] for record in first["steps"]] == list(range(7)) and first["next"] == 7
    assert first["steps"][0]["life"] == 0 and "life" not in first["steps"][1]
    row = first["steps"][3]["rows"][0]
    assert (row["start"], row["num_tokens"], row["kind"]) == (3, 1, "decode")
    second = steps(live, since=7, limit=100)
    assert "base" not in second
    assert [record["seq"] for record in second["steps"]] == list(range(7, 30)) and second["next"] == 30
    assert steps(live, since=30)["steps"] == []
    assert "base" in steps(live, since=31), "of another server: begin anew"


def test_a_limit_of_none_is_the_state_now(start: Callable[..., Live]) -> None:
    live = start()
    generate(live, 9)
    found = steps(live, limit=0)
    assert (found["steps"], found["next"]) == ([], 9)
    assert found["base"]["blocks"]["total"] == 100


def test_only_the_last_ones_are_kept(start: Callable[..., Live]) -> None:
    live = start(step_records=16)
    generate(live, 100)
    found = steps(live, limit=1000)
    assert 16 <= len(found["steps"]) <= 18 and found["next"] == 100
    assert steps(live, since=3)["steps"][0] == found["steps"][0], "those are gone"
    assert "base" in steps(live, since=3)


@pytest.mark.parametrize("query", ["since=-1", "since=x", "limit=1.5", "limit=%C2%B2", "stream=maybe", "stream=true&since=3",
                                   "since=99999999999999999999"])  # fmt: skip
def test_what_cannot_be_meant_is_refused(live: Live, http: httpx.Client, query: str) -> None:
    reply = http.get("/steps?" + query)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == query.split("=")[0]


def test_without_records_there_is_no_such_route(start: Callable[..., Live]) -> None:
    live = start(step_records=0)
    generate(live)
    assert httpx.get(live.url + "/steps").status_code == 404


@pytest.mark.parametrize("how", [{"params": {"stream": "true"}}, {"headers": {"accept": "text/event-stream"}}])
def test_a_stream_begins_with_a_base_and_goes_on_with_what_comes(start: Callable[..., Live], how: dict[str, Any]) -> None:
    live = start(delay_s=0.001)
    generate(live, 3)
    with httpx.stream("GET", live.url + "/steps", timeout=30, **how) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        told = events(stream)
        name, base = next(told)
        assert (name, base["next"], base["info"]["model"]) == ("base", 3, "fox")
        assert base["base"]["blocks"]["total"] == 100 and "steps" not in base
        generate(live, 40)
        found: list[int] = []
        while len(found) < 40:
            name, data = next(told)
            assert name == "steps"
            found += [record["seq"] for record in data["steps"]]
        assert found == list(range(3, 43))


def ask_and_not_read(live: Live) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.settimeout(20)
    sock.connect(("127.0.0.1", live.port))
    sock.sendall(b"GET /steps?stream=true HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    return sock


def test_a_reader_that_falls_behind_begins_anew(start: Callable[..., Live], until: Until) -> None:
    """Nothing is kept for it: it reads what was under way, then a new base, and then what comes."""
    live = start(step_records=500, context=2**14)
    sock = ask_and_not_read(live)
    body = {"prompt": "a fox", "max_tokens": 6_000, "n": 16, "temperature": 1.0}
    assert httpx.post(live.url + "/v1/completions", json=body, timeout=120).status_code == 200
    number = steps(live, limit=0)["next"]
    assert number >= 6_000
    told: list[tuple[str, Any]] = []
    seen, at, text = 0, -1, b""
    while at < number:
        part = sock.recv(2**20)
        assert part
        *whole, text = (text + part).split(b"\n\n")
        for event in whole:
            name, _, data = event.rpartition(b"\ndata: ")
            if not name:
                continue
            told.append((name.rpartition(b"event: ")[2].decode(), json.loads(data.partition(b"\r\n")[0])))
            if told[-1][0] == "steps":
                assert [record["seq"] for record in told[-1][1]["steps"]] == list(range(at, at + len(told[-1][1]["steps"])))
                seen, at = seen + len(told[-1][1]["steps"]), at + len(told[-1][1]["steps"])
            else:
                assert "base" in told[-1][1] and told[-1][1]["next"] > at
                at = told[-1][1]["next"]
    assert [name for name, _ in told].count("base") == 1 and told[0][0] == "base"
    assert any(name == "gap" for name, _ in told) and 0 < seen < number
    generate(live, 5)
    until(lambda: b"event: steps\n" in sock.recv(2**16))
    sock.close()


def test_events_are_of_a_bounded_size(start: Callable[..., Live], monkeypatch: pytest.MonkeyPatch) -> None:
    """What came meanwhile comes in several, none of it late."""
    monkeypatch.setattr(routes, "EVENT_BYTES", 4_000)
    monkeypatch.setattr(routes, "EVERY_S", 0.5)
    live = start()
    with httpx.stream("GET", live.url + "/steps?stream=true", timeout=30) as stream:
        lines = stream.iter_lines()
        while not next(lines).startswith("data: "):
            pass
        generate(live, 200)
        sizes: list[int] = []
        found: list[int] = []
        while len(found) < 200:
            line = next(lines)
            if line.startswith("data: "):
                sizes.append(len(line))
                found += [record["seq"] for record in json.loads(line.removeprefix("data: "))["steps"]]
    assert found == list(range(200))
    assert len(sizes) > 10 and max(sizes) < 5_000


def test_only_so_many_streams_at_once(start: Callable[..., Live], until: Until, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "MOST_STREAMS", 2)
    live = start()
    socks = [ask_and_not_read(live) for _ in range(2)]
    until(lambda: len(live.server._state.tasks) == 2)
    until(lambda: httpx.get(live.url + "/steps?stream=true").status_code == 503)
    reply = httpx.get(live.url + "/steps?stream=true")
    assert reply.json()["error"]["message"].startswith("2 clients stream steps")
    assert reply.headers["retry-after"] == "10"
    steps(live)  # pages are there for everybody
    for sock in socks:
        sock.close()

    def taken() -> bool:
        with httpx.stream("GET", live.url + "/steps?stream=true") as stream:
            return stream.status_code == 200

    until(taken)


def test_a_stream_of_steps_has_a_wide_buffer_and_a_stream_of_tokens_has_not(
    start: Callable[..., Live], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[int] = []
    widen = Connection._widen

    def look(connection: Connection) -> None:
        widen(connection)
        found.append(connection.transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF))

    monkeypatch.setattr(Connection, "_widen", look)
    live = start(delay_s=0.01)
    with httpx.stream("POST", live.url + "/v1/completions", json={"prompt": "x", "stream": True, "max_tokens": 5}) as tokens:
        assert tokens.read() and not found
    with httpx.stream("GET", live.url + "/steps?stream=true") as stream:
        next(events(stream))
    assert len(found) == 1 and found[0] >= WIDE_BUFFER_BYTES


def test_streams_end_with_their_readers_and_hold_up_no_stop(start: Callable[..., Live], until: Until) -> None:
    live = start(shutdown_timeout_s=60.0)
    with httpx.stream("GET", live.url + "/steps?stream=true") as stream:
        told = events(stream)  # kept: with its reader gone the stream would end
        next(told)
        assert len(live.server._state.tasks) == 1
    until(lambda: not live.server._state.tasks)
    socks = [ask_and_not_read(live) for _ in range(3)]
    until(lambda: len(live.server._state.tasks) == 3)
    began = time.monotonic()
    live.stop()
    assert live.join() == 0
    assert time.monotonic() - began < 15, "it did not wait for those who watch"
    for sock in socks:
        sock.close()
