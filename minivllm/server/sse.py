r"""Server-sent events: how events are written, and the response that streams them.

An event is ``data: <text>`` lines and an empty line. A line break inside the text would end the line, so the text is cut at
LF, CR and CRLF and each part gets its own ``data:``; a client joins the parts with LF. CR and CRLF therefore arrive as LF.

The response waits a moment for the first text before it sends its status line: an error at the door (prompt too long,
queue full) still has its own status then. After the status line an error can only be an event. A slow reader costs no more
memory than its answer: ``send`` waits while the socket's buffer is full, nobody takes from the mailbox meanwhile, and what the
engine makes is merged there. When it lasts, the engine pauses the request, which then holds none of the device's memory.

This is the path that every token takes, so it is short: one task a reply, which sleeps until its mailbox has something, and
one write for all that is there.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Protocol

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from minivllm.async_llm import Order
from minivllm.errors import GenerationFailed, RequestError
from minivllm.server.drain import ClientGone
from minivllm.server.gate import trail_of
from minivllm.server.replies import encode
from minivllm.server.serving import Serving
from minivllm.types import RequestOutput

SEND_CHUNK: Final = "minivllm.send_chunk"  # extension of the ASGI scope: "send" is a ``SendChunk`` of the connection itself
WIDEN: Final = "minivllm.widen"  # another: "call" lets the kernel hold more of this reply, for the few readers who get much
STATUS_AFTER_S = 1.0  # a request that is still queued then gets its 200 before its first token
Writable = Callable[[], Awaitable[None]]  # returns when the client reads again
Outwait = Callable[[Writable], Awaitable[None]]  # how a sender waits for that
SendChunk = Callable[[bytes, Outwait], Awaitable[None]]  # of a reply that has begun; never empty
MARK: Final = "\0text\0"
DONE = b"data: [DONE]\n\n"
logger = logging.getLogger("minivllm.server")


def json_event(body: bytes) -> bytes:
    """One event of JSON, which never holds a line break."""
    return b"data: " + body + b"\n\n"


def text_event(text: str, event: str | None = None) -> bytes:
    """One event of any text, of the given event type if there is one."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    head = f"event: {event}\n" if event else ""
    return (head + "".join(f"data: {line}\n" for line in lines) + "\n").encode()


class TextEvents:
    """Events of JSON that differ in one text alone. The rest is encoded once: ``sample`` is a chunk with ``MARK`` as its text,
    behind everything that a user can name."""

    def __init__(self, sample: msgspec.Struct) -> None:
        before, _, after = encode(sample).rpartition(encode(MARK))
        self._before = b"data: " + before
        self._after = after + b"\n\n"

    def event(self, text: str) -> bytes:
        """The event with this text."""
        return self._before + encode(text) + self._after


class Script(Protocol):
    """How one route writes its events. Made for one reply, and may remember what it wrote."""

    def piece(self, index: int, output: RequestOutput) -> bytes:
        """The events for new output of one of the reply's choices; may be nothing."""
        ...

    def end(self) -> bytes:
        """The last events of a reply that is whole."""
        ...

    def failure(self, error: RequestError) -> bytes:
        """The last events of one that broke."""
        ...


class EventStream(Response):
    """Generates for ``orders`` and streams what ``script`` writes of it.

    What still runs is ended in every case: at the end, on an error, when the client goes away and when the server stops.
    """

    media_type = "text/event-stream"

    def __init__(self, serving: Serving, orders: Sequence[Order], script: Script) -> None:
        super().__init__(None, headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]  # not known
        self._serving = serving
        self._orders = orders
        self._script = script
        self._started = False
        queue_timeout_s = serving.config.server.queue_timeout_s  # a request that waits too long gets its own status too
        self._status_after_s = STATUS_AFTER_S if queue_timeout_s is None else queue_timeout_s + STATUS_AFTER_S

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream to the end. Raises a ``RequestError`` only before the first byte, so that it can still have its status."""
        error: RequestError
        extension = scope.get("extensions", {}).get(SEND_CHUNK)
        send_chunk = _through(send) if extension is None else extension["send"]
        try:
            await self._serving.drain.run(self._stream(scope, send, send_chunk), receive)
            return
        except ClientGone:
            return
        except RequestError as e:
            if not self._started:
                raise
            error = e
        except Exception:
            logger.exception("A stream broke")
            error = GenerationFailed("The server failed while it streamed this answer; its log says why.")
            if not self._started:
                raise error from None
        await send({"type": "http.response.body", "body": self._script.failure(error)})

    async def _stream(self, scope: Scope, send: Send, send_chunk: SendChunk) -> None:
        """Status line, every event, end."""
        script = self._script
        trail = trail_of(scope)
        with self._serving.admitted(scope, self._orders) as mailbox:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._status_after_s):
                    await mailbox.wait()
            taken = mailbox.take()  # raises what went wrong at the door
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            self._started = True
            while True:
                events = b"".join([script.piece(index, output) for index, output in taken])
                if not mailbox.more:
                    break
                if events:
                    await send_chunk(events, mailbox.outwait)
                    if trail.first_text_s is None:
                        trail.first_text_s = time.monotonic()
                await mailbox.wait()
                taken = mailbox.take()
        if trail.first_text_s is None:
            trail.first_text_s = time.monotonic()
        await send({"type": "http.response.body", "body": events + script.end()})


def _through(send: Send) -> SendChunk:
    """Chunks as ASGI has them, where the connection is not ours."""

    async def send_chunk(part: bytes, outwait: Outwait) -> None:
        await outwait(lambda: send({"type": "http.response.body", "body": part, "more_body": True}))

    return send_chunk
