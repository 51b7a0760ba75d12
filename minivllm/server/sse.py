r"""Server-sent events: how events are written, and the response that streams them.

An event is ``data: <text>`` lines and an empty line. A line break inside the text would end the line, so the text is cut at
LF, CR and CRLF and each part gets its own ``data:``; a client joins the parts with LF. CR and CRLF therefore arrive as LF.

The response waits a moment for the first event before it sends its status line: an error at the door (prompt too long,
queue full) still has its own status then. After the status line an error can only be an event. Slow readers cost no
memory: ``send`` waits while the socket's buffer is full, nobody asks the generator for more meanwhile, and ``AsyncLLM``
merges what the engine makes into one piece.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from minivllm.errors import GenerationFailed, RequestError
from minivllm.server.drain import ClientGone, Drain

STATUS_AFTER_S = 1.0  # a request that is still queued then gets its 200 before its first token
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


class EventStream(Response):
    """Streams what ``events`` yields; ``fail`` makes the last bytes of a stream that breaks.

    Closes ``events`` in every case: at its end, on an error, when the client goes away and when the server stops.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes], fail: Callable[[RequestError], bytes], drain: Drain) -> None:
        super().__init__(None, headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]  # not known
        self._events = events
        self._fail = fail
        self._drain = drain
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream to the end. Raises a ``RequestError`` only before the first byte, so that it can still have its status."""
        error: RequestError
        try:
            await self._drain.run(self._stream(send), receive)
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
        await send({"type": "http.response.body", "body": self._fail(error)})

    async def _stream(self, send: Send) -> None:
        """Status line, every event, end."""
        async with contextlib.aclosing(self._events) as events:
            first = asyncio.create_task(_first(events))
            try:
                await asyncio.wait({first}, timeout=STATUS_AFTER_S)
                if first.done():
                    first.result()  # raises what went wrong at the door
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                self._started = True
                await _send_chunk(send, await first)
            finally:
                first.cancel()
                await asyncio.wait({first})  # a generator cannot be closed while it runs
            async for chunk in events:
                await _send_chunk(send, chunk)
        await send({"type": "http.response.body", "body": b""})


async def _send_chunk(send: Send, chunk: bytes) -> None:
    if chunk:
        await send({"type": "http.response.body", "body": chunk, "more_body": True})


async def _first(events: AsyncGenerator[bytes]) -> bytes:
    """The first event, or nothing where there is none."""
    return await anext(events, b"")
