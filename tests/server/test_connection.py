"""Raw sockets: what a client may do to a connection before the application sees anything."""

import contextlib
import json
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from scripted_engine import Live

GET = b"GET /version HTTP/1.1\r\nHost: x\r\n"


@contextlib.contextmanager
def connect(live: Live) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", live.port), timeout=20) as sock:
        yield sock


def read_all(sock: socket.socket) -> bytes:
    """Everything until the server closes."""
    parts = []
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        while part := sock.recv(65536):
            parts.append(part)
    return b"".join(parts)


def status(reply: bytes) -> int:
    return int(reply.split(b" ", 2)[1])


def error_of(reply: bytes) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(reply.split(b"\r\n\r\n", 1)[1])["error"]
    return error


@pytest.fixture(scope="module")
def strict(tokenizer: Any) -> Iterator[Live]:
    """A server with short times and small limits."""
    from minivllm.config import make_config

    config = make_config(
        port=0, max_header_bytes=4096, header_timeout_s=0.5, body_timeout_s=0.5, keep_alive_timeout_s=0.5, write_timeout_s=0.5
    )
    live = Live(tokenizer, config).start()
    yield live
    live.end()


@pytest.fixture(autouse=True)
def still_serving(strict: Live) -> Iterator[None]:
    yield
    assert httpx.get(f"{strict.url}/health").status_code == 200


def test_one_long_header(strict: Live) -> None:
    with connect(strict) as sock:
        sock.sendall(GET + b"X: " + b"a" * 5000 + b"\r\n\r\n")
        reply = read_all(sock)
    assert status(reply) == 431
    assert error_of(reply)["code"] == 431


def test_many_headers(strict: Live) -> None:
    with connect(strict) as sock:
        sock.sendall(GET + b"X: a\r\n" * 5000 + b"\r\n")
        assert status(read_all(sock)) == 431


def test_long_request_line(strict: Live) -> None:
    with connect(strict) as sock:
        sock.sendall(b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\nHost: x\r\n\r\n")
        assert status(read_all(sock)) == 431


@pytest.mark.parametrize("start", [b"GET /", GET + b"X: ", GET + b"X", GET + b"A: b\r\n" * 10 + b"Y: "], ids=len)
def test_header_without_end(strict: Live, start: bytes) -> None:
    """100 MB if one could; the server stops reading long before, and keeps none of it."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sent = 0
    with connect(strict) as sock:
        sock.sendall(start)
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            while sent < 100 * 2**20:
                sent += sock.send(b"a" * 65536)
        reply = read_all(sock)
    assert not reply or status(reply) == 431
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024  # KiB


def test_trailers_without_end(strict: Live) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    with connect(strict) as sock:
        sock.sendall(head + b"2\r\n{}\r\n0\r\nX: ")
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            for _ in range(200):
                sock.sendall(b"a" * 65536)
        reply = read_all(sock)
    assert not reply or status(reply) in (400, 431)


def test_trailers_do_not_become_headers(strict: Live) -> None:
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    body = b'{"prompt": "x", "max_tokens": 1}'
    with connect(strict) as sock:
        sock.sendall(head + b"%x\r\n%s\r\n0\r\n" % (len(body), body) + b"Origin: http://evil.example\r\n\r\n")
        assert status(read_all(sock)) == 200


def test_one_byte_a_while(strict: Live) -> None:
    """Each byte of a header is new data, and none of them buys more time."""
    with connect(strict) as sock:
        began = time.monotonic()
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            for byte in (GET + b"X: " + b"a" * 1000)[:]:
                sock.sendall(bytes([byte]))
                time.sleep(0.05)
                if time.monotonic() - began > 10:
                    pytest.fail("the connection stayed open")
        reply = read_all(sock)
    assert not reply or status(reply) == 408


@pytest.mark.parametrize("first", [b"", b"\r\n", b"\r\n\r\n"])
def test_idle_connections_are_closed(strict: Live, first: bytes) -> None:
    with connect(strict) as sock:
        sock.sendall(first)
        assert read_all(sock) == b""
    with connect(strict) as sock:
        sock.sendall(GET + b"\r\n")
        reply = b""
        while b'{"version":' not in reply:
            reply += sock.recv(65536)
        sock.sendall(first)
        assert read_all(sock) == b""


@pytest.mark.parametrize("framing", [b"Content-Length: 1000", b"Transfer-Encoding: chunked"])
@pytest.mark.parametrize("path", [b"/generate", b"/v1/completions", b"/wibble"])
def test_body_that_never_comes(strict: Live, framing: bytes, path: bytes) -> None:
    with connect(strict) as sock:
        sock.sendall(b"POST " + path + b" HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" + framing + b"\r\n\r\n")
        sock.sendall(b"{" if b"Length" in framing else b"1\r\n{\r\n")
        assert status(read_all(sock)) == (404 if path == b"/wibble" else 408)


def test_lengths_without_sense(strict: Live) -> None:
    for length in (b"999999999999", b"9" * 30, b"9" * 3000):
        with connect(strict) as sock:
            sock.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: " + length + b"\r\n\r\n")
            assert status(sock.recv(65536)) in (400, 413)
    for head in (b"Content-Length: -1", b"Content-Length: 1x", b"Content-Length: 1\r\nContent-Length: 2",
                 b"Content-Length: 5\r\nTransfer-Encoding: chunked", b"Transfer-Encoding: chunked\r\nContent-Length: 5",
                 b"Transfer-Encoding: x", b"Transfer-Encoding: chunked\r\n\r\nnot a number",
                 b"X : a", b"X\x00: a", b" X: a"):  # fmt: skip
        with connect(strict) as sock:
            sock.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\n" + head + b'\r\n\r\n{"prompt": "x"}')
            reply = read_all(sock)
            assert status(reply) == 400, head
            assert reply.count(b"HTTP/1.1 4") == 1


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01",
        b"hello\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_what_is_not_a_request(strict: Live, data: bytes) -> None:
    with connect(strict) as sock:
        sock.sendall(data)
        reply = read_all(sock)
    assert status(reply) in (400, 404, 405)


def test_upgrades_are_not_followed(strict: Live) -> None:
    with connect(strict) as sock:
        sock.sendall(GET + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\nGET /health HTTP/1.1\r\n\r\n")
        reply = read_all(sock)
    assert status(reply) == 200
    assert reply.count(b"HTTP/1.1 ") == 1


def test_pipelined_requests_are_answered_in_order(strict: Live) -> None:
    with connect(strict) as sock:
        sock.sendall((GET + b"\r\n") * 4 + GET.replace(b"/version", b"/wibble") + b"Connection: close\r\n\r\n")
        reply = read_all(sock)
    assert reply.count(b"HTTP/1.1 200") == 4
    assert reply.rindex(b"HTTP/1.1 404") > reply.rindex(b"HTTP/1.1 200")


def test_too_many_pipelined_requests_end_the_connection(strict: Live) -> None:
    with connect(strict) as sock:
        sock.sendall((GET + b"\r\n") * 1000)
        assert read_all(sock).count(b"HTTP/1.1 200") < 1000


def test_a_client_that_leaves_ends_all_its_pipelined_requests(
    start: Callable[..., Live], until: Callable[[Callable[[], bool]], None], caplog: pytest.LogCaptureFixture
) -> None:
    """The one that is being answered too, though another came after it."""
    live = start(delay_s=0.02)
    body = b'{"prompt": "x", "max_tokens": 500}'
    post = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    with connect(live) as sock:
        sock.sendall(post)
        assert sock.recv(100)
        sock.sendall(post)
        until(lambda: len(live.client.num_sent) == 1)
        time.sleep(0.2)
    until(lambda: live.client.num_open == 0)
    assert len(live.client.added) == len(live.client.aborted) == 1
    assert caplog.text == ""  # it is no fault of the server


def test_a_refusal_behind_a_running_answer_is_no_fault_of_the_server(strict: Live, caplog: pytest.LogCaptureFixture) -> None:
    body = b'{"prompt": "x", "max_tokens": 2}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += b"Content-Length: %d\r\n\r\n" % len(body)
    for _ in range(20):
        with connect(strict) as sock, contextlib.suppress(OSError):
            sock.sendall((head + body) * 100)
            read_all(sock)
    time.sleep(0.2)
    assert caplog.text == ""


@contextlib.contextmanager
def unread_stream(live: Live, until: Callable[[Callable[[], bool]], None]) -> Iterator[socket.socket]:
    """A stream of some megabytes that the engine has finished and nobody has read; small buffers, so that it cannot fit."""
    live.server._door._sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)  # type: ignore[union-attr]
    live.client.text = "fox " * 400
    body = json.dumps({"prompt": ["a"] * 64, "max_tokens": 500, "temperature": 0, "stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        sock.settimeout(20)
        sock.connect(("127.0.0.1", live.port))
        sock.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        until(lambda: len(live.client.added) == 64)
        until(lambda: live.client.num_open == 0)  # the engine is not held up by a reader
        yield sock


def test_a_reader_that_never_reads_is_let_go(start: Callable[..., Live], until: Callable[[Callable[[], bool]], None]) -> None:
    live = start(delay_s=0.002, write_timeout_s=1.0)
    with unread_stream(live, until) as sock:
        until(lambda: live.llm.num_open == 0)
        assert b"[DONE]" not in read_all(sock)


def test_text_for_a_late_reader_is_merged(start: Callable[..., Live], until: Callable[[Callable[[], bool]], None]) -> None:
    live = start(delay_s=0.002)
    with unread_stream(live, until) as sock:
        lines = read_all(sock).split(b"\n")
    chunks = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
    assert lines.count(b"data: [DONE]") == 1
    script = live.tokenizer.encode(live.client.text)
    whole = live.tokenizer.decode([script[i % len(script)] for i in range(500)])
    for index in range(64):
        assert "".join(c["choices"][0]["text"] for c in chunks if c["choices"][0]["index"] == index) == whole
    assert len(chunks) < 64 * 500 / 2


def test_many_slow_strangers_do_not_slow_an_honest_client(strict: Live) -> None:
    strangers = [socket.create_connection(("127.0.0.1", strict.port)) for _ in range(200)]
    stop = threading.Event()

    def drip() -> None:
        while not stop.wait(0.02):
            for sock in strangers:
                with contextlib.suppress(OSError):
                    sock.send(b"G")

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        for _ in range(20):
            assert httpx.post(f"{strict.url}/generate", json={"prompt": "x", "max_tokens": 2}).status_code == 200
    finally:
        stop.set()
        thread.join()
        for sock in strangers:
            sock.close()
