"""What every route needs: the served model, the options, the drain; and the steps that all generating routes share.

A route reads a body (``read_json``), makes prompts into ids (``encode``) and those into orders (``Serving.order``), and
waits for their whole outputs (``Serving.whole``) or streams them (``sse.EventStream``). Nothing here knows a route's reply
format.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.types import Scope

from minivllm.async_llm import AsyncLLM, Order
from minivllm.beams import BeamSearchParams
from minivllm.config import Config
from minivllm.delivery import Mailbox
from minivllm.errors import InvalidRequest, MalformedBody, UnknownModel
from minivllm.observe.explanation import Explanation
from minivllm.server.admission import Admission, Cost, cost_of, cost_of_beams
from minivllm.server.drain import ClientGone, Drain
from minivllm.server.fields import Form
from minivllm.server.gate import ticket_of, trail_of
from minivllm.server.health import Health
from minivllm.server.keys import TENANT, Keys, Salts
from minivllm.server.messages import Chat
from minivllm.text.reply_parsers import Parsers
from minivllm.types import Grammar, RequestOutput, SamplingParams

F = TypeVar("F", bound=msgspec.Struct)
T = TypeVar("T")
MAX_TOLD_AT_ONCE = 500  # tokens with their logprobs: as texts, each takes some 20 us
LONG_BODY_BYTES = 2**18
LONG_TEXT_CHARS = 20_000  # longer texts are tokenized in a thread: some 5 ms of everybody's event loop otherwise


@dataclass(frozen=True)
class Serving:
    """What one app serves. Set once by ``create_app``; routes get it by ``serving(request)``."""

    llm: AsyncLLM
    config: Config
    created: int  # unix time
    health: Health
    admission: Admission
    drain: Drain = field(default_factory=Drain)
    parsers: Parsers = field(default_factory=Parsers)
    sampling_defaults: Mapping[str, Any] = field(default_factory=dict)  # of the /v1 routes: what the model's makers advise
    salts: Salts = field(default_factory=lambda: Salts(Keys(())))
    tenant: str = ""  # who asks; set for each request

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

    async def check_grammar(self, grammar: Grammar | None) -> None:
        """See whether the engine will be able to follow it, beside the event loop. Raises ``InvalidRequest``."""
        if grammar is not None:
            await self.llm.helpers.check(grammar)

    async def encode_chat(self, chat: Chat, add_special_tokens: bool = False) -> tuple[str, list[int]]:
        """The prompt of a conversation, as text and as ids. Special tokens that users wrote into it are plain text there.
        Raises ``InvalidRequest``."""
        tokenizer = self.llm.tokenizer
        (messages, values), mark = tokenizer.guard.marked([list(chat.messages), dict(chat.values)])
        text = await self.llm.helpers.render(
            messages,
            add_generation_prompt=chat.add_generation_prompt,
            continue_final_message=chat.continue_final_message,
            **values,
        )
        if len(text) > LONG_TEXT_CHARS:
            ids = await asyncio.to_thread(tokenizer.encode_chat, text, mark, add_special_tokens)
        else:
            ids = tokenizer.encode_chat(text, mark, add_special_tokens)
        return (text.replace(mark, "") if mark else text), ids

    def room_for(self, wanted: int, num_prompt: int) -> int:
        """A route's default of output tokens, cut to what the context has left; 1 where nothing is left, which is refused."""
        return max(1, min(wanted, self.llm.info.max_model_len - num_prompt))

    def orders(
        self, request_id: str, ids: Sequence[int], sampling: SamplingParams, priority: int = 0, cache_salt: str = "",
        each_is_told: bool = False,
    ) -> list[Order]:  # fmt: skip
        """What is to be generated from ``ids``: one for each of ``sampling.n`` texts. Only the first of these is told logprobs
        of the prompt, which are the same for all, unless ``each_is_told``. Raises ``InvalidRequest`` for a priority that would
        have no effect."""
        if priority and self.config.scheduler.scheduling_policy != "priority":
            raise InvalidRequest("priority has no effect here; start the server with --scheduling-policy priority.", "priority")
        names = [request_id, *(f"{request_id}-{i}" for i in range(1, sampling.n))]
        salt = self.salts.salt(self.tenant, cache_salt)
        others = sampling if each_is_told else msgspec.structs.replace(sampling, prompt_logprobs=None)
        return [
            Order(name, ids, others if i else sampling, priority, salt, i, names[0] if i else None)
            for i, name in enumerate(names)
        ]

    async def whole(self, orders: Sequence[Order], request: Request) -> list[RequestOutput]:
        """Generate for ``orders`` and wait until all have ended. Raises ``RequestError`` subclasses and ``ClientGone``."""

        async def work() -> list[RequestOutput]:
            with self.admitted(request.scope, orders) as mailbox:
                return await mailbox.whole()

        return await self.drain.run(work(), request.receive)

    @contextmanager
    def admitted(self, scope: Scope, orders: Sequence[Order]) -> Iterator[Mailbox]:
        """Generate for ``orders`` if there is room for what they cost. Raises ``RequestError`` subclasses."""
        self._settle(scope, cost_of(orders, self.llm.info.max_model_len))
        with self.llm.open(orders, self.config.server.queue_timeout_s, trail_of(scope)) as mailbox:
            try:
                yield mailbox
            finally:
                ticket_of(scope).num_output = mailbox.num_output

    def _settle(self, scope: Scope, cost: Cost) -> None:
        self.admission.settle(ticket_of(scope), cost, time.monotonic())

    def explainer(self, wanted: bool | None, request_id: str) -> Callable[[], Explanation | None]:
        """What says where a request's time went, once it has ended; nothing where that is not ``wanted``. Raises
        ``InvalidRequest`` when nobody takes notice of it."""
        book = self.llm.explanations
        if not wanted:
            return lambda: None
        if book is None:
            raise InvalidRequest(
                "explain reads the records of steps, and this server keeps none (--step-records 0); leave it out.", "explain"
            )
        return lambda: book.explain(request_id, time.monotonic(), self.tenant)

    async def beam_search(
        self, searches: Sequence[tuple[Order, BeamSearchParams]], request: Request
    ) -> list[list[RequestOutput]]:
        """The best texts of each search. Raises as ``whole`` does."""
        self._settle(request.scope, cost_of_beams(searches))
        return await self.drain.run(self.llm.beam_search(searches), request.receive)


async def written(num_told: int, write: Callable[[], T]) -> T:
    """What ``write`` makes of logprobs of ``num_told`` tokens of prompts: beside the event loop where these are many."""
    return await asyncio.to_thread(write) if num_told > MAX_TOLD_AT_ONCE else write()


def serving(request: Request) -> Serving:
    """What the app of this request serves, to whoever asks."""
    value = request.app.state.serving
    if not isinstance(value, Serving):
        raise RuntimeError("the app was not made by create_app")
    tenant = str(request.scope.get("state", {}).get(TENANT, ""))
    return replace(value, tenant=tenant) if tenant else value


@contextmanager
def prompting(request: Request, request_id: str) -> Iterator[None]:
    """While this block runs, prompts are made of the body of a request that its client will know by ``request_id``; it was read
    and checked before."""
    trail = trail_of(request.scope)
    trail.request_id = request_id
    trail.received()
    with trail.phase("tokenize"):
        yield
    trail.begin("admit")


async def read_json(request: Request, form: Form[F]) -> F:
    """The body of a route that takes JSON and says so. Raises ``MalformedBody`` and what ``Form.read`` raises."""
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise MalformedBody("Unsupported Media Type: Only 'application/json' is allowed; set the Content-Type header.", "body")
    return await read_form(request, form)


async def read_form(request: Request, form: Form[F]) -> F:
    """The body, whatever its content type says. A long one is read beside the event loop. Raises what ``Form.read`` raises."""
    body = await read_body(request)
    return await asyncio.to_thread(form.read, body) if len(body) > LONG_BODY_BYTES else form.read(body)


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
