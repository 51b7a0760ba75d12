"""Clients that go away, engines that die, and servers that are asked to stop."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from scripted_engine import Live

from minivllm.errors import PortInUse
from minivllm.server import http as server_http

Until = Callable[[Callable[[], bool]], None]
BODIES = {
    "/generate": {"prompt": "x", "max_tokens": 400},
    "/v1/completions": {"prompt": "x", "max_tokens": 400},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 400},
}


def send(live: Live, path: str, stream: bool) -> socket.socket:
    """A request on a socket of its own, without reading the answer."""
    body = json.dumps({**BODIES[path], **({"stream": True} if stream else {})}).encode()
    sock = socket.create_connection(("127.0.0.1", live.port), timeout=20)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    sock.sendall(head.encode() + body)
    return sock


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("queued", [True, False])
def test_a_client_that_goes_away_is_aborted(
    start: Callable[..., Live], until: Until, path: str, stream: bool, queued: bool
) -> None:
    live = start(delay_s=0.02)
    live.client.hold = queued
    sock = send(live, path, stream)
    until(lambda: len(live.client.added) == 1)
    if stream and not queued:
        assert sock.recv(10)
    assert live.client.aborted == []
    sock.close()
    until(lambda: live.client.aborted == [live.client.added[0].id])
    until(lambda: live.llm.num_open == 0)
    assert httpx.get(f"{live.url}/ready").status_code == 200


def test_every_choice_of_a_client_that_goes_away_is_aborted(start: Callable[..., Live], until: Until) -> None:
    live = start(delay_s=0.02)
    with (
        contextlib.suppress(httpx.ReadTimeout),
        httpx.stream("POST", f"{live.url}/v1/completions", json={"prompt": ["a", "b", "c"], "max_tokens": 400, "stream": True}),
    ):
        until(lambda: len(live.client.added) == 3)
    until(lambda: sorted(live.client.aborted) == sorted(r.id for r in live.client.added))


def test_one_bad_choice_ends_the_others(start: Callable[..., Live], until: Until) -> None:
    live = start(delay_s=0.02)
    reply = httpx.post(f"{live.url}/v1/completions", json={"prompt": [[1], [10**6]], "max_tokens": 400})
    assert reply.status_code == 400
    until(lambda: live.llm.num_open == 0)


def test_a_dead_engine_ends_every_stream_and_the_server(start: Callable[..., Live], until: Until) -> None:
    live = start(delay_s=0.02)
    replies: dict[str, httpx.Response] = {}

    def ask(name: str, path: str, stream: bool) -> None:
        body = {**BODIES[path], **({"stream": True} if stream else {})}
        replies[name] = httpx.post(f"{live.url}{path}", json=body, timeout=20)

    wanted = [("native", "/generate", True), ("stream", "/v1/chat/completions", True), ("whole", "/v1/completions", False)]
    threads = [threading.Thread(target=ask, args=w) for w in wanted]
    for thread in threads:
        thread.start()
    until(lambda: len(live.client.added) == 3 and min(live.client.num_sent) > 2)
    live.client.dead = True
    for thread in threads:
        thread.join()
    assert "event: error\ndata: " in replies["native"].text
    assert replies["stream"].text.endswith("data: [DONE]\n\n")
    assert '"finish_reason":"' not in replies["stream"].text
    assert "engine process has ended" in replies["stream"].text
    assert replies["whole"].status_code == 500
    assert live.join() == 1


def test_health_tells_of_a_dead_engine(start: Callable[..., Live]) -> None:
    live = start()
    live.llm.alive = False
    assert httpx.get(f"{live.url}/health").status_code in (503,)


def test_the_drain_lets_work_finish_and_refuses_new_work(start: Callable[..., Live], until: Until) -> None:
    live = start(delay_s=0.02)
    kept = httpx.Client(base_url=live.url, verify=False)
    assert kept.get("/version").status_code == 200  # a connection from before
    texts: list[str] = []
    body = {"prompt": "x", "max_tokens": 200, "stream": True}
    thread = threading.Thread(
        target=lambda: texts.append(httpx.post(f"{live.url}/v1/completions", json=body, timeout=20).text)
    )
    thread.start()
    until(lambda: live.client.num_open == 1)
    live.stop()
    until(lambda: live.server.drain.draining)
    for path, body in (*BODIES.items(), ("/tokenize", {"prompt": "x"})):
        for ask in (kept.post, lambda path, json: httpx.post(f"{live.url}{path}", json=json)):
            reply = ask(path, json=body)
            assert reply.status_code == 503
            assert reply.headers["connection"] == "close"
            assert "retry-after" in reply.headers
            assert "shutting down" in reply.json()["error"]["message"]
    assert httpx.get(f"{live.url}/health").status_code == 503
    assert httpx.get(f"{live.url}/metrics").json()["active_requests"] == 1
    thread.join()
    assert texts[0].count('"finish_reason":"length"') == 1
    assert texts[0].endswith("data: [DONE]\n\n")
    assert live.join() == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{live.url}/health")


@pytest.mark.parametrize("way", ["time is over", "asked twice"])
def test_what_does_not_finish_gets_an_error_event(start: Callable[..., Live], until: Until, way: str) -> None:
    live = start(delay_s=0.02, shutdown_timeout_s=0.3 if way == "time is over" else 600.0)
    live.client.hold = way == "asked twice"
    replies: dict[str, httpx.Response] = {}

    def ask(path: str) -> None:
        replies[path] = httpx.post(f"{live.url}{path}", json={**BODIES[path], "max_tokens": 500}, timeout=20)

    threads = [threading.Thread(target=ask, args=(path,)) for path in BODIES]
    for thread in threads:
        thread.start()
    until(lambda: len(live.client.added) == 3)
    if way == "asked twice":
        live.stop()
        until(lambda: live.server.drain.draining)
    live.stop()
    for thread in threads:
        thread.join()
    assert live.join() == 0
    for path in ("/v1/completions", "/v1/chat/completions"):
        assert replies[path].status_code == 503
        assert "was stopped before" in replies[path].json()["error"]["message"]
    assert "was stopped before" in replies["/generate"].text
    assert sorted(live.client.aborted) == sorted(r.id for r in live.client.added)


def test_port_in_use(tokenizer: Any, start: Callable[..., Live]) -> None:
    live = start()
    taken = Live(tokenizer, live.config)
    object.__setattr__(taken.config.server, "port", live.port)
    with pytest.raises(PortInUse, match="in use; choose another --port"):
        asyncio.run(taken._main())


@contextlib.contextmanager
def process(folder: Path, **options: Any) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """The scripted server as a program of its own; its process and its URL."""
    program = Path(server_http.__file__).parents[2] / "tests" / "support" / "scripted_engine.py"
    command = [sys.executable, str(program), str(folder), json.dumps(options)]
    env = {**os.environ, "PYTHONPATH": str(program.parents[2])}
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    try:
        if child.stdout is None or not (port := child.stdout.readline().strip()):
            pytest.fail("the server did not start")
        yield child, f"http://127.0.0.1:{port}"
    finally:
        child.kill()
        child.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(tokenizer_folder: Path, number: int) -> None:
    with process(tokenizer_folder) as (child, url):
        body = {"prompt": "x", "max_tokens": 20}
        with httpx.stream("POST", f"{url}/generate", json=body, timeout=20) as reply:
            lines = reply.iter_lines()
            assert next(lines).startswith("data: ")
            child.send_signal(number)
            rest = list(lines)
        assert "event: error" not in rest
        assert sum(line.startswith("data: ") for line in rest) > 5
        assert child.wait(20) == 0


def test_a_second_signal_is_now(tokenizer_folder: Path) -> None:
    with process(tokenizer_folder, shutdown_timeout_s=600.0) as (child, url):
        with httpx.stream("POST", f"{url}/generate", json={"prompt": "x", "max_tokens": 500}, timeout=20) as reply:
            lines = reply.iter_lines()
            assert next(lines).startswith("data: ")
            child.send_signal(signal.SIGTERM)
            while httpx.get(f"{url}/health").status_code != 503:
                pass
            child.send_signal(signal.SIGTERM)
            assert "event: error" in list(lines)
        assert child.wait(20) == 0
