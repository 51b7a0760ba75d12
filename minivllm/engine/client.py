"""The seam between the faces and the engine: the same calls whether it runs here or in another process (``supervisor.py``)."""

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from minivllm import errors
from minivllm.engine.engine import Engine
from minivllm.types import EngineHealth, EngineInfo, EngineOutput, GenerateRequest, TokenEvent


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

    @property
    def health(self) -> EngineHealth:
        """It lives as long as this process does."""
        return EngineHealth(up=True)

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
                refused.append(TokenEvent(item.id, (), "error", error=error.message))
        return EngineOutput(tuple(refused)) if refused else self._engine.step()

    async def close(self) -> None:
        """Nothing runs unless somebody waits for outputs."""
