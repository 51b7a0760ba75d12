"""POST /v1/completions: text goes on where the prompt ends. A list of prompts gives one choice each."""

import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from minivllm.errors import InvalidRequest
from minivllm.server.protocol import COMPLETION, CompletionBody, prompts_of, sampling_of
from minivllm.server.replies import Completion, CompletionChoice, Head, Usage, encode, json_response, new_id
from minivllm.server.serving import Serving, follow, read_json, serving
from minivllm.server.sse import DONE, EventStream, json_event
from minivllm.server.usage import Counts, StreamUsage, stream_failure, stream_usage
from minivllm.types import RequestOutput

DEFAULT_MAX_TOKENS = 16
MAX_PROMPTS = 1024

router = APIRouter()


@router.post("/v1/completions")
async def completions(request: Request) -> Response:
    """Complete one prompt or several, streamed or whole."""
    s = serving(request)
    body = await read_json(request, COMPLETION)
    head = Head(new_id("cmpl"), int(time.time()), s.model_name(body.model))
    usage = stream_usage(body)
    streams = await _start(s, body, head.id)
    if body.stream:
        return EventStream(_events(streams, head, usage), stream_failure, s.drain)
    return json_response(await s.drain.run(_whole(streams, head), request.receive))


async def _start(s: Serving, body: CompletionBody, request_id: str) -> list[AsyncIterator[RequestOutput]]:
    """One generator a prompt."""
    prompts = prompts_of(body.prompt)
    if len(prompts) > MAX_PROMPTS:
        raise InvalidRequest(f"One request takes at most {MAX_PROMPTS} prompts, got {len(prompts)}.", "prompt")
    special = body.add_special_tokens is not False
    streams = []
    for i, prompt in enumerate(prompts):
        ids = await s.encode(prompt, special) if isinstance(prompt, str) else prompt
        sampling = sampling_of(body, max_tokens=s.room_for(DEFAULT_MAX_TOKENS, len(ids)))
        streams.append(s.start(f"{request_id}-{i}", ids, sampling, body.priority or 0, body.cache_salt or ""))
    return streams


async def _whole(streams: Sequence[AsyncIterator[RequestOutput]], head: Head) -> Completion:
    """Wait for every choice."""
    texts: list[list[str]] = [[] for _ in streams]
    last: dict[int, RequestOutput] = {}
    counts = Counts()
    async with contextlib.aclosing(follow(streams)) as outputs:
        async for index, output in outputs:
            texts[index].append(output.text)
            last[index] = output
            counts.see(index, output)
    choices = tuple(
        CompletionChoice(i, "".join(t), None, last[i].finish_reason, last[i].stop_reason) for i, t in enumerate(texts)
    )
    return Completion(id=head.id, created=head.created, model=head.model, choices=choices, usage=counts.usage())


async def _events(
    streams: Sequence[AsyncIterator[RequestOutput]], head: Head, usage: StreamUsage
) -> AsyncGenerator[bytes]:
    """A chunk for each piece of text, the last of a choice with its finish reason."""
    counts = Counts()

    def chunk(choices: tuple[CompletionChoice, ...], told: Usage | None) -> bytes:
        reply = Completion(id=head.id, created=head.created, model=head.model, choices=choices, usage=told)
        return json_event(encode(reply))

    async with contextlib.aclosing(follow(streams)) as outputs:
        async for i, output in outputs:
            counts.see(i, output)
            if output.text or output.finish_reason is not None:
                choice = CompletionChoice(i, output.text, None, output.finish_reason, output.stop_reason)
                yield chunk((choice,), counts.usage() if usage.each else None)
    if usage.last:
        yield chunk((), counts.usage())
    yield DONE
