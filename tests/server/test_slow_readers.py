"""Clients that do not read what they asked for: paused, resumed, closed in the end, and no obstacle to a stop."""

import json
import socket
import time
from collections.abc import Callable

import httpx
import pytest
from scripted_engine import Live

Until = Callable[[Callable[[], bool]], None]
ENDLESS = {"prompt": "x", "max_tokens": 4_000, "stream": True, "stream_options": {"include_usage": True}}


def ask_and_not_read(live: Live, path: str = "/v1/completions", **fields: object) -> socket.socket:
    body = json.dumps({**ENDLESS, **fields}).encode()
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.settimeout(20)
    sock.connect(("127.0.0.1", live.port))
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
    sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return sock


def read_all(sock: socket.socket) -> bytes:
    parts = []
    while part := sock.recv(65536):
        parts.append(part)
    return b"".join(parts)


@pytest.fixture
def live(start: Callable[..., Live]) -> Live:
    """A server with a model of a long context, whose engine is quick."""
    return start(slow_reader_pause_s=0.1, context=2**16)


def test_a_stalled_stream_is_paused_and_goes_on_when_it_is_read(live: Live, until: Until) -> None:
    sock = ask_and_not_read(live)
    until(lambda: len(live.client.paused) == 1)
    name = live.client.added[0].id
    assert live.client.paused == [name]
    assert live.client.resumed == []
    assert live.client.num_sent[0] < 4_000
    assert live.llm.num_open == 1
    reply = read_all(sock)
    assert reply.count(b'"finish_reason":"length"') == 1
    assert b'"completion_tokens":4000' in reply
    assert reply.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert live.client.resumed[0] == name
    assert live.client.aborted == []
    until(lambda: live.llm.num_open == 0)


def test_every_choice_of_a_stalled_stream_is_paused(live: Live, until: Until) -> None:
    sock = ask_and_not_read(live, n=3, temperature=1.0)
    until(lambda: len(live.client.paused) == 3)
    assert sorted(live.client.paused) == sorted(request.id for request in live.client.added)
    sock.close()
    until(lambda: len(live.client.aborted) == 3)
    assert live.client.resumed == []  # it would run once more for nobody
    until(lambda: live.app.state.serving.admission.requests == 0)


def test_a_slow_reader_that_goes_on_reading_is_never_paused(start: Callable[..., Live]) -> None:
    live = start(slow_reader_pause_s=1.0, context=2**16)
    sock = ask_and_not_read(live)
    reply, read_s = b"", 0.0
    while part := sock.recv(2048):
        reply += part
        time.sleep(0.05)  # the stream's buffers are full all the while, but never for long
        read_s += 0.05
    assert reply.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert read_s > live.config.server.slow_reader_pause_s  # in all, longer than a reader may stand still
    assert live.client.paused == []


def test_a_stream_that_stays_unread_is_closed(start: Callable[..., Live], until: Until) -> None:
    live = start(slow_reader_pause_s=0.1, write_timeout_s=0.5, context=2**16)
    sock = ask_and_not_read(live)
    until(lambda: len(live.client.paused) == 1)
    until(lambda: live.client.aborted == live.client.paused)
    until(lambda: live.llm.num_open == 0)
    with pytest.raises(ConnectionResetError):
        read_all(sock)


def test_a_stalled_stream_does_not_hold_up_a_stop(start: Callable[..., Live], until: Until) -> None:
    live = start(slow_reader_pause_s=0.1, shutdown_timeout_s=0.2, context=2**16)
    sock = ask_and_not_read(live)
    until(lambda: len(live.client.paused) == 1)
    live.stop()
    assert live.join() == 0
    assert live.client.aborted == live.client.paused
    sock.close()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/generate"])
def test_streams_left_at_the_end_of_a_drain_get_an_error_and_the_mark(
    start: Callable[..., Live], until: Until, path: str
) -> None:
    live = start(delay_s=0.02, shutdown_timeout_s=0.2)
    fields = {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "x"}
    body = {**fields, "max_tokens": 400, **({} if path == "/generate" else {"stream": True})}
    with httpx.stream("POST", f"{live.url}{path}", json=body, timeout=20) as reply:
        pieces = reply.iter_text()
        text = next(pieces)
        live.stop()
        text += "".join(pieces)
    assert reply.status_code == 200
    assert "was stopped before" in text
    assert '"finish_reason":"' not in text
    assert text.endswith("data: [DONE]\n\n") == (path != "/generate")
    assert live.join() == 0
