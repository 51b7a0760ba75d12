"""POST /v1/completions: text goes on where the prompt ends. A list of prompts gives n choices for each, in their order."""

import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

import msgspec
from fastapi import APIRouter
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from minivllm.async_llm import Order
from minivllm.beams import BeamSearchParams
from minivllm.errors import ContextTooLong, InvalidRequest, RequestError
from minivllm.observe.explanation import Explanation
from minivllm.server.beams import beams_of, check_beams
from minivllm.server.logprobs import Echoed, LogprobTexts
from minivllm.server.protocol import COMPLETION, CompletionBody, logprobs_of, prompts_of, sampling_of, truncated, with_best_of
from minivllm.server.replies import Completion, CompletionChoice, Head, Usage, encode, json_response, new_id
from minivllm.server.serving import Serving, prompting, read_json, serving, written
from minivllm.server.sse import DONE, MARK, EventStream, TextEvents, json_event
from minivllm.server.structured import grammar_of
from minivllm.server.usage import Asked, Counts, StreamUsage, stream_failure, stream_usage
from minivllm.types import RequestOutput, TokenLogprobs

DEFAULT_MAX_TOKENS = 16
MAX_PROMPTS = 1024
MAX_TOLD = 2**22  # logprobs of prompts' tokens in one reply: some 300 MB while it is made

router = APIRouter()


@router.post("/v1/completions")
async def completions(request: Request) -> Response:
    """Complete one prompt or several, streamed or whole."""
    s = serving(request)
    body = await read_json(request, COMPLETION)
    head = Head(new_id("cmpl"), int(time.time()), s.model_name(body.model))
    usage, explain = stream_usage(body), s.explainer(body.explain, head.id)
    with prompting(request, head.id):
        searches = await _searches(s, body, head.id) if check_beams(body) else []
        orders = [order for order, p in searches for _ in range(p.beam_width)] or await _orders(s, body, head.id)
        texts = await _echoes(s, orders) if body.echo else [""] * len(orders)
    num_samples = searches[0][1].beam_width if searches else orders[0].sampling.n
    counts = Counts(num_samples, s.config.server.enable_prompt_tokens_details)
    logprobs = LogprobTexts(s.llm.tokenizer, bool(body.return_tokens_as_token_ids))
    asked = Asked([order.prompt_ids for order in orders] if body.return_token_ids else None, logprobs, body.prompt_logprobs)
    prompts = _Prompts([order.prompt_ids for order in orders], texts, logprobs_of(body.logprobs) if body.echo else None)
    if body.stream:
        return EventStream(s, orders, _Script(_Telling(head, counts, asked, prompts, explain), usage))
    if searches:
        outputs = [output for found in await s.beam_search(searches, request) for output in found]
    else:
        outputs = await s.whole(orders, request)
    best = _best(outputs, body.n or 1, counts.num_samples)
    if logprobs_of(body.logprobs) is None:
        outputs = [msgspec.structs.replace(output, logprobs=()) for output in outputs]  # only the choice wanted them
    num_told = sum(len(output.prompt_logprobs) for output in outputs)
    telling = _Telling(head, counts, asked, prompts, explain)
    reply = await written(num_told, lambda: _whole((outputs, best), telling))
    return json_response(reply if (told := explain()) is None else msgspec.structs.replace(reply, explain=told))


async def _echoes(s: Serving, orders: Sequence[Order]) -> list[str]:
    """The texts of the prompts."""
    num_ids = sum(len(order.prompt_ids) for order in orders)
    return await written(num_ids, lambda: [s.llm.tokenizer.decode(list(order.prompt_ids)) for order in orders])


def _best(outputs: Sequence[RequestOutput], n: int, num_samples: int) -> Sequence[int]:
    """Which outputs to tell: of each prompt's ``num_samples``, the n with the highest sum of logprobs, best first."""
    if n == num_samples:
        return range(len(outputs))
    totals = [sum(found.logprob for found in output.logprobs) for output in outputs]
    groups = (range(first, first + num_samples) for first in range(0, len(outputs), num_samples))
    return [i for group in groups for i in sorted(group, key=totals.__getitem__, reverse=True)[:n]]


@dataclass(frozen=True)
class _Prompts:
    """What choices say of their prompts."""

    ids: Sequence[Sequence[int]]  # of each choice
    echoes: Sequence[str]  # what its text begins with
    num_top: int | None  # likeliest tokens to tell with the logprobs of what is echoed; None: these are not asked for

    def echoed(self, index: int, found: Sequence[TokenLogprobs]) -> Echoed | None:
        """A choice's prompt as its logprobs begin with it."""
        if self.num_top is None:
            return None
        replace, most = msgspec.structs.replace, self.num_top
        cut = [replace(f, top_ids=f.top_ids[:most], top_logprobs=f.top_logprobs[:most]) for f in found]
        return Echoed(self.ids[index], cut)


async def _encoded(s: Serving, body: CompletionBody) -> AsyncIterator[list[int]]:
    """The tokens of each prompt."""
    prompts, special = prompts_of(body.prompt), body.add_special_tokens is not False
    if len(prompts) * max(body.n or 1, body.best_of or 1, 1) > MAX_PROMPTS:
        raise InvalidRequest(f"One request takes at most {MAX_PROMPTS} prompts, n texts of one counted as n.", "prompt")
    for prompt in prompts:
        ids = await s.encode(prompt, special) if isinstance(prompt, str) else prompt
        ids, most = truncated(ids, body, s.llm.info.max_model_len), s.llm.info.max_model_len
        if len(ids) > most:  # before anything is made of them
            raise ContextTooLong(most, len(ids), 1 if body.max_tokens is None else body.max_tokens)
        yield ids


async def _searches(s: Serving, body: CompletionBody, request_id: str) -> list[tuple[Order, BeamSearchParams]]:
    """A beam search for each prompt."""
    found: list[tuple[Order, BeamSearchParams]] = []
    async for ids in _encoded(s, body):
        params, name = beams_of(body, s.room_for(DEFAULT_MAX_TOKENS, len(ids))), f"{request_id}-{len(found)}"
        (order,) = s.orders(name, ids, params.step, body.priority or 0, body.cache_salt or "")
        found.append((order, params))
    return found


async def _orders(s: Serving, body: CompletionBody, request_id: str) -> list[Order]:
    """One for each text: n of each prompt."""
    grammar = grammar_of(body.response_format, body.structured_outputs)
    await s.check_grammar(grammar)
    orders: list[Order] = []
    num_prompts = num_told = 0
    async for ids in _encoded(s, body):
        max_tokens = s.room_for(DEFAULT_MAX_TOKENS, len(ids))
        wanted = {"max_tokens": max_tokens, "logprobs": logprobs_of(body.logprobs), "grammar": grammar}
        sampling = sampling_of(body, **s.sampling_defaults, **wanted)
        if body.echo and sampling.logprobs is not None:
            most = max(sampling.logprobs, sampling.prompt_logprobs or 0)
            sampling = msgspec.structs.replace(sampling, prompt_logprobs=most)
        if sampling.prompt_logprobs is not None:
            num_told += len(ids) * (1 + sampling.prompt_logprobs) * sampling.n
        if num_told > MAX_TOLD:
            raise InvalidRequest(
                f"One reply tells at most {MAX_TOLD} logprobs of prompts; send fewer or shorter ones, or ask for less of each.",
                "prompt_logprobs",
            )
        sampling = with_best_of(sampling, body)
        name, salt, streams = f"{request_id}-{num_prompts}", body.cache_salt or "", bool(body.stream)
        num_prompts += 1
        orders += s.orders(name, ids, sampling, body.priority or 0, salt, each_is_told=streams)
    return orders


@dataclass(frozen=True)
class _Telling:
    """What whole replies and streams have in common."""

    head: Head
    counts: Counts
    asked: Asked
    prompts: _Prompts
    explain: Callable[[], Explanation | None]


def _whole(made: tuple[Sequence[RequestOutput], Sequence[int]], telling: _Telling) -> Completion:
    """The reply that holds every choice. ``made``: all outputs, which count, and which of them are the choices."""
    (outputs, best), head, counts = made, telling.head, telling.counts
    asked, prompts = telling.asked, telling.prompts
    for i, output in enumerate(outputs):
        counts.see(i, output)
    choices: list[CompletionChoice] = []
    for index, i in enumerate(best):
        o, found = outputs[i], outputs[i - i % counts.num_samples].prompt_logprobs  # the first of a prompt's texts is told
        logprobs = asked.logprobs.completion(index, o, prompts.echoed(i, found))
        text, of_prompt = prompts.echoes[i] + o.text, asked.of_prompt(prompts.ids[i], found)
        ids, prompt_ids = asked.new(o), asked.prompt(i)
        choices.append(CompletionChoice(index, text, logprobs, o.finish_reason, o.stop_reason, ids, prompt_ids, of_prompt))
    return Completion(id=head.id, created=head.created, model=head.model, choices=tuple(choices), usage=counts.usage())


class _Script:
    """A chunk for each piece of text, the last of a choice with its finish reason."""

    def __init__(self, telling: _Telling, usage: StreamUsage) -> None:
        self._head = telling.head
        self._usage = usage
        self._counts = telling.counts
        self._asked = telling.asked
        self._prompts = telling.prompts
        self._explain = telling.explain
        self._echoes = dict(enumerate(telling.prompts.echoes))  # what is still to be said before each choice's text
        self._found: dict[int, list[TokenLogprobs]] = {}  # of prompts that are not echoed yet
        self._begun: set[int] = set()  # choices whose prompt's ids were told
        self._pieces: dict[int, TextEvents] = {}  # of each choice

    def piece(self, index: int, output: RequestOutput) -> bytes:
        """One chunk, unless there is nothing to tell."""
        self._counts.see(index, output)
        echoed = None
        if self._prompts.num_top is not None and index in self._echoes:
            found = self._found.setdefault(index, [])
            found += output.prompt_logprobs
            if not output.token_ids:
                return b""  # more of its prompt is to come
            echoed = self._prompts.echoed(index, self._found.pop(index))
        if echo := self._echoes.pop(index, ""):
            output = msgspec.structs.replace(output, text=echo + output.text)
        if output.finish_reason is None and self._asked.prompts is None and not output.logprobs:
            if not output.text:
                return b""
            if not self._usage.each:
                return self._pieces_of(index).event(output.text)
        prompt = UNSET if index in self._begun else self._asked.prompt(index)
        self._begun.add(index)
        ids, logprobs = self._asked.new(output), self._asked.logprobs.completion(index, output, echoed)
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
        """A chunk with the usage and the explanation where they were asked for, and the mark."""
        explanation, usage = self._explain(), self._counts.usage() if self._usage.last else None
        return (self._chunk((), usage, explanation) if usage or explanation else b"") + DONE

    def failure(self, error: RequestError) -> bytes:
        """The error, and the mark."""
        return stream_failure(error)

    def _chunk(
        self, choices: tuple[CompletionChoice, ...], told: Usage | None, explanation: Explanation | None = None
    ) -> bytes:
        head = self._head
        chunk = Completion(
            id=head.id, created=head.created, model=head.model, choices=choices, usage=told, explain=explanation
        )
        return json_event(encode(chunk))
