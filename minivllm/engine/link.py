"""The server's ends of its connections to a zygote and to the engine that the zygote forked."""

import asyncio
import contextlib
import socket
import subprocess
from collections import deque
from collections.abc import Sequence

import msgspec

from minivllm import errors
from minivllm.child import READ_BYTES, FrameReader, encode, pair, spawn
from minivllm.config import Config, environment_with
from minivllm.engine.ipc import Failed, FromEngine, Hatch, Kill, Prepare, Start, Stop, ToEngine
from minivllm.engine.zygote import ENVIRONMENT
from minivllm.types import EngineInfo

_STOP_TIMEOUT_S = 5.0


class EngineLink:
    """One engine process, from its fork to its end. Written by the server's event loop."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._frames = FrameReader(FromEngine)  # type: ignore[arg-type]
        self._inbox: deque[object] = deque()

    def send(self, message: ToEngine) -> None:
        """Never waits: asyncio buffers what the socket does not take, and the faces bound how many requests are open."""
        if not self._writer.is_closing():
            self._writer.write(encode(message))

    async def next(self) -> object:
        """The engine's next message. Raises ``EngineDead`` at end-of-file, and when what comes is no message: then nothing
        that it says can be trusted."""
        while not self._inbox:
            try:
                data = await self._reader.read(READ_BYTES)
            except OSError:  # a broken pipe, when we wrote last
                data = b""
            if not data:
                raise errors.EngineDead
            try:
                self._inbox.extend(self._frames.feed(data))
            except (ValueError, msgspec.MsgspecError):
                raise errors.EngineDead from None
        return self._inbox.popleft()

    async def ready(self) -> EngineInfo:
        """Wait until the engine can take requests. Raises the ``StartupError`` that it met, or ``EngineDead``."""
        message = await self.next()
        if isinstance(message, Failed):
            raise getattr(errors, message.kind, errors.StartupError)(message.message)
        if not isinstance(message, EngineInfo):
            raise RuntimeError("the engine spoke before it was ready")
        return message

    async def stop(self) -> None:
        """Ask the engine to end, and wait a while until it has."""
        self.send(Stop())
        with contextlib.suppress(TimeoutError, errors.EngineDead):
            async with asyncio.timeout(_STOP_TIMEOUT_S):
                while True:
                    await self.next()

    def close(self) -> None:
        """Hear no more of it."""
        self._writer.close()


class Nest:
    """The zygote. Started when the first engine is wanted, and again when it has died. Written by the server's event loop."""

    def __init__(self, config: Config, program: Sequence[str]) -> None:
        self._config = config
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    async def hatch(self, config: Config) -> EngineLink:
        """Fork an engine that is to run ``config``. Raises ``EngineDead`` when there is no zygote to do it."""
        control = self._living()
        ours, theirs = pair()
        reader, writer = await asyncio.open_connection(sock=ours, limit=READ_BYTES)
        with theirs:
            try:
                socket.send_fds(control, [encode(Hatch())], [theirs.fileno()])
            except OSError:
                writer.close()
                raise errors.EngineDead from None
        link = EngineLink(reader, writer)
        link.send(Start(config.without_keys))
        return link

    def _living(self) -> socket.socket:
        """The connection to a zygote that lives, as far as can be seen."""
        if self._control is not None and self._process is not None and self._process.poll() is None:
            return self._control
        self.kill()
        ours, theirs = pair()
        self._process = spawn(self._program, theirs, environment_with(ENVIRONMENT))
        ours.sendall(encode(Prepare(self._config.without_keys)))
        self._control = ours
        return ours

    def kill_engine(self) -> None:
        """End the engine, which hangs."""
        if self._control is not None:
            with contextlib.suppress(OSError):
                self._control.send(encode(Kill()), socket.MSG_DONTWAIT)

    def kill(self) -> None:
        """End the zygote, and with it its engine."""
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._control = self._process = None

    async def close(self) -> None:
        """Let the zygote end; kill it if it does not."""
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(self._process.wait, _STOP_TIMEOUT_S)
        self.kill()
