"""The server: it listens, it stops well, and it says with its exit code why.

Uvicorn's own server closes its listener at the first SIGTERM, so that clients are refused by the kernel while requests still
run. This one keeps listening while it drains: what runs goes on, what is new is told 503 and where the fault lies. When the
time is over, or at a second signal, what is left gets its last event and the server ends. A dead engine ends the server
too, with another exit code, so that a service manager starts it again.
"""

import asyncio
import contextlib
import faulthandler
import logging
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from email.utils import formatdate
from typing import TYPE_CHECKING, Final

import uvicorn
from fastapi import FastAPI
from uvicorn.server import ServerState

from minivllm.config import Config, ServerConfig
from minivllm.heap import give_back
from minivllm.server.application import create_metrics_app
from minivllm.server.connection import Capacity, Connection
from minivllm.server.drain import Drain
from minivllm.server.listen import Door, bind
from minivllm.server.serving import Serving

if TYPE_CHECKING:
    from minivllm.async_llm import AsyncLLM

KEPT_FILES: Final = 256  # of the limit: children's sockets, files being read, connections that are told of too many
TICK_S: Final = 1.0  # the Date header's resolution
LOG_EVERY_S: Final = 10.0
STUCK_S: Final = 10.0  # a loop that did not turn for so long: where each thread is goes to standard error
LAST_WORDS_S: Final = 2.0  # for streams to write their last event, and then for sockets to send it
STOPPED, ENGINE_DIED = 0, 1  # exit codes
logger = logging.getLogger("minivllm.server")


class Server:
    """A listening socket and its connections, and a second one for the metrics if they have a port of their own. Written by
    ``serve``; others may read ``url`` and call ``stop``."""

    def __init__(self, app: FastAPI, limits: ServerConfig) -> None:
        self.limits = limits
        self.metrics: Server | None = None
        if limits.metrics_port is not None:
            place = replace(limits, host=limits.metrics_host, port=limits.metrics_port, metrics_port=None)
            self.metrics = Server(create_metrics_app(app.state.serving), place)
        self.stopping = asyncio.Event()
        self.hurry = asyncio.Event()  # a second wish to stop: now
        serving = _serving_of(app)
        self.drain: Drain = serving.drain
        self._capacity = capacity_of(limits.max_connections, serving.llm.metrics.reject)
        self._state = ServerState()
        self._door: Door | None = None
        self._uvicorn = uvicorn.Config(
            app,
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=limits.access_log,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=limits.keep_alive_timeout_s,  # type: ignore[arg-type]
        )
        self._uvicorn.load()

    def listen(self) -> None:
        """Take connections. Raises ``PortInUse``."""
        most, state = self._capacity.most + self._capacity.spare, self._state
        self._door = Door(bind(self.limits.host, self.limits.port), self._connect, lambda: len(state.connections), most)
        logger.info("At most %d connections are served at once", self._capacity.most)
        if self.metrics is not None:
            self.metrics.listen()

    def _connect(self) -> Connection:
        return Connection(self.limits, self._capacity, config=self._uvicorn, server_state=self._state, app_state={})

    @property
    def port(self) -> int:
        """The port that is listened on, also where 0 was asked for."""
        if self._door is None:
            raise RuntimeError("the server does not listen yet")
        return self._door.port

    @property
    def url(self) -> str:
        """Where the server answers."""
        host = self.limits.host
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
        return f"http://{host}:{self.port}"

    def stop(self) -> None:
        """Begin to drain; called again, stop now. To be called in the server's event loop, as signal handlers are."""
        (self.hurry if self.stopping.is_set() else self.stopping).set()

    def tick(self) -> None:
        """Bring the Date header of replies up to date."""
        self._state.default_headers = [(b"date", formatdate(usegmt=True).encode())]
        if self.metrics is not None:
            self.metrics.tick()

    async def close(self) -> None:
        """Stop listening and end every connection, those that still send first getting a moment to do so."""
        if self.metrics is not None:
            await self.metrics.close()
        if self._door is not None:
            self._door.close()
        for connection in list(self._state.connections):
            connection.transport.close()
        for _ in range(20):
            if not self._state.connections and not self._state.tasks:
                return
            await asyncio.sleep(LAST_WORDS_S / 20)
        for connection in list(self._state.connections):
            connection.transport.abort()
        for task in list(self._state.tasks):
            task.cancel()


def capacity_of(asked: int | None, on_refusal: Callable[[str], None]) -> Capacity:
    """Connections that leave some of the files that this process may open: at the limit nobody could be told anything, and
    accepting would fail over and over."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    allowed = 2**20 if limit == resource.RLIM_INFINITY else max(limit - KEPT_FILES, limit // 2)
    return Capacity(allowed if asked is None else min(asked, allowed), min(KEPT_FILES, limit // 2) // 2, on_refusal)


def _serving_of(app: FastAPI) -> Serving:
    """What the app's routes look at."""
    value = app.state.serving
    if not isinstance(value, Serving):
        raise TypeError("the app was not made by create_app")
    return value


async def serve(
    app: FastAPI, config: Config, llm: "AsyncLLM", on_ready: Callable[[Server], None] | None = None
) -> int:
    """Serve ``app`` until a signal or the engine's death, and return the exit code: 0 only for a wanted stop.

    Runs ``llm.run()`` as a task meanwhile, but does not close ``llm``. SIGTERM and SIGINT drain, a second one hurries; signals
    are handled only in the main thread. ``on_ready`` is called once connections are taken. Raises ``PortInUse``.
    """
    server = Server(app, config.server)
    server.tick()
    server.listen()
    pump = asyncio.create_task(llm.run())
    llm.helpers.begin()
    with _signals(server):
        try:
            if on_ready is not None:
                on_ready(server)
            await _until_stopped(server, llm, pump)
            alive = llm.alive and not pump.done()
            await (_drained(server, pump) if alive else _buried(server, pump))
            return STOPPED if llm.alive and not pump.done() else ENGINE_DIED
        finally:
            await server.close()
            pump.cancel()
            await asyncio.wait({pump})


async def _until_stopped(server: Server, llm: "AsyncLLM", pump: "asyncio.Task[None]") -> None:
    """Return when somebody wants to stop or the engine is dead; keep the clock and the log meanwhile."""
    stopping = asyncio.create_task(server.stopping.wait())
    loop = asyncio.get_running_loop()
    next_line_s = loop.time() + LOG_EVERY_S
    tidy = True  # nobody asked for anything since memory was given back
    while not stopping.done() and not pump.done() and llm.alive:
        await asyncio.wait({stopping, pump}, timeout=TICK_S, return_when=asyncio.FIRST_COMPLETED)
        server.tick()
        if server.drain.num_open:
            tidy = False
        elif not tidy:
            give_back()
            tidy = True
        if sys.__stderr__ is not None:  # the process's own: who embeds a server may have put anything in its place
            faulthandler.dump_traceback_later(STUCK_S, file=sys.__stderr__)  # unless this loop turns before
        if loop.time() >= next_line_s:
            next_line_s += LOG_EVERY_S
            line, busy = llm.metrics.log_line()
            logger.log(logging.INFO if busy else logging.DEBUG, line)
    faulthandler.cancel_dump_traceback_later()
    stopping.cancel()


async def _drained(server: Server, pump: "asyncio.Task[None]") -> None:
    """Let what runs finish, within its time; then end the rest."""
    drain, limit_s = server.drain, server.limits.shutdown_timeout_s
    drain.begin()
    logger.info("Stopping: %d requests have %g s to finish; a second signal ends them now", drain.num_open, limit_s)
    done = {asyncio.create_task(drain.idle.wait()), asyncio.create_task(server.hurry.wait())}
    await asyncio.wait({*done, pump}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.cancel()
    if drain.num_open and not pump.done():
        logger.warning("Ending %d requests that did not finish", drain.num_open)
        drain.cut()
    await _last_words(drain)


async def _buried(server: Server, pump: "asyncio.Task[None]") -> None:
    """The engine is dead: every request learns of it from its own mailbox."""
    logger.error("The engine has ended; the server ends too", exc_info=pump.exception() if pump.done() else None)
    server.drain.begin()
    await _last_words(server.drain)


async def _last_words(drain: Drain) -> None:
    """Wait a moment for requests that are about to end."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(drain.idle.wait(), LAST_WORDS_S)


@contextlib.contextmanager
def _signals(server: Server) -> Iterator[None]:
    """SIGTERM and SIGINT stop the server inside this block, if it runs in the main thread."""
    loop = asyncio.get_running_loop()
    wanted = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    for number in wanted:
        loop.add_signal_handler(number, server.stop)
    try:
        yield
    finally:
        for number in wanted:
            loop.remove_signal_handler(number)
