"""The engine in a process of its own: the loop between its socket and its steps.

It gets its options as the first message. Signals do not end it, the end of its socket does (``child.py``). Who starts it is
told in ``zygote.py``.
"""

import logging
import select
import socket
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Final, Protocol

import msgspec

from minivllm import errors
from minivllm.child import FrameReader, encode
from minivllm.config import Config
from minivllm.engine.client import Steers, obey
from minivllm.engine.ipc import Abort, Add, Beat, Failed, FromEngine, Launching, Pause, Resume, Start, Stop, ToEngine
from minivllm.heap import give_back
from minivllm.records import EngineOutput
from minivllm.types import REFUSED, EngineInfo, GenerateRequest, TokenEvent

log = logging.getLogger("minivllm")
COMPILE_S: Final = 12.0  # of a kernel that was not compiled beforehand: expected, and waited for five times as long
BEAT_S: Final = 1.0  # between words of an engine that has work but nothing to say
IDLE_S: Final = 0.5  # without work, after which freed memory is given back


class Steps(Steers, Protocol):
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

    def step(self) -> EngineOutput | None:
        """Go on by a step. None: nothing to say yet."""
        ...

    def prepare_more(self) -> bool:
        """While there is no work: make later steps faster, a little at a time. False: nothing is left to make."""
        ...

    def watch(self, announce: "Announce") -> None:
        """Call this before the launch of a step that somebody should know of: with the requests that join the batch, and how
        long the step is expected to take, in seconds."""
        ...


Announce = Callable[[tuple[str, ...], float], None]


class EngineServer:
    """Requests from the socket, steps, outputs back. Written by the engine process's first thread."""

    def __init__(self, sock: socket.socket, build: Callable[[Config], Steps], spare_bytes: int = 0) -> None:
        """``spare_bytes``: of the process that this one was forked from."""
        self._sock = sock
        self._build = build
        self._spare_bytes = spare_bytes
        self._said_s = 0.0  # when something was last sent
        self._frames = FrameReader(ToEngine)  # type: ignore[arg-type]
        self._open = True
        self._tidy = True  # nothing was computed since memory was given back

    def run(self) -> int:
        """Serve until the other side closes. Returns the exit code."""
        config = self._first_message()
        if config is None:
            return 0
        try:
            engine = self._build(config)
        except errors.StartupError as error:
            self._send(Failed(type(error).__name__, str(error)))
            return error.exit_code
        self._send(msgspec.structs.replace(engine.info, spare_bytes=self._spare_bytes))
        engine.watch(lambda ids, expected_s: self._send(Launching(ids, expected_s)))
        if engine.info.device != "cpu":
            _on_compile(lambda: self._send(Launching((), COMPILE_S)))
        more = True  # something is left to prepare
        while self._open:
            for message in self._receive(wait=not (engine.has_work or more)):
                if isinstance(message, Add):
                    try:
                        engine.add(message.request)
                    except errors.RequestError as error:
                        event = TokenEvent(message.request.id, (), "error", REFUSED, error=error.message)
                        self._send(EngineOutput((event,)))
                elif isinstance(message, Abort | Pause | Resume):
                    obey(engine, message)
                elif isinstance(message, Stop):
                    return 0
            if not engine.has_work:
                more = more and engine.prepare_more()
            elif (code := self._step(engine)) is not None:
                return code
        return 0

    def _step(self, engine: Steps) -> int | None:
        """Go on by a step, and tell what came of it. An exit code: this process is good for nothing more."""
        self._tidy = False
        try:
            output = engine.step()
        except errors.DeviceLost as lost:
            log.critical("%s This process ends with exit code %d.", lost, lost.exit_code)
            return lost.exit_code
        if output is not None:
            self._send(output)
        elif time.monotonic() - self._said_s > BEAT_S:
            self._send(Beat())
        return None

    def _first_message(self) -> Config | None:
        while self._open:
            for message in self._receive(wait=True):
                if isinstance(message, Start):
                    return message.config
        return None

    def _receive(self, wait: bool) -> list[object]:
        """Messages that are there; with ``wait``, at least one chunk of bytes is waited for."""
        messages: list[object] = []
        if wait and not self._tidy and not self._readable(IDLE_S):
            give_back()
            self._tidy = True
        while self._open and self._readable(None if wait else 0):
            data = self._sock.recv(1 << 16)
            self._open = bool(data)
            messages += self._frames.feed(data)
            wait = False
        return messages

    def _readable(self, timeout_s: float | None) -> bool:
        return bool(select.select([self._sock], [], [], timeout_s)[0])

    def _send(self, message: FromEngine) -> None:
        self._said_s = time.monotonic()
        try:
            self._sock.sendall(encode(message))
        except (BrokenPipeError, ConnectionResetError):
            self._open = False


def _on_compile(begins: Callable[[], None]) -> None:
    """Call this before Triton compiles a kernel, if Triton is there: a step in which one is compiled takes long."""
    if find_spec("triton") is None:
        return
    import triton

    def hook(**_: object) -> bool:
        begins()
        return False  # go on and compile

    triton.knobs.runtime.jit_cache_hook = hook
