"""The engine in a process of its own: the child's loop, and how the server starts it.

The child inherits one end of a socket pair and gets its options as the first message. It ends when that socket does, so no
engine outlives its server. It ignores SIGINT and SIGTERM on purpose: a terminal or a service manager sends them to the whole
group, and the server needs the engine until its streams are drained.
"""

import asyncio
import contextlib
import ctypes
import logging
import select
import signal
import socket
import subprocess
import sys

from minivllm import errors
from minivllm.config import Config
from minivllm.engine.client import ProcessClient
from minivllm.engine.ipc import Abort, Add, Failed, FrameReader, Start, Stop, ToEngine, encode
from minivllm.types import EngineInfo, EngineOutput, TokenEvent

log = logging.getLogger("minivllm")
_SOCKET_BUFFER_BYTES = 1 << 20
_PR_SET_PDEATHSIG = 1


async def start_engine(config: Config) -> ProcessClient:
    """Start an engine process and wait until it is ready. Raises the ``StartupError`` that it met."""
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER_BYTES)
    command = [sys.executable, "-m", "minivllm.engine.process", str(theirs.fileno())]
    process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
    theirs.close()
    reader, writer = await asyncio.open_connection(sock=ours)
    client = ProcessClient(process, reader, writer)
    try:
        await client.start(config)
    except BaseException:
        await client.close()
        raise
    return client


class EngineServer:
    """The child's loop: requests from the socket, steps, outputs back. Written by the child's only thread."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._frames = FrameReader(ToEngine)  # type: ignore[arg-type]
        self._open = True

    def run(self) -> int:
        """Serve until the other side closes. Returns the exit code."""
        config = self._first_message()
        if config is None:
            return 0
        _set_up_logging(config)
        from minivllm.engine.build import build_engine  # torch is imported here, in the child only

        try:
            engine = build_engine(config)
        except errors.StartupError as error:
            self._send(Failed(type(error).__name__, str(error)))
            return error.exit_code
        self._send(engine.info)
        while self._open:
            for message in self._receive(wait=not engine.has_work):
                if isinstance(message, Add):
                    try:
                        engine.add(message.request)
                    except errors.RequestError as error:
                        event = TokenEvent(message.request.id, (), "error", error=error.message)
                        self._send(EngineOutput((event,)))
                elif isinstance(message, Abort):
                    engine.abort(message.ids)
                elif isinstance(message, Stop):
                    return 0
            if engine.has_work and (output := engine.step()) is not None:
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


def _set_up_logging(config: Config) -> None:
    logging.basicConfig(
        level=config.server.log_level.upper(), format="%(asctime)s %(levelname)s engine: %(message)s", stream=sys.stderr
    )


def _die_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies; elsewhere the closed socket does it a little later."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> int:
    """Entry of the child: ``python -m minivllm.engine.process FD``."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    _die_with_parent()
    return EngineServer(socket.socket(fileno=int(sys.argv[1]))).run()


if __name__ == "__main__":
    sys.exit(main())
