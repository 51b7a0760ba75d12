"""POST /v1/chat/completions: the next message of a conversation, written with the model's own chat template."""

import time
from collections.abc import Sequence

from fastapi import APIRouter
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from minivllm.async_llm import Order
from minivllm.errors import RequestError
from minivllm.server.logprobs import LogprobTexts
from minivllm.server.protocol import CHAT, ChatBody, chat_logprobs_of, messages_of, sampling_of, truncated
from minivllm.server.replies import (
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatMessage,
    ChunkChoice,
    Delta,
    Head,
    LastChunkChoice,
    TokenIds,
    Usage,
    encode,
    json_response,
    new_id,
)
from minivllm.server.serving import Serving, read_json, serving
from minivllm.server.sse import DONE, MARK, EventStream, TextEvents, json_event
from minivllm.server.structured import grammar_of
from minivllm.server.usage import Asked, Counts, StreamUsage, stream_failure, stream_usage
from minivllm.types import RequestOutput

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    """Answer a conversation, once or n times, streamed or whole. Without a max_tokens the answer may fill the context."""
    s = serving(request)
    body = await read_json(request, CHAT)
    head = Head(new_id("chatcmpl"), int(time.time()), s.model_name(body.model))
    usage = stream_usage(body)
    orders = await _orders(s, body, head.id)
    counts = Counts(len(orders), s.config.server.enable_prompt_tokens_details)
    logprobs = LogprobTexts(s.llm.tokenizer, bool(body.return_tokens_as_token_ids))
    asked = Asked([order.prompt_ids for order in orders] if body.return_token_ids else None, logprobs)
    if body.stream:
        return EventStream(s, orders, _Script(head, usage, counts, asked))
    return json_response(_whole(await s.whole(orders, request), head, counts, asked))


async def _orders(s: Serving, body: ChatBody, request_id: str) -> list[Order]:
    """What is to be generated as answers: n of them."""
    if body.max_completion_tokens is not None:
        body.max_tokens = body.max_completion_tokens
    grammar = grammar_of(body.response_format, body.structured_outputs)
    sampling = sampling_of(body, **s.sampling_defaults, logprobs=chat_logprobs_of(body), grammar=grammar)
    await s.check_grammar(grammar)
    goes_on = bool(body.continue_final_message)
    text = s.llm.tokenizer.render_chat(
        messages_of(body.messages),
        add_generation_prompt=(not goes_on) if body.add_generation_prompt is None else body.add_generation_prompt,
        continue_final_message=goes_on,
    )
    ids = truncated(await s.encode(text, bool(body.add_special_tokens)), body, s.llm.info.max_model_len)
    return s.orders(request_id, ids, sampling, body.priority or 0, body.cache_salt or "")


def _whole(outputs: Sequence[RequestOutput], head: Head, counts: Counts, asked: Asked) -> ChatCompletion:
    """The reply that holds every answer."""
    for i, output in enumerate(outputs):
        counts.see(i, output)
    choices = tuple(
        ChatChoice(i, ChatMessage(o.text), o.finish_reason, o.stop_reason, asked.logprobs.chat(o), asked.new(o))
        for i, o in enumerate(outputs)
    )
    told, prompt = counts.usage(), asked.prompt(0)
    return ChatCompletion(
        id=head.id, created=head.created, model=head.model, choices=choices, usage=told, prompt_token_ids=prompt
    )


class _Script:
    """For each answer the role, then a chunk for each piece of text, then one with the finish reason."""

    def __init__(self, head: Head, usage: StreamUsage, counts: Counts, asked: Asked) -> None:
        self._head = head
        self._usage = usage
        self._counts = counts
        self._asked = asked
        self._pieces: dict[int, TextEvents] = {}  # of each answer that has begun

    def piece(self, index: int, output: RequestOutput) -> bytes:
        """Up to three chunks."""
        self._counts.see(index, output)
        parts: list[bytes] = []
        if index not in self._pieces:
            begun = self._asked.prompt(index) if not self._pieces else UNSET  # all answers have one prompt
            parts.append(self._chunk(ChunkChoice(index, Delta("assistant", "")), begun))
            head, choice = self._head, ChunkChoice(index, Delta(None, MARK))
            self._pieces[index] = TextEvents(ChatChunk(id=head.id, created=head.created, model=head.model, choices=(choice,)))
        if self._asked.prompts is not None or output.logprobs or (output.text and self._usage.each):
            logprobs, ids = self._asked.logprobs.chat(output), self._asked.new(output)
            parts.append(self._chunk(ChunkChoice(index, Delta(None, output.text), logprobs, token_ids=ids)))
        elif output.text:
            parts.append(self._pieces[index].event(output.text))
        if output.finish_reason is not None:
            parts.append(self._chunk(LastChunkChoice(index, Delta(), output.finish_reason, output.stop_reason)))
        return b"".join(parts)

    def end(self) -> bytes:
        """The usage where it was asked for, and the mark."""
        return (self._chunk(None) if self._usage.last else b"") + DONE

    def failure(self, error: RequestError) -> bytes:
        """The error, and the mark."""
        return stream_failure(error)

    def _chunk(self, choice: ChunkChoice | LastChunkChoice | None, prompt_ids: TokenIds = UNSET) -> bytes:
        head = self._head
        told: Usage | None = self._counts.usage() if self._usage.each or choice is None else None
        choices = () if choice is None else (choice,)
        chunk = ChatChunk(
            id=head.id, created=head.created, model=head.model, choices=choices, usage=told, prompt_token_ids=prompt_ids
        )
        return json_event(encode(chunk))
