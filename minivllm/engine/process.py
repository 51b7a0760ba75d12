"""The engine in a process of its own: the child's loop, and how the server starts it.

The child gets its options as the first message. Signals do not end it, the end of its socket does (``child.py``).
"""

import logging
import select
import socket
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Protocol

from minivllm import errors
from minivllm.child import FrameReader, be_child, encode, start_child
from minivllm.config import Config
from minivllm.engine.client import ProcessClient
from minivllm.engine.ipc import Abort, Add, Failed, Start, Stop, ToEngine
from minivllm.logs import set_up_logging
from minivllm.types import REFUSED, EngineInfo, EngineOutput, GenerateRequest, TokenEvent

log = logging.getLogger("minivllm")
PROGRAM: Final = ("-m", "minivllm.engine.process")  # what Python runs in the child; the socket's number is appended


class Steps(Protocol):
    """What the child's loop drives: ``engine.Engine``, or something in its place that measures what is around it."""

    @property
    def info(self) -> EngineInfo:
        """What was settled on at start."""
        ...

    @property
    def has_work(self) -> bool:
        """True while ``step`` has something to do."""
        ...

    def add(self, request: GenerateRequest) -> None:
        """Queue a request; raises ``RequestError`` for one that can never run."""
        ...

    def abort(self, ids: Iterable[str]) -> None:
        """End requests."""
        ...

    def step(self) -> EngineOutput | None:
        """Go on by a step. None: nothing to say yet."""
        ...

    def prepare_more(self) -> bool:
        """While there is no work: make later steps faster, a little at a time. False: nothing is left to make."""
        ...


async def start_engine(config: Config, program: Sequence[str] = PROGRAM) -> ProcessClient:
    """Start an engine process and wait until it is ready. Raises the ``StartupError`` that it met."""
    process, reader, writer = await start_child(program)
    client = ProcessClient(process, reader, writer)
    try:
        await client.start(config)
    except BaseException:
        await client.close()
        raise
    return client


class EngineServer:
    """The child's loop: requests from the socket, steps, outputs back. Written by the child's only thread."""

    def __init__(self, sock: socket.socket, build: Callable[[Config], Steps]) -> None:
        self._sock = sock
        self._build = build
        self._frames = FrameReader(ToEngine)  # type: ignore[arg-type]
        self._open = True

    def run(self) -> int:
        """Serve until the other side closes. Returns the exit code."""
        config = self._first_message()
        if config is None:
            return 0
        set_up_logging(config.server.log_level, config.server.log_format, "engine")
        try:
            engine = self._build(config)
        except errors.StartupError as error:
            self._send(Failed(type(error).__name__, str(error)))
            return error.exit_code
        self._send(engine.info)
        more = True  # something is left to prepare
        while self._open:
            for message in self._receive(wait=not (engine.has_work or more)):
                if isinstance(message, Add):
                    try:
                        engine.add(message.request)
                    except errors.RequestError as error:
                        event = TokenEvent(message.request.id, (), "error", REFUSED, error=error.message)
                        self._send(EngineOutput((event,)))
                elif isinstance(message, Abort):
                    engine.abort(message.ids)
                elif isinstance(message, Stop):
                    return 0
            if not engine.has_work:
                more = more and engine.prepare_more()
            elif (output := engine.step()) is not None:
                self._send(output)
        return 0

    def _first_message(self) -> Config | None:
        while self._open:
            for message in self._receive(wait=True):
                if isinstance(message, Start):
                    return message.config
        return None

    def _receive(self, wait: bool) -> list[object]:
        """Messages that are there; with ``wait``, at least one chunk of bytes is waited for."""
        messages: list[object] = []
        while self._open and select.select([self._sock], [], [], None if wait else 0)[0]:
            data = self._sock.recv(1 << 16)
            self._open = bool(data)
            messages += self._frames.feed(data)
            wait = False
        return messages

    def _send(self, message: EngineInfo | EngineOutput | Failed) -> None:
        try:
            self._sock.sendall(encode(message))
        except (BrokenPipeError, ConnectionResetError):
            self._open = False


def serve_steps(descriptor: int, build: Callable[[Config], Steps]) -> int:
    """Be the child: serve what ``build`` makes over an inherited socket until it closes. Returns the exit code."""
    return EngineServer(be_child(descriptor), build).run()


def _build_engine(config: Config) -> Steps:
    """The real engine; torch is imported here, in the child only."""
    from minivllm.engine.build import build_engine

    return build_engine(config)


def main() -> int:
    """Entry of the child: ``python -m minivllm.engine.process FD``."""
    return serve_steps(int(sys.argv[1]), _build_engine)


if __name__ == "__main__":
    sys.exit(main())
