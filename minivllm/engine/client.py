"""The seam between the faces and the engine: the same calls whether it runs here or in another process (``supervisor.py``)."""

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Protocol

from minivllm import errors
from minivllm.engine.engine import Engine
from minivllm.engine.ipc import Abort, Add, Pause, Resume
from minivllm.records import EngineOutput
from minivllm.types import REFUSED, EngineHealth, EngineInfo, GenerateRequest, TokenEvent


class EngineClient(Protocol):
    """An engine, wherever it runs."""

    @property
    def info(self) -> EngineInfo:
        """What the engine settled on at start."""
        ...

    @property
    def health(self) -> EngineHealth:
        """Whether it gets on."""
        ...

    def add(self, request: GenerateRequest) -> None:
        """Hand over a request; what becomes of it comes through ``outputs``."""
        ...

    def abort(self, ids: Sequence[str]) -> None:
        """End requests; unknown ids are passed over."""
        ...

    def pause(self, ids: Sequence[str]) -> None:
        """Nobody reads what these requests say: they give their memory back and keep their tokens. Unknown ids are passed
        over."""
        ...

    def resume(self, ids: Sequence[str]) -> None:
        """Paused requests go on; other ids are passed over."""
        ...

    async def outputs(self) -> EngineOutput:
        """Wait for the engine's next message. Raises ``EngineDead`` when there will be none."""
        ...

    async def close(self) -> None:
        """Stop the engine."""
        ...


class Steers(Protocol):
    """What can be said to an engine about requests that it has."""

    def abort(self, ids: Iterable[str]) -> None:
        """End requests."""
        ...

    def pause(self, ids: Iterable[str]) -> None:
        """Stop requests; they keep their tokens."""
        ...

    def resume(self, ids: Iterable[str]) -> None:
        """Let paused requests go on."""
        ...


def obey(engine: Steers, message: Abort | Pause | Resume) -> None:
    """Do what a message says about requests."""
    if isinstance(message, Abort):
        engine.abort(message.ids)
    elif isinstance(message, Pause):
        engine.pause(message.ids)
    else:
        engine.resume(message.ids)


class LocalClient:
    """An engine in this process, stepped in a thread while somebody waits for its outputs. For tests and notebooks: the
    steps share the interpreter with whoever serves."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._inbox: deque[Add | Abort | Pause | Resume] = deque()
        self._wake = asyncio.Event()

    @property
    def info(self) -> EngineInfo:
        """What the engine settled on at start."""
        return self._engine.info

    @property
    def health(self) -> EngineHealth:
        """It lives as long as this process does."""
        return EngineHealth(up=True)

    def add(self, request: GenerateRequest) -> None:
        """Queue a request for the next step."""
        self._post(Add(request))

    def abort(self, ids: Sequence[str]) -> None:
        """End requests before the next step."""
        self._post(Abort(tuple(ids)))

    def pause(self, ids: Sequence[str]) -> None:
        """Stop requests before the next step."""
        self._post(Pause(tuple(ids)))

    def resume(self, ids: Sequence[str]) -> None:
        """Let requests go on with the next step."""
        self._post(Resume(tuple(ids)))

    def _post(self, message: Add | Abort | Pause | Resume) -> None:
        self._inbox.append(message)
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
            message = self._inbox.popleft()
            if isinstance(message, Add):
                try:
                    self._engine.add(message.request)
                except errors.RequestError as error:
                    refused.append(TokenEvent(message.request.id, (), "error", REFUSED, error=error.message))
            else:
                obey(self._engine, message)
        return EngineOutput(tuple(refused)) if refused else self._engine.step()

    async def close(self) -> None:
        """Nothing runs unless somebody waits for outputs."""
