"""How requests end from outside: the client goes away, their time is over, or the server stops.

Every piece of generating work runs through ``Drain.run``: a task of its own, so that the ASGI task can listen for the
client's disconnect meanwhile and cancel the work. Cancelling leaves the mailbox of ``AsyncLLM.open``, and that aborts
the request in the engine: blocks come back whether the reply streams or not.

Stopping has two parts. After ``begin`` the server still listens, but new work is told to go elsewhere (503 and
``Connection: close``) while what runs goes on. ``cut`` ends what is left: each piece of work raises ``ServerStopped``, which
a stream turns into its last event. It knows neither sockets nor tokens.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minivllm.errors import RequestTimedOut, ServerDraining, ServerStopped
from minivllm.server.replies import error_response

T = TypeVar("T")

# Asked for until the very end: whoever watches a drain needs them, and they hold nothing.
ALWAYS_ANSWERED = ("/live", "/ready", "/metrics", "/metrics/prometheus", "/version", "/steps")


class ClientGone(Exception):
    """The client closed its connection; nobody reads an answer to this."""


class Drain:
    """Written by ``http.serve`` (``begin``, ``cut``) and by the requests that it counts; read by routes and the gate."""

    def __init__(self, request_timeout_s: float | None = None) -> None:
        self._request_timeout_s = request_timeout_s
        self.draining = False
        self.stopped = False
        self.num_open = 0  # requests being answered, probes not counted
        self.idle = asyncio.Event()  # set while num_open is 0
        self.idle.set()
        self._work: set[asyncio.Task[Any]] = set()

    def begin(self) -> None:
        """Take no new work from now on."""
        self.draining = True

    def cut(self) -> None:
        """End the work that is left; each raises ``ServerStopped``."""
        self.draining = self.stopped = True
        for task in self._work:
            task.cancel()

    def enter(self) -> None:
        """Count a request in."""
        self.num_open += 1
        self.idle.clear()

    def leave(self) -> None:
        """Count a request out."""
        self.num_open -= 1
        if not self.num_open:
            self.idle.set()

    async def run(self, work: Coroutine[Any, Any, T], receive: Receive) -> T:
        """Await ``work``, but end it when the client goes away (``ClientGone``), its time is over (``RequestTimedOut``) or the
        server stops (``ServerStopped``).

        ``receive`` must have given the whole body already: what it gives next can only be the disconnect.
        """
        if self.stopped:
            work.close()
            raise ServerStopped
        task = asyncio.create_task(work)
        watch = asyncio.create_task(_disconnected(receive))
        watch.add_done_callback(lambda _: task.cancel())
        self._work.add(task)
        try:
            async with asyncio.timeout(self._request_timeout_s) as limit:
                return await task
        except TimeoutError:
            if not limit.expired():
                raise
            raise RequestTimedOut(self._request_timeout_s or 0) from None
        except asyncio.CancelledError:
            if watch.done():
                raise ClientGone from None
            if self.stopped and task.cancelled():
                raise ServerStopped from None
            raise
        finally:
            watch.cancel()
            self._work.discard(task)


async def _disconnected(receive: Receive) -> None:
    """Return when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


class DrainGate:
    """The outermost ASGI layer: counts requests, and refuses new ones while draining. Holds no state of its own."""

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        self.app = app
        self.drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 503."""
        if scope["type"] != "http" or scope["path"] in ALWAYS_ANSWERED:
            await self.app(scope, receive, send)
        elif self.drain.draining:
            await error_response(ServerDraining(), close=True)(scope, receive, send)
        else:
            self.drain.enter()
            try:
                await self.app(scope, receive, _closing(send, self.drain))
            finally:
                self.drain.leave()


def _closing(send: Send, drain: Drain) -> Send:
    """Replies that begin while draining tell the client not to use the connection again."""

    async def wrapped(message: Message) -> None:
        if drain.draining and message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
        await send(message)

    return wrapped
