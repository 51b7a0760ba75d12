"""Whether this server serves: three questions, and answers that cannot be true of a server that does not.

* *live*: the event loop answers. Nothing more; a server that is not live is to be killed.
* *ready*: the engine is there and gets on (``EngineHealth``), the queue has room, and the server does not stop. A server that
  is not ready gets no new requests from a balancer, and needs no more than time.
* *healthy*: a token came a moment ago. Any request's token shows it; when there was none, a request of our own is sent all the
  way (queue, step, sampler, text) and has to bring one. Others keep a row and a block for such a canary; here it waits only
  where every row is busy, and busy rows bring tokens themselves.
"""

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final
from uuid import uuid4

from minivllm.async_llm import Order
from minivllm.errors import RequestError
from minivllm.server.drain import Drain
from minivllm.types import SamplingParams

if TYPE_CHECKING:
    from minivllm.async_llm import AsyncLLM

FRESH_S: Final = 5.0  # a token of that age shows health
CANARY_S: Final = 15.0  # within which a canary's token must come: an engine that died meanwhile is back by then
CANARY: Final = "canary-"  # how the ids of such requests begin; users' never do


class Health:
    """Written by the server's event loop. ``full``: whether the queue has no room."""

    def __init__(self, llm: "AsyncLLM", drain: Drain, full: Callable[[], bool]) -> None:
        self._llm = llm
        self._drain = drain
        self._full = full
        self._canary: asyncio.Task[bool] | None = None

    def why_not_ready(self) -> str | None:
        """One sentence; None: ready."""
        if self._drain.draining:
            return "The server is shutting down."
        if not self._llm.alive or not self._llm.health.up:
            return "The engine is not there, or says nothing though it has work."
        return "The queue is full." if self._full() else None

    async def healthy(self) -> bool:
        """See above. Waits while a canary is on its way; all who ask meanwhile wait for the same one."""
        if not self._llm.alive:
            return False
        if time.monotonic() - self._llm.last_token_s < FRESH_S:
            return True
        if self._canary is None or self._canary.done():
            self._canary = asyncio.create_task(self._send_canary())
        return await asyncio.shield(self._canary)

    async def _send_canary(self) -> bool:
        """Whether it brought a token."""
        sampling = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
        try:
            with self._llm.open([Order(CANARY + uuid4().hex, self._prompt, sampling)]) as mailbox:
                async with asyncio.timeout(CANARY_S):
                    await mailbox.whole()
        except (TimeoutError, RequestError):
            return False
        return True

    @property
    def _prompt(self) -> list[int]:
        return self._llm.tokenizer.encode("Hello", add_special_tokens=True)[:8] or [0]
