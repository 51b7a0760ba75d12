"""The seam between the faces and the engine: the same four calls whether it runs here or in another process."""

import asyncio
import subprocess
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from minivllm import errors
from minivllm.child import READ_BYTES, FrameReader, encode
from minivllm.config import Config
from minivllm.engine.engine import Engine
from minivllm.engine.ipc import Abort, Add, Failed, FromEngine, Start, Stop, ToEngine
from minivllm.types import REFUSED, EngineInfo, EngineOutput, GenerateRequest, TokenEvent

_STOP_TIMEOUT_S = 5.0


class EngineClient(Protocol):
    """An engine, wherever it runs."""

    @property
    def info(self) -> EngineInfo:
        """What the engine settled on at start."""
        ...

    def add(self, request: GenerateRequest) -> None:
        """Hand over a request; what becomes of it comes through ``outputs``."""
        ...

    def abort(self, ids: Sequence[str]) -> None:
        """End requests; unknown ids are passed over."""
        ...

    async def outputs(self) -> EngineOutput:
        """Wait for the engine's next message. Raises ``EngineDead`` when there will be none."""
        ...

    async def close(self) -> None:
        """Stop the engine."""
        ...


class LocalClient:
    """An engine in this process, stepped in a thread while somebody waits for its outputs. For tests and notebooks: the
    steps share the interpreter with whoever serves."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._inbox: deque[GenerateRequest | tuple[str, ...]] = deque()
        self._wake = asyncio.Event()

    @property
    def info(self) -> EngineInfo:
        """What the engine settled on at start."""
        return self._engine.info

    def add(self, request: GenerateRequest) -> None:
        """Queue a request for the next step."""
        self._inbox.append(request)
        self._wake.set()

    def abort(self, ids: Sequence[str]) -> None:
        """End requests before the next step."""
        self._inbox.append(tuple(ids))
        self._wake.set()

    async def outputs(self) -> EngineOutput:
        """Step until there is something to say."""
        while True:
            if not self._inbox and not self._engine.has_work:
                self._wake.clear()
                await self._wake.wait()
            output = await asyncio.to_thread(self._turn)
            if output is not None:
                return output

    def _turn(self) -> EngineOutput | None:
        refused = []
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, tuple):
                self._engine.abort(item)
                continue
            try:
                self._engine.add(item)
            except errors.RequestError as error:
                refused.append(TokenEvent(item.id, (), "error", REFUSED, error=error.message))
        return EngineOutput(tuple(refused)) if refused else self._engine.step()

    async def close(self) -> None:
        """Nothing runs unless somebody waits for outputs."""


class ProcessClient:
    """An engine in a child process. Made by ``engine.process.start_engine``; written by the server's event loop."""

    def __init__(
        self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self._frames = FrameReader(FromEngine)  # type: ignore[arg-type]
        self._inbox: deque[object] = deque()
        self._info: EngineInfo | None = None

    @property
    def info(self) -> EngineInfo:
        """What the engine settled on at start."""
        if self._info is None:
            raise RuntimeError("the engine is not ready yet")
        return self._info

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    async def start(self, config: Config) -> None:
        """Send the options and wait until the engine is ready. Raises the ``StartupError`` that it met."""
        self._send(Start(config.without_keys))
        try:
            message = await self._next()
        except errors.EngineDead as dead:
            raise errors.StartupError(
                "The engine process ended while it was starting; its last lines are above. If the machine ran out of memory, "
                "give it a smaller model or a smaller --kv-cache-memory-bytes."
            ) from dead
        if isinstance(message, Failed):
            raise getattr(errors, message.kind, errors.StartupError)(message.message)
        if not isinstance(message, EngineInfo):
            raise RuntimeError("the engine spoke before it was ready")
        self._info = message

    def add(self, request: GenerateRequest) -> None:
        """Hand over a request."""
        self._send(Add(request))

    def abort(self, ids: Sequence[str]) -> None:
        """End requests."""
        self._send(Abort(tuple(ids)))

    def _send(self, message: ToEngine) -> None:
        """Never waits: asyncio buffers what the socket does not take, and the faces bound how many requests are open."""
        if not self._writer.is_closing():
            self._writer.write(encode(message))

    async def outputs(self) -> EngineOutput:
        """The engine's next message. Raises ``EngineDead`` at end-of-file: the process is gone."""
        message = await self._next()
        if not isinstance(message, EngineOutput):
            raise RuntimeError("the engine said something else than outputs")
        return message

    async def _next(self) -> object:
        while not self._inbox:
            try:
                data = await self._reader.read(READ_BYTES)
            except ConnectionResetError:
                data = b""
            if not data:
                raise errors.EngineDead
            self._inbox.extend(self._frames.feed(data))
        return self._inbox.popleft()

    async def close(self) -> None:
        """Ask the child to end; kill it if it does not."""
        self._send(Stop())
        self._writer.close()
        try:
            await asyncio.to_thread(self._process.wait, _STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)
