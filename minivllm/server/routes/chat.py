"""POST /v1/chat/completions: the next message of a conversation, written with the model's own chat template."""

import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from minivllm.server.protocol import CHAT, ChatBody, messages_of, sampling_of
from minivllm.server.replies import (
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatMessage,
    ChunkChoice,
    Delta,
    Head,
    LastChunkChoice,
    Usage,
    encode,
    json_response,
    new_id,
)
from minivllm.server.serving import Serving, follow, read_json, serving
from minivllm.server.sse import DONE, EventStream, json_event
from minivllm.server.usage import Counts, StreamUsage, stream_failure, stream_usage
from minivllm.types import RequestOutput

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    """Answer a conversation, streamed or whole. Without a max_tokens the answer may fill the context."""
    s = serving(request)
    body = await read_json(request, CHAT)
    head = Head(new_id("chatcmpl"), int(time.time()), s.model_name(body.model))
    usage = stream_usage(body)
    stream = await _start(s, body, head.id)
    if body.stream:
        return EventStream(_events(stream, head, usage), stream_failure, s.drain)
    return json_response(await s.drain.run(_whole(stream, head), request.receive))


async def _start(s: Serving, body: ChatBody, request_id: str) -> AsyncIterator[RequestOutput]:
    """The generator of the answer."""
    if body.max_completion_tokens is not None:
        body.max_tokens = body.max_completion_tokens
    sampling = sampling_of(body)
    goes_on = bool(body.continue_final_message)
    text = s.llm.tokenizer.render_chat(
        messages_of(body.messages),
        add_generation_prompt=(not goes_on) if body.add_generation_prompt is None else body.add_generation_prompt,
        continue_final_message=goes_on,
    )
    ids = await s.encode(text, bool(body.add_special_tokens))
    return s.start(request_id, ids, sampling, body.priority or 0, body.cache_salt or "")


async def _whole(stream: AsyncIterator[RequestOutput], head: Head) -> ChatCompletion:
    """Wait for the whole answer."""
    texts: list[str] = []
    counts = Counts()
    choice: ChatChoice | None = None
    async with contextlib.aclosing(follow([stream])) as outputs:
        async for _, output in outputs:
            texts.append(output.text)
            counts.see(0, output)
            if output.finish_reason is not None:
                choice = ChatChoice(0, ChatMessage("".join(texts)), output.finish_reason, output.stop_reason)
    return ChatCompletion(
        id=head.id, created=head.created, model=head.model, choices=() if choice is None else (choice,), usage=counts.usage()
    )


async def _events(stream: AsyncIterator[RequestOutput], head: Head, usage: StreamUsage) -> AsyncGenerator[bytes]:
    """The role, then a chunk for each piece of text, then one with the finish reason."""
    counts = Counts()

    def chunk(choice: ChunkChoice | LastChunkChoice | None) -> bytes:
        told: Usage | None = counts.usage() if usage.each or choice is None else None
        choices = () if choice is None else (choice,)
        return json_event(
            encode(ChatChunk(id=head.id, created=head.created, model=head.model, choices=choices, usage=told))
        )

    begun = False
    async with contextlib.aclosing(follow([stream])) as outputs:
        async for _, output in outputs:
            counts.see(0, output)
            parts: list[bytes] = []
            if not begun:
                parts.append(chunk(ChunkChoice(0, Delta("assistant", ""))))
                begun = True
            if output.text:
                parts.append(chunk(ChunkChoice(0, Delta(None, output.text))))
            if output.finish_reason is not None:
                parts.append(chunk(LastChunkChoice(0, Delta(), output.finish_reason, output.stop_reason)))
            yield b"".join(parts)
    if usage.last:
        yield chunk(None)
    yield DONE
