"""What every route needs: the served model, the options, the drain; and the steps that all generating routes share.

A route reads a body (``read_json``), makes prompts into ids (``encode``), starts generators
(``Serving.start``) and follows them together (``follow``). Nothing here knows a route's reply format.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import msgspec
from starlette.requests import Request

from minivllm.config import Config
from minivllm.errors import GenerationFailed, InvalidRequest, MalformedBody, UnknownModel
from minivllm.server.drain import ClientGone, Drain
from minivllm.server.fields import Form
from minivllm.types import RequestOutput, SamplingParams

if TYPE_CHECKING:
    from minivllm.async_llm import AsyncLLM

F = TypeVar("F", bound=msgspec.Struct)
_Arrival = tuple[int, RequestOutput] | Exception | None  # None: one generator has ended
LONG_TEXT_CHARS = 20_000  # longer texts are tokenized in a thread: some 5 ms of everybody's event loop otherwise


@dataclass(frozen=True)
class Serving:
    """What one app serves. Set once by ``create_app``; routes get it by ``serving(request)``."""

    llm: "AsyncLLM"
    config: Config
    created: int  # unix time
    drain: Drain = field(default_factory=Drain)

    def model_name(self, asked: str | None) -> str:
        """The name to answer with. Raises ``UnknownModel`` when the request asks for one that is not served."""
        names = self.config.served_names
        if asked is not None and asked not in names:
            raise UnknownModel(asked, names)
        return names[0]

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``; long texts are tokenized beside the event loop. Raises ``InvalidRequest``."""
        tokenizer = self.llm.tokenizer
        if len(text) > LONG_TEXT_CHARS:
            return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens)
        return tokenizer.encode(text, add_special_tokens)

    def room_for(self, wanted: int, num_prompt: int) -> int:
        """A route's default of output tokens, cut to what the context has left; 1 where nothing is left, which is refused."""
        return max(1, min(wanted, self.llm.info.max_model_len - num_prompt))

    def start(
        self, request_id: str, ids: Sequence[int], sampling: SamplingParams, priority: int = 0, cache_salt: str = ""
    ) -> AsyncIterator[RequestOutput]:
        """Generate from ``ids``; closing the generator aborts the request. Raises ``InvalidRequest``, now or when iterated."""
        if priority and self.config.scheduler.scheduling_policy != "priority":
            raise InvalidRequest("priority has no effect here; start the server with --scheduling-policy priority.", "priority")
        return self.llm.generate(request_id, ids, sampling, priority=priority, cache_salt=cache_salt)


def serving(request: Request) -> Serving:
    """What the app of this request serves."""
    value = request.app.state.serving
    if not isinstance(value, Serving):
        raise RuntimeError("the app was not made by create_app")
    return value


async def read_json(request: Request, form: Form[F]) -> F:
    """The body of a route that takes JSON and says so. Raises ``MalformedBody`` and what ``Form.read`` raises."""
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise MalformedBody("Unsupported Media Type: Only 'application/json' is allowed; set the Content-Type header.", "body")
    return form.read(await read_body(request))


async def read_body(request: Request) -> bytes:
    """The whole body; its length and time are bounded below (``limits.py``). Raises ``ClientGone``."""
    parts: list[bytes] = []
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


async def follow(streams: Sequence[AsyncIterator[RequestOutput]]) -> AsyncGenerator[tuple[int, RequestOutput]]:
    """The outputs of several generators as they come, each with its generator's index; ends when all have ended.

    Each generator is at most one output ahead of the reader. All are closed when this one is. Raises what they raise, and
    ``GenerationFailed`` for an output that reports an error.
    """
    if len(streams) == 1:
        async with contextlib.aclosing(_whole(streams[0])) as outputs:
            async for output in outputs:
                yield 0, output
        return
    arrived: asyncio.Queue[_Arrival] = asyncio.Queue(maxsize=1)
    tasks = [asyncio.create_task(_forward(i, s, arrived)) for i, s in enumerate(streams)]
    try:
        for _ in streams:
            while (arrival := await arrived.get()) is not None:
                if isinstance(arrival, Exception):
                    raise arrival
                yield arrival
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def _forward(index: int, stream: AsyncIterator[RequestOutput], arrived: "asyncio.Queue[_Arrival]") -> None:
    """Put a generator's outputs, then its error or None, where ``follow`` waits."""
    try:
        async with contextlib.aclosing(_whole(stream)) as outputs:
            async for output in outputs:
                await arrived.put((index, output))
    except Exception as error:
        await arrived.put(error)
    else:
        await arrived.put(None)


async def _whole(stream: AsyncIterator[RequestOutput]) -> AsyncGenerator[RequestOutput]:
    """The outputs of one generator; raises ``GenerationFailed`` unless the last one says why it is the last."""
    if not isinstance(stream, AsyncGenerator):
        raise TypeError("generate must be an async generator: closing it is what aborts the request")
    finished = False
    async with contextlib.aclosing(stream) as outputs:
        async for output in outputs:
            if output.finish_reason == "error":
                raise GenerationFailed(output.error or "The engine could not finish this request; send it again.")
            finished = output.finish_reason is not None
            yield output
    if not finished:
        raise GenerationFailed("The engine ended this request without saying why; send it again.")
