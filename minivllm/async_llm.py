"""``AsyncLLM``: what the server holds. Requests in, text out, for many callers in one event loop.

One task (``run``) reads the engine's messages, turns tokens into text and puts it into each request's outbox. An outbox holds
one merged output, not a queue: a reader that lags gets more text in one piece, and costs no more memory than its text.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncGenerator, Sequence

import msgspec

from minivllm.config import Config
from minivllm.door import check_prompt, settle
from minivllm.engine.client import EngineClient
from minivllm.errors import EngineDead, GenerationFailed, InvalidRequest, ServerOverloaded
from minivllm.observe.metrics import Metrics
from minivllm.text.outputs import OutputProcessor
from minivllm.text.tokenizer import Tokenizer
from minivllm.types import EngineInfo, GenerateRequest, RequestOutput, SamplingParams

log = logging.getLogger("minivllm")


class _Outbox:
    """New output of one request that its reader has not taken yet. Written by ``AsyncLLM.run``, emptied by the reader."""

    def __init__(self) -> None:
        self._ready = asyncio.Event()
        self._output: RequestOutput | None = None
        self._error: GenerationFailed | None = None

    def put(self, output: RequestOutput) -> None:
        """Add output to what waits already."""
        waiting = self._output
        if waiting is not None:
            output = msgspec.structs.replace(
                output, text=waiting.text + output.text, token_ids=waiting.token_ids + output.token_ids
            )
        self._output = output
        self._ready.set()

    def fail(self, error: GenerationFailed) -> None:
        """Nothing more will come."""
        self._error = error
        self._ready.set()

    async def take(self) -> RequestOutput:
        """Everything that is there, waiting until there is something. Raises what ``fail`` was given."""
        await self._ready.wait()
        if self._output is None and self._error is not None:
            raise self._error
        output, self._output = self._output, None
        if self._error is None:
            self._ready.clear()
        if output is None:
            raise RuntimeError("an outbox was ready but empty")
        return output


class AsyncLLM:
    """The engine for an event loop. Written by that loop alone; ``run`` must be running as a task."""

    def __init__(self, client: EngineClient, tokenizer: Tokenizer, config: Config, metrics: Metrics) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.metrics = metrics
        self.alive = True
        self._client = client
        self._outputs = OutputProcessor(tokenizer)
        self._outboxes: dict[str, _Outbox] = {}
        self._seeds = random.Random(config.model.seed)

    @property
    def info(self) -> EngineInfo:
        """What the engine settled on at start."""
        return self._client.info

    @property
    def num_open(self) -> int:
        """Requests that are not finished."""
        return len(self._outboxes)

    async def run(self) -> None:
        """Bring the engine's outputs to their readers until the engine ends; then every reader gets ``EngineDead``."""
        try:
            while True:
                message = await self._client.outputs()
                if message.record is not None:
                    self.metrics.observe(message.record)
                outputs, to_abort = self._outputs.process(message.events)
                if to_abort:
                    self._client.abort(to_abort)
                for output in outputs:
                    if (outbox := self._outboxes.get(output.id)) is not None:
                        outbox.put(output)
        except EngineDead:
            log.error("the engine process has ended")
        finally:
            self.alive = False
            for outbox in self._outboxes.values():
                outbox.fail(EngineDead())

    async def generate(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
    ) -> AsyncGenerator[RequestOutput, None]:
        """Generate for one prompt, yielding new text as it comes; the last output has a ``finish_reason``.

        Closing or cancelling the generator ends the request in the engine. Raises ``RequestError`` subclasses: before the first
        output for a request that is refused, later when the engine could not finish it.
        """
        request = self._accept(request_id, prompt_ids, sampling, priority, cache_salt)
        outbox = self._outboxes[request.id] = _Outbox()
        self._outputs.add(request.id, request.prompt_ids, request.sampling)
        self._client.add(request)
        finished = False
        try:
            while not finished:
                output = await outbox.take()
                finished = output.finish_reason is not None
                if output.finish_reason == "error":
                    raise GenerationFailed(output.error or "The engine could not compute this request; try it again.")
                yield output
        finally:
            del self._outboxes[request.id]
            self._outputs.drop(request.id)
            if not finished and self.alive:
                self._client.abort([request.id])

    def _accept(
        self, request_id: str, prompt_ids: Sequence[int], sampling: SamplingParams, priority: int, cache_salt: str
    ) -> GenerateRequest:
        """The request as the engine takes it, or the ``RequestError`` why not."""
        if not self.alive:
            raise EngineDead
        if self.num_open >= self.config.server.max_waiting_requests:
            raise ServerOverloaded
        if request_id in self._outboxes:
            raise InvalidRequest("A request with this id is running already; use another id.", "request_id")
        check_prompt(prompt_ids, self.info.vocab_size)
        return GenerateRequest(
            id=request_id,
            prompt_ids=tuple(prompt_ids),
            sampling=settle(sampling, len(prompt_ids), self.info.max_model_len, self._seeds.getrandbits(63)),
            arrival_s=time.monotonic(),
            priority=priority,
            cache_salt=cache_salt,
        )

    async def close(self) -> None:
        """Stop the engine."""
        with contextlib.suppress(ConnectionError):
            await self._client.close()
