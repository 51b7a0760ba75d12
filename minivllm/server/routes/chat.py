"""POST /v1/chat/completions: the next message of a conversation, written with the model's own chat template."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import msgspec
from fastapi import APIRouter
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from minivllm.async_llm import Order
from minivllm.errors import RequestError
from minivllm.observe.explanation import Explanation
from minivllm.server.answers import Answer, Reading
from minivllm.server.demands import Demands
from minivllm.server.logprobs import LogprobTexts
from minivllm.server.messages import Chat, chat_of
from minivllm.server.protocol import CHAT, ChatBody, chat_logprobs_of, sampling_of, truncated
from minivllm.server.replies import (
    ChatChoice,
    ChatChunk,
    ChatCompletion,
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
from minivllm.server.serving import Serving, prompting, read_json, serving, written
from minivllm.server.sse import DONE, MARK, EventStream, TextEvents, json_event
from minivllm.server.structured import grammar_of
from minivllm.server.tools import Offer, offer_of
from minivllm.server.usage import Asked, Counts, StreamUsage, stream_failure, stream_usage
from minivllm.types import RequestOutput

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    """Answer a conversation, once or n times, streamed or whole. Without a max_tokens the answer may fill the context."""
    s = serving(request)
    body = await read_json(request, CHAT)
    head = Head(new_id("chatcmpl"), int(time.time()), s.model_name(body.model))
    usage, explain = stream_usage(body), s.explainer(body.explain, head.id)
    with prompting(request, head.id):
        orders, reading = await _orders(s, body, head.id)
    counts = Counts(len(orders), s.config.server.enable_prompt_tokens_details)
    logprobs = LogprobTexts(s.llm.tokenizer, bool(body.return_tokens_as_token_ids))
    asked = Asked([order.prompt_ids for order in orders] if body.return_token_ids else None, logprobs, body.prompt_logprobs)
    telling = _Telling(head, counts, asked, reading, explain)
    if body.stream:
        return EventStream(s, orders, _Script(telling, usage))
    outputs = await s.whole(orders, request)
    ids, found = orders[0].prompt_ids, outputs[0].prompt_logprobs
    of_prompt = await written(len(found), lambda: asked.of_prompt(ids, found))
    reply = msgspec.structs.replace(_whole(outputs, telling), prompt_logprobs=of_prompt)
    return json_response(reply if (told := explain()) is None else msgspec.structs.replace(reply, explain=told))


async def _orders(s: Serving, body: ChatBody, request_id: str) -> tuple[list[Order], Reading]:
    """What is to be generated as answers, n of them, and how they are read."""
    if body.max_completion_tokens is not None:
        body.max_tokens = body.max_completion_tokens
    offer = offer_of(body.tools, body.tool_choice, body.parallel_tool_calls)
    demands = Demands(grammar_of(body.response_format, body.structured_outputs), offer, s.parsers, s.llm.tokenizer)
    logprobs = chat_logprobs_of(body)
    sampling = sampling_of(body, **s.sampling_defaults, logprobs=logprobs)  # what is out of range is refused before any work
    text, ids = await s.encode_chat(_chat(s, body, offer), bool(body.add_special_tokens))
    reasoner = None if s.parsers.reasoning is None else partial(s.parsers.reasoning, text)
    grammar = demands.grammar(None if reasoner is None else reasoner())
    await s.check_grammar(grammar)
    ids = truncated(ids, body, s.llm.info.max_model_len)
    orders = s.orders(
        request_id, ids, msgspec.structs.replace(sampling, grammar=grammar), body.priority or 0, body.cache_salt or ""
    )
    reading = Reading(
        lambda: s.parsers.reader(offer.functions, None if reasoner is None else reasoner()),
        offer.named,
        offer.parallel,
        s.parsers.short_call_ids,
        tells_reasoning=body.include_reasoning is not False,
    )
    marks = map(s.llm.tokenizer.special_id, s.parsers.marks(offer.functions))
    shown_ids = frozenset(token_id for token_id in marks if token_id is not None)
    return [replace(order, shown_ids=shown_ids) for order in orders] if shown_ids else orders, reading


def _chat(s: Serving, body: ChatBody, offer: Offer) -> Chat:
    """The conversation as the template takes it."""
    values = {
        "tools": list(offer.described),
        "documents": body.documents,
        "reasoning_effort": body.reasoning_effort,
        "chat_template_kwargs": body.chat_template_kwargs,
    }
    reads = s.llm.tokenizer.template().reads
    return chat_of(body.messages, reads, body.add_generation_prompt, body.continue_final_message, values)


def _whole(outputs: Sequence[RequestOutput], telling: "_Telling") -> ChatCompletion:
    """The reply that holds every answer."""
    head, counts, asked = telling.head, telling.counts, telling.asked
    choices: list[ChatChoice] = []
    for i, o in enumerate(outputs):
        counts.see(i, o)
        answer = Answer(telling.reading)
        message = answer.message(o)
        logprobs = asked.logprobs.chat(o)
        choices.append(ChatChoice(i, message, answer.finish_reason(o.finish_reason), o.stop_reason, logprobs, asked.new(o)))
    told, prompt = counts.usage(), asked.prompt(0)
    return ChatCompletion(
        id=head.id, created=head.created, model=head.model, choices=tuple(choices), usage=told, prompt_token_ids=prompt
    )


@dataclass(frozen=True)
class _Telling:
    """What whole replies and streams have in common."""

    head: Head
    counts: Counts
    asked: Asked
    reading: Reading
    explain: Callable[[], Explanation | None]


class _Script:
    """For each answer the role, then a chunk for each piece of it, then one with the finish reason."""

    def __init__(self, telling: _Telling, usage: StreamUsage) -> None:
        self._head = telling.head
        self._usage = usage
        self._counts = telling.counts
        self._asked = telling.asked
        self._explain = telling.explain
        self._reading = telling.reading
        self._plain = telling.reading.plain
        self._answers: dict[int, Answer] = {}  # those that have begun
        self._texts: dict[int, TextEvents] = {}

    def piece(self, index: int, output: RequestOutput) -> bytes:
        """A chunk for each piece, behind the role and before the finish reason where they are due."""
        self._counts.see(index, output)
        parts: list[bytes] = []
        if index not in self._answers:
            begun = self._asked.prompt(index) if not self._answers else UNSET  # all answers have one prompt
            self._answers[index] = Answer(self._reading)
            parts.append(self._chunk(ChunkChoice(index, Delta("assistant", "")), begun))
        answer = self._answers[index]
        tells_more = self._asked.prompts is not None or bool(output.logprobs)  # something beside the text
        if self._plain and not tells_more and not self._usage.each:
            if output.text:
                parts.append(self._text_events(index).event(output.text))
        else:
            deltas = answer.deltas(output)
            if tells_more and not deltas:
                deltas = [Delta(None, "")]
            logprobs, ids = (self._asked.logprobs.chat(output), self._asked.new(output)) if tells_more else (None, UNSET)
            for delta in deltas:
                parts.append(self._chunk(ChunkChoice(index, delta, logprobs, token_ids=ids)))
                logprobs, ids = None, UNSET  # they are of the whole output and told once
        if output.finish_reason is not None:
            reason = answer.finish_reason(output.finish_reason) or output.finish_reason
            parts.append(self._chunk(LastChunkChoice(index, Delta(), reason, output.stop_reason)))
        return b"".join(parts)

    def _text_events(self, index: int) -> TextEvents:
        """Chunks with a text and nothing else to tell."""
        found = self._texts.get(index)
        if found is None:
            head, choice = self._head, ChunkChoice(index, Delta(None, MARK))
            found = TextEvents(ChatChunk(id=head.id, created=head.created, model=head.model, choices=(choice,)))
            self._texts[index] = found
        return found

    def end(self) -> bytes:
        """A chunk with the usage and the explanation where they were asked for, and the mark."""
        explanation = self._explain()
        if not self._usage.last and explanation is None:
            return DONE
        head, usage = self._head, self._counts.usage() if self._usage.last else None
        last = ChatChunk(
            id=head.id, created=head.created, model=head.model, choices=(), usage=usage, explain=explanation
        )
        return json_event(encode(last)) + DONE

    def failure(self, error: RequestError) -> bytes:
        """The error, and the mark."""
        return stream_failure(error)

    def _chunk(self, choice: ChunkChoice | LastChunkChoice, prompt_ids: TokenIds = UNSET) -> bytes:
        head = self._head
        told: Usage | None = self._counts.usage() if self._usage.each else None
        chunk = ChatChunk(
            id=head.id, created=head.created, model=head.model, choices=(choice,), usage=told, prompt_token_ids=prompt_ids
        )
        return json_event(encode(chunk))
