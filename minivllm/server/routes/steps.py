"""GET /steps: what the engine does, step by step, as JSON or as a stream of events.

A reader begins with a *base*, the state before the first record that it gets, and then applies records. Both come as
``observe/steps.py`` keeps them, so ten readers cost little more than one. Who reads too slowly is told to begin anew. A stream
holds one event and its socket's buffer, half a megabyte, and there are not many streams.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Final

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from minivllm.errors import InvalidRequest, TooManyReaders
from minivllm.observe.state import Snapshot
from minivllm.server.replies import encode
from minivllm.server.serving import Serving, serving
from minivllm.server.sse import WIDEN, json_event

EVERY_S: Final = 0.05  # between events
HEARTBEAT_S: Final = 15.0  # without one, for proxies that end what is silent
MOST: Final = 2**20
DEFAULT_LIMIT: Final = 256
EVENT_BYTES: Final = 256 * 2**10  # of an event, but for a single record that is longer
MOST_STREAMS: Final = 64


class Streams:
    """How many are open. Written by ``_Stream``."""

    def __init__(self) -> None:
        self.num_open = 0


class _Stream(StreamingResponse):
    """A stream that counts while it is sent, and of which the kernel may hold more than of others."""

    def __init__(self, streams: Streams, events: AsyncIterator[bytes]) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._streams = streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it until the reader or the server goes."""
        if (widen := scope.get("extensions", {}).get(WIDEN)) is not None:
            widen["call"]()
        self._streams.num_open += 1
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._streams.num_open -= 1


def router() -> APIRouter:
    """The route, and its count of streams."""
    made = APIRouter()
    made.add_api_route("/steps", partial(steps, Streams()), methods=["GET"], name="steps", description=steps.__doc__)
    return made


async def steps(streams: Streams, request: Request, since: str = "", limit: str = "", stream: str = "") -> Response:
    """Records of steps from number ``since`` on, at most ``limit``; with ``stream=true``, or where an event stream is
    accepted, all from now on as they come."""
    s = serving(request)
    if stream not in ("", "true", "false"):
        raise InvalidRequest("stream must be true or false.", "stream")
    if stream == "true" or (not stream and "text/event-stream" in request.headers.get("accept", "")):
        if since or limit:
            raise InvalidRequest("A stream of steps begins now and does not end; leave out since and limit.", "stream")
        if streams.num_open >= MOST_STREAMS:
            raise TooManyReaders(MOST_STREAMS)
        return _Stream(streams, _events(s))
    number, most = _whole(since, "since"), _whole(limit, "limit")
    kept = s.llm.steps
    page = kept.now() if most == 0 and number is None else kept.read(number, DEFAULT_LIMIT if most is None else most)
    return Response(await _body(s, page.next, page.base, page.records), media_type="application/json")


def _whole(text: str, name: str) -> int | None:
    """A parameter of the query. Raises ``InvalidRequest``."""
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise InvalidRequest(f"{name} must be a whole number, 0 or more.", name)
    return int(text)


async def _body(s: Serving, following: int, base: Snapshot | None, records: list[bytes] | None) -> bytes:
    """A JSON object for a reader. A base is written beside the event loop: it may have a million tokens."""
    info = {**msgspec.to_builtins(s.llm.info), "model": s.config.served_names[0]}
    info.pop("type")
    parts = [b'{"info":%b,"now_s":%b' % (encode(info), encode(time.monotonic()))]
    if base is not None:
        parts.append(b',"base":%b' % await asyncio.to_thread(lambda: encode(base.base())))
    if records is not None:
        parts.append(b',"steps":[%b]' % b",".join(records))
    return b"".join([*parts, b',"next":%d}' % following])


async def _events(s: Serving) -> AsyncIterator[bytes]:
    """A base, then records as they come, until the reader or the server goes."""
    kept, behind = s.llm.steps, False
    page, silent_since = kept.now(), time.monotonic()
    yield b"event: base\n" + json_event(await _body(s, page.next, page.base, None))
    while not s.drain.stopped:
        if not behind:
            await asyncio.sleep(EVERY_S)
        now = time.monotonic()
        if kept.next == page.next:
            if now - silent_since >= HEARTBEAT_S:
                silent_since = now
                yield b": nothing happens\n\n"
            continue
        silent_since, page = now, kept.read(page.next, MOST, EVENT_BYTES)
        behind = page.base is None and page.next < kept.next  # there was more than an event takes
        if page.base is None:
            yield b'event: steps\ndata: {"steps":[%b]}\n\n' % b",".join(page.records)
        else:
            page = kept.now()
            yield b"event: gap\n" + json_event(await _body(s, page.next, page.base, None))
