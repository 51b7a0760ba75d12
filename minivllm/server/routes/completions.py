"""POST /v1/completions: text goes on where the prompt ends. A list of prompts gives n choices for each, in their order."""

import time
from collections.abc import Sequence

import msgspec
from fastapi import APIRouter
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from minivllm.async_llm import Order
from minivllm.errors import InvalidRequest, RequestError, UnsupportedField
from minivllm.server.logprobs import LogprobTexts
from minivllm.server.protocol import COMPLETION, CompletionBody, logprobs_of, prompts_of, sampling_of, truncated
from minivllm.server.replies import Completion, CompletionChoice, Head, Usage, encode, json_response, new_id
from minivllm.server.serving import Serving, read_json, serving
from minivllm.server.sse import DONE, MARK, EventStream, TextEvents, json_event
from minivllm.server.structured import grammar_of
from minivllm.server.usage import Asked, Counts, StreamUsage, stream_failure, stream_usage
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
    orders = await _orders(s, body, head.id)
    counts = Counts(orders[0].sampling.n, s.config.server.enable_prompt_tokens_details)
    logprobs = LogprobTexts(s.llm.tokenizer, bool(body.return_tokens_as_token_ids))
    asked = Asked([order.prompt_ids for order in orders] if body.return_token_ids else None, logprobs)
    echoes = _echoes(s, body, orders)
    if body.stream:
        return EventStream(s, orders, _Script(head, usage, counts, asked, echoes))
    return json_response(_whole(await s.whole(orders, request), head, counts, asked, echoes))


def _echoes(s: Serving, body: CompletionBody, orders: Sequence[Order]) -> Sequence[str]:
    """What each text begins with: its prompt where that is asked for. Raises ``UnsupportedField`` for its logprobs."""
    if not body.echo:
        return [""] * len(orders)
    if body.logprobs not in (None, False):
        raise UnsupportedField("echo", "logprobs of a prompt are not served; leave out echo or logprobs")
    return [s.llm.tokenizer.decode(list(order.prompt_ids)) for order in orders]


async def _orders(s: Serving, body: CompletionBody, request_id: str) -> list[Order]:
    """One for each text: n of each prompt."""
    prompts = prompts_of(body.prompt)
    if len(prompts) * max(body.n or 1, 1) > MAX_PROMPTS:
        raise InvalidRequest(f"One request takes at most {MAX_PROMPTS} prompts, n texts of one counted as n.", "prompt")
    special, grammar = body.add_special_tokens is not False, grammar_of(body.response_format, body.structured_outputs)
    await s.check_grammar(grammar)
    orders: list[Order] = []
    for i, prompt in enumerate(prompts):
        ids = await s.encode(prompt, special) if isinstance(prompt, str) else prompt
        ids = truncated(ids, body, s.llm.info.max_model_len)
        max_tokens = s.room_for(DEFAULT_MAX_TOKENS, len(ids))
        wanted = {"max_tokens": max_tokens, "logprobs": logprobs_of(body.logprobs), "grammar": grammar}
        sampling = sampling_of(body, **s.sampling_defaults, **wanted)
        orders += s.orders(f"{request_id}-{i}", ids, sampling, body.priority or 0, body.cache_salt or "")
    return orders


def _whole(
    outputs: Sequence[RequestOutput], head: Head, counts: Counts, asked: Asked, echoes: Sequence[str]
) -> Completion:
    """The reply that holds every choice."""
    for i, output in enumerate(outputs):
        counts.see(i, output)
    choices = tuple(
        CompletionChoice(
            i, echo + o.text, asked.logprobs.completion(i, o), o.finish_reason, o.stop_reason, asked.new(o), asked.prompt(i)
        )
        for i, (o, echo) in enumerate(zip(outputs, echoes, strict=True))
    )
    return Completion(id=head.id, created=head.created, model=head.model, choices=choices, usage=counts.usage())


class _Script:
    """A chunk for each piece of text, the last of a choice with its finish reason."""

    def __init__(self, head: Head, usage: StreamUsage, counts: Counts, asked: Asked, echoes: Sequence[str]) -> None:
        self._head = head
        self._usage = usage
        self._counts = counts
        self._asked = asked
        self._echoes = dict(enumerate(echoes))  # what is still to be said before each choice's text
        self._begun: set[int] = set()  # choices whose prompt's ids were told
        self._pieces: dict[int, TextEvents] = {}  # of each choice

    def piece(self, index: int, output: RequestOutput) -> bytes:
        """One chunk, unless there is nothing to tell."""
        self._counts.see(index, output)
        if echo := self._echoes.pop(index, ""):
            output = msgspec.structs.replace(output, text=echo + output.text)
        if output.finish_reason is None and self._asked.prompts is None and not output.logprobs:
            if not output.text:
                return b""
            if not self._usage.each:
                return self._pieces_of(index).event(output.text)
        prompt = UNSET if index in self._begun else self._asked.prompt(index)
        self._begun.add(index)
        ids, logprobs = self._asked.new(output), self._asked.logprobs.completion(index, output)
        choice = CompletionChoice(index, output.text, logprobs, output.finish_reason, output.stop_reason, ids, prompt)
        return self._chunk((choice,), self._counts.usage() if self._usage.each else None)

    def _pieces_of(self, index: int) -> TextEvents:
        """Chunks with a text and nothing else to tell."""
        found = self._pieces.get(index)
        if found is None:
            head, choice = self._head, CompletionChoice(index, MARK)
            sample = Completion(id=head.id, created=head.created, model=head.model, choices=(choice,))
            found = self._pieces[index] = TextEvents(sample)
        return found

    def end(self) -> bytes:
        """The usage where it was asked for, and the mark."""
        return (self._chunk((), self._counts.usage()) if self._usage.last else b"") + DONE

    def failure(self, error: RequestError) -> bytes:
        """The error, and the mark."""
        return stream_failure(error)

    def _chunk(self, choices: tuple[CompletionChoice, ...], told: Usage | None) -> bytes:
        head = self._head
        return json_event(
            encode(Completion(id=head.id, created=head.created, model=head.model, choices=choices, usage=told))
        )
