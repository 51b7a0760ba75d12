"""One client's connection: uvicorn's httptools protocol, with the bounds that it lacks.

Uvicorn parses HTTP and runs the application; this adds what a stranger's bytes must not decide. Bytes: the request line and
headers (and a chunked body's trailers) have one limit, counted before the parser keeps them. Time: headers have a deadline
from the first moment of waiting, also on a connection that never sends a byte; so has a reply that nobody reads. Number: a
client may queue few requests behind a running one. Whatever is refused here gets a JSON error and then a moment in which its
remaining bytes are thrown away: closing at once would reset the connection under the client's eyes before it reads why.

It leans on names inside uvicorn, checked when this module is imported.
"""

import asyncio
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from minivllm.config import ServerConfig
from minivllm.errors import HeadersTooLong, MalformedBody, RequestError, RequestTooSlow, TooManyConnections
from minivllm.server.drain import ClientGone
from minivllm.server.replies import error_body, retry_after
from minivllm.server.sse import SEND_CHUNK, WIDEN, Outwait, SendChunk

MAX_PIPELINED: Final = 8  # requests that wait behind a running one on the same connection
LINGER_S: Final = 1.0
HIGH_WATER_BYTES: Final = 2 * 2**10  # of a reply that the kernel does not take: then its stream waits
WIDE_BUFFER_BYTES: Final = 256 * 2**10  # what the kernel may hold for a reader who gets megabytes a second
NO_LINGER: Final = struct.pack("ii", 1, 0)
HEADER_OVERHEAD_BYTES: Final = 4  # ": " and CRLF

_NEEDED: Final = (
    "connection_made", "connection_lost", "data_received", "send_400_response", "on_message_begin", "on_url", "on_header",
    "on_headers_complete", "on_body", "on_message_complete", "pause_writing", "resume_writing", "on_response_complete",
    "_unset_keepalive_if_required", "_should_upgrade", "_unsupported_upgrade_warning",
)  # fmt: skip
if missing := [name for name in _NEEDED if not callable(getattr(HttpToolsProtocol, name, None))]:
    raise ImportError(f"uvicorn {uvicorn.__version__} has no HttpToolsProtocol.{missing[0]}; install uvicorn 0.54.")


def chunk_sender(cycle: RequestResponseCycle) -> SendChunk:
    """What writes a part of a chunked reply that has begun: uvicorn's ``send`` without the cases that cannot occur then, and
    without the application's layers, which look at a reply's beginning alone. Waits while the client does not read. Raises
    ``ClientGone`` when it left meanwhile."""
    flow, write = cycle.flow, cycle.transport.write

    async def writable() -> None:
        await flow.drain()
        if cycle.disconnected:
            raise ClientGone

    async def send_chunk(part: bytes, outwait: Outwait) -> None:
        if flow.write_paused and not cycle.disconnected:
            await outwait(writable)
        if not cycle.disconnected:
            write(b"%x\r\n%b\r\n" % (len(part), part))

    return send_chunk


@dataclass(frozen=True)
class Capacity:
    """How many connections there may be."""

    most: int  # that are served
    spare: int  # beyond these: they are told that there are too many; still more are not taken (``listen.py``)
    on_refusal: Callable[[str], None]


class Connection(HttpToolsProtocol):
    """Written by the event loop that owns its socket, and by nobody else."""

    def __init__(self, limits: ServerConfig, capacity: Capacity, **uvicorn_values: Any) -> None:
        super().__init__(**uvicorn_values)
        self._limits = limits
        self._capacity = capacity
        self._kept_bytes = 0  # received since the parser last finished something: what it must be holding
        self._head_bytes = 0  # of the message being parsed: request line, headers, trailers
        self._in_head = False
        self._refused = False
        self._answering: RequestResponseCycle | None = None  # ``cycle`` is the latest request, which may wait behind this one
        self._head_deadline: asyncio.TimerHandle | None = None
        self._write_deadline: asyncio.TimerHandle | None = None

    @property
    def _busy(self) -> bool:
        """A request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=HIGH_WATER_BYTES)
        if len(self.connections) <= self._capacity.most:
            self._await_head()
        else:
            self._capacity.on_refusal("connections")
            self._refuse(TooManyConnections())

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget every deadline, and let every request know; uvicorn tells only the latest."""
        self._stop_timers()
        super().connection_lost(exc)
        self._tell_all()

    def _tell_all(self) -> None:
        """To every request of this connection its client is gone."""
        for cycle in (self._answering, *(waiting for waiting, _ in self.pipeline)):
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()

    def data_received(self, data: bytes) -> None:
        """Parse, within the bounds."""
        if self._refused:
            return
        self._kept_bytes += len(data)
        super().data_received(data)
        if self._refused or self.parser is None or self.transport.is_closing():
            return
        if max(self._kept_bytes, self._head_bytes) > self._limits.max_header_bytes:
            self._refuse(HeadersTooLong(self._limits.max_header_bytes))
        elif not self._busy:
            self._await_head()

    def send_400_response(self, msg: str) -> None:
        """Uvicorn found bytes that are not HTTP."""
        self._refuse(MalformedBody("The bytes received are not an HTTP/1.1 request; send one."))

    def _should_upgrade(self) -> bool:
        """Nothing but HTTP is spoken here, and a stranger's wish for more is not worth a line of the log."""
        return False

    def _unsupported_upgrade_warning(self) -> None:
        """See above."""

    # What the parser calls.

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._head_bytes = 0
        self._in_head = True

    def on_url(self, url: bytes) -> None:
        """A part of the request line."""
        self._head_bytes += len(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A whole header; after the body a trailer, which is counted and dropped: the application has begun already."""
        self._head_bytes += len(name) + len(value) + HEADER_OVERHEAD_BYTES
        if self._in_head and self._head_bytes <= self._limits.max_header_bytes:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The request can be answered, if it is short enough and its turn is near."""
        self._in_head = False
        self._kept_bytes = 0
        if self._head_deadline is not None:
            self._head_deadline.cancel()
            self._head_deadline = None
        if self._head_bytes > self._limits.max_header_bytes:
            self._refuse(HeadersTooLong(self._limits.max_header_bytes))
        elif len(self.pipeline) >= MAX_PIPELINED:
            self._refuse(MalformedBody(f"At most {MAX_PIPELINED} requests may wait on one connection."))
        if not self._refused:
            super().on_headers_complete()
            if not self.pipeline:
                self._answering = self.cycle
            self.scope["extensions"] = {SEND_CHUNK: {"send": chunk_sender(self.cycle)}, WIDEN: {"call": self._widen}}
            if self.parser.should_upgrade():  # nothing else is spoken here, and what follows would not be parsed
                self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        self._kept_bytes = 0
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is whole."""
        self._kept_bytes = self._head_bytes = 0
        if not self._refused:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """The next request that waits has its turn."""
        self._answering = self.pipeline[-1][0] if self.pipeline else None
        super().on_response_complete()

    # Deadlines.

    def _await_head(self) -> None:
        """From now on the client has its time to send headers; asking again does not give more."""
        if self._head_deadline is None:
            self._head_deadline = self.loop.call_later(self._limits.header_timeout_s, self._head_late)

    def _head_late(self) -> None:
        """Refuse a request that began and stopped; a connection that is merely idle is closed without a word."""
        self._head_deadline = None
        if self._busy:
            return
        if self._in_head:
            self._refuse(RequestTooSlow("headers", self._limits.header_timeout_s))
        else:
            self.transport.close()

    def pause_writing(self) -> None:
        """The socket's buffer is full: the reply waits, but not for ever."""
        super().pause_writing()
        self._write_deadline = self.loop.call_later(self._limits.write_timeout_s, self._unread)

    def _unread(self) -> None:
        """Close with a reset: what the kernel holds for a client that does not read would stay there for minutes."""
        sock = self.transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
        self.transport.abort()

    def _widen(self) -> None:
        """With the buffer that suits tokens, a stream of steps waits for this loop's next turn after each 32 KiB."""
        sock = self.transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, WIDE_BUFFER_BYTES)

    def resume_writing(self) -> None:
        """The client reads again."""
        if self._write_deadline is not None:
            self._write_deadline.cancel()
            self._write_deadline = None
        super().resume_writing()

    def _stop_timers(self) -> None:
        for timer in (self._head_deadline, self._write_deadline):
            if timer is not None:
                timer.cancel()
        self._head_deadline = self._write_deadline = None

    def _refuse(self, error: RequestError) -> None:
        """Answer ``error``, then close. A reply that is on its way already cannot be followed by it, so that one breaks."""
        self._refused = True
        self._stop_timers()
        self._unset_keepalive_if_required()
        if self.transport.is_closing() or (self._busy and (self.pipeline or self.cycle.response_started)):
            self._tell_all()
            self.transport.abort()
            return
        self._tell_all()  # to the application this is a client that left
        body = error_body(error)
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n" % len(body)
        if (wait_s := retry_after(error)) is not None:
            head += b"retry-after: %d\r\n" % wait_s
        self.transport.write(STATUS_LINE[error.status] + head + b"\r\n" + body)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(LINGER_S, self.transport.abort)
