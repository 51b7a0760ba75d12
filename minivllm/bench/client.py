"""A small HTTP/1.1 client that reads a streamed reply event by event, and says when each came.

Why not a library: the load generator opens thousands of streams and must cost less than the server that it measures, and the
project's run-time dependencies hold an HTTP parser (httptools) but no client. One connection per request, as most users'
programs have; TLS by the standard library.

While a stream runs, its bytes are parsed as HTTP, stamped with the time they came, and kept: no task wakes up for an event, and
what the events hold is looked at when the stream has ended (``record_events``). Who wants each event as it comes gets it
(``stream_events``).
"""

import asyncio
import json
import os
import ssl
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import httptools

from minivllm.errors import MiniVLLMError


class RequestFailed(MiniVLLMError):
    """The server could not be reached, broke off, or answered with an error."""


def _request_bytes(method: str, url: str, payload: Any, headers: Mapping[str, str]) -> bytes:
    """Write the request's head and JSON body."""
    parts = urlsplit(url)
    body = b"" if payload is None else json.dumps(payload, separators=(",", ":")).encode()
    head = [f"{method} {parts.path or '/'}{'?' + parts.query if parts.query else ''} HTTP/1.1", f"Host: {parts.netloc}"]
    fields = {"Connection": "close", "Content-Length": str(len(body)), "Content-Type": "application/json", **headers}
    head += [f"{name}: {value}" for name, value in fields.items()]
    if any("\r" in line or "\n" in line for line in head):
        raise RequestFailed("A header or the URL holds a line break.")
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


class _Exchange(asyncio.Protocol):
    """One request and its reply. Written by the event loop that owns the connection; its reader empties ``parts``."""

    def __init__(self, url: str) -> None:
        self.parts: list[tuple[float, bytes]] = []  # of the body, with the time.perf_counter() at which each came
        self.complete = False
        self._url = url
        self._failure: RequestFailed | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._now_s = 0.0
        self._awaits_more = False
        self._waiter: asyncio.Future[None] | None = None

    @property
    def status(self) -> int:
        """The reply's HTTP status; 0 before it is known."""
        return int(self._parser.get_status_code())

    # What the connection calls.

    def data_received(self, data: bytes) -> None:
        """Take bytes."""
        self._now_s = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"The connection to {self._url} broke ({error}).")
        if self._awaits_more:
            self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        """The server has closed the connection, or it broke."""
        if error is None:
            self._fail(f"The server at {self._url} closed the connection in the middle of its answer.")
        else:
            self._fail(f"The connection to {self._url} broke ({error}).")

    # What the parser calls.

    def on_body(self, part: bytes) -> None:
        """Keep a decoded part of the body."""
        self.parts.append((self._now_s, part))

    def on_message_complete(self) -> None:
        """The last byte of the reply was read."""
        self.complete = True
        self._wake()

    def _fail(self, reason: str) -> None:
        if not self.complete and self._failure is None:
            self._failure = RequestFailed(reason)
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # What the reader calls.

    async def more(self) -> list[tuple[float, bytes]]:
        """The parts that have come since; nothing when the reply is complete. Raises ``RequestFailed``."""
        self._awaits_more = True
        while not (self.parts or self.complete or self._failure):
            await self._sleep()
        if not self.parts and self._failure is not None:
            raise self._failure
        parts, self.parts = self.parts, []
        return parts

    async def whole(self) -> list[tuple[float, bytes]]:
        """Every part of the reply. Raises ``RequestFailed``."""
        while not (self.complete or self._failure):
            await self._sleep()
        if self._failure is not None:
            raise self._failure
        return self.parts

    async def _sleep(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter


class EventCutter:
    """Cuts a body into server-sent events. Written by whoever reads the body."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, part: bytes) -> Iterator[bytes]:
        """The data of every event that is whole with this part: a blank line ends an event, its data lines are joined."""
        body = self._rest + part
        if b"\r" in body:
            tail = b"\r" if body.endswith(b"\r") else b""  # it may be half of a CRLF
            body = body.removesuffix(b"\r").replace(b"\r\n", b"\n") + tail
        *whole, self._rest = body.split(b"\n\n")
        for event in whole:
            if event.startswith(b"data: ") and b"\n" not in event:  # nearly every event
                yield event[6:]
            elif data := [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]:
                yield b"\n".join(data)


@asynccontextmanager
async def _exchange(url: str, payload: Any, headers: Mapping[str, str]) -> AsyncGenerator[_Exchange, None]:
    """Send a request (POST with a payload, else GET); the reply comes while the block runs."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RequestFailed(f"{url!r} is not a URL; write it as http://127.0.0.1:8000.")
    request = _request_bytes("GET" if payload is None else "POST", url, payload, headers)
    tls = ssl.create_default_context() if parts.scheme == "https" else None
    port = parts.port or (443 if tls else 80)
    loop = asyncio.get_running_loop()
    try:
        transport, exchange = await loop.create_connection(lambda: _Exchange(url), parts.hostname, port, ssl=tls)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error
        raise RequestFailed(f"No server answers at {url} ({reason}); is it running?") from None
    try:
        transport.write(request)
        yield exchange
    finally:
        transport.close()


def _refusal(status: int, body: bytes) -> RequestFailed:
    """The server's error as one sentence."""
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = body[:200].decode("utf-8", "replace").strip()
    return RequestFailed(f"The server answered {status}: {message}")


async def fetch_json(url: str, payload: Any = None, headers: Mapping[str, str] | None = None) -> Any:
    """GET (or POST ``payload`` to) ``url`` and return the JSON answer. Raises ``RequestFailed``."""
    async with _exchange(url, payload, headers or {}) as exchange:
        body = b"".join([part for _, part in await exchange.whole()])
        if exchange.status >= 400:
            raise _refusal(exchange.status, body)
    try:
        return json.loads(body)
    except ValueError:
        raise RequestFailed(f"The server at {url} did not answer with JSON; is it an OpenAI-compatible server?") from None


async def record_events(
    url: str, payload: Any, headers: Mapping[str, str], events: list[tuple[float, bytes]]
) -> None:
    """POST ``payload``, wait for the end of the stream and put the data of each server-sent event into ``events``, with the
    ``time.perf_counter()`` at which it was whole. Raises ``RequestFailed``; what came before is in ``events`` then too."""
    async with _exchange(url, payload, headers) as exchange:
        try:
            await exchange.whole()
        finally:
            if exchange.status < 400:
                cutter = EventCutter()
                events += [(came_s, event) for came_s, part in exchange.parts for event in cutter.feed(part)]
        if exchange.status >= 400:
            raise _refusal(exchange.status, b"".join([part for _, part in exchange.parts]))


async def stream_events(url: str, payload: Any, headers: Mapping[str, str] | None = None) -> AsyncGenerator[str, None]:
    """POST ``payload`` and yield the data of each server-sent event as it arrives. Raises ``RequestFailed``."""
    cutter = EventCutter()
    async with _exchange(url, payload, headers or {}) as exchange:
        while parts := await exchange.more():
            if exchange.status >= 400:
                raise _refusal(exchange.status, b"".join([part for _, part in (*parts, *await exchange.whole())]))
            for _, part in parts:
                for event in cutter.feed(part):
                    yield event.decode("utf-8", "replace")
        if exchange.status >= 400:
            raise _refusal(exchange.status, b"")
