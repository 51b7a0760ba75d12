"""``AsyncLLM``: what the server holds. Requests in, text out, for many callers in one event loop.

One task (``run``) reads the engine's messages, makes text of tokens and puts it into the callers' mailboxes (``delivery.py``).
"""

import asyncio
import contextlib
import itertools
import logging
import random
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, replace

from minivllm.beams import BeamSearch, BeamSearchParams
from minivllm.config import Config
from minivllm.delivery import Mailbox, Pacer, share_of
from minivllm.door import check_prompt, settle, spell
from minivllm.engine.client import EngineClient
from minivllm.errors import EngineDead, GenerationFailed, InvalidRequest, QueueTimeout
from minivllm.observe.explain import Explanations
from minivllm.observe.metrics import Metrics
from minivllm.observe.recording import Recorder
from minivllm.observe.steps import Steps
from minivllm.observe.trail import Trail
from minivllm.records import StepRecord
from minivllm.text.helper import Helpers
from minivllm.text.outputs import OutputProcessor
from minivllm.text.tokenizer import Tokenizer
from minivllm.types import EngineHealth, EngineInfo, GenerateRequest, RequestOutput, SamplingParams

log = logging.getLogger("minivllm")


@dataclass(frozen=True)
class Order:
    """One sequence that a caller wants."""

    id: str
    prompt_ids: Sequence[int]
    sampling: SamplingParams
    priority: int = 0
    cache_salt: str = ""
    sample_index: int = 0  # which of the prompt's texts: part of the key of its random numbers
    fork_of: str | None = None  # the order of the same prompt whose blocks it may share
    shown_ids: frozenset[int] = frozenset()  # special tokens that stand in the text


@contextlib.contextmanager
def _logged(what: str) -> Iterator[None]:
    """What fails here is nobody's end."""
    try:
        yield
    except Exception:
        log.exception(what)


class AsyncLLM:
    """The engine for an event loop. Written by that loop alone; ``run`` must be running as a task."""

    def __init__(
        self,
        client: EngineClient,
        tokenizer: Tokenizer,
        config: Config,
        metrics: Metrics,
        pacer: Pacer | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.metrics = metrics
        self.steps = Steps(client.info.block_size, config.observe.step_records, recorder)
        self._recorder = recorder
        self.explanations = Explanations(config.served_names[0], opened_only=True) if config.observe.step_records else None
        self.alive = True
        self.last_token_s = 0.0  # when one last came, on time.monotonic()
        self._client = client
        self._outputs = OutputProcessor(tokenizer)
        self._mailboxes: dict[str, Mailbox] = {}
        self._pacer = pacer or Pacer(share_of(config, client.info.device))
        self._held: set[Mailbox] = set()  # with text that waits for the next round
        self._round: asyncio.TimerHandle | None = None
        self._seeds = random.Random(config.model.seed)
        self.helpers = Helpers(tokenizer, client.info)

    @property
    def info(self) -> EngineInfo:
        """What the engine settled on at start."""
        return self._client.info

    @property
    def health(self) -> EngineHealth:
        """Whether the engine gets on."""
        return self._client.health

    @property
    def num_open(self) -> int:
        """Requests that are not finished, or whose reader has not finished."""
        return len(self._mailboxes)

    async def run(self) -> None:
        """Bring the engine's outputs to their readers until the engine ends; then every reader gets ``EngineDead``."""
        try:
            while True:
                message = await self._client.outputs()
                if message.record is not None:
                    with _logged("a step was not counted"):
                        self.metrics.observe(message.record)
                    with _logged("a step was not recorded"):
                        self._explain(self.steps.add(message.record, self._client.health.num_restarts))
                    if message.record.num_output_tokens:
                        self.last_token_s = time.monotonic()
                self.metrics.engine_restarts = self._client.health.num_restarts
                outputs, to_abort = self._outputs.process(message.events)
                if to_abort:
                    self._client.abort(to_abort)
                self._deliver(outputs)
        except EngineDead:
            log.error("the engine process has ended")
        finally:
            self.alive = False
            self._wake_held()
            for mailbox in set(self._mailboxes.values()):
                mailbox.fail(EngineDead())

    def _explain(self, record: StepRecord) -> None:
        """Let the step be a part of the requests' explanations."""
        if self.explanations is not None:
            if record.life:
                health = self._client.health
                self.explanations.restarted(health.died_s, health.ready_s)
            self.explanations.observe(record)

    def _deliver(self, outputs: Sequence[RequestOutput]) -> None:
        """Put outputs into their mailboxes, and wake the readers that are to take them now."""
        mailboxes, held = self._mailboxes, self._held
        for output in outputs:
            mailbox = mailboxes[output.id]
            try:
                if mailbox.put(output):
                    if output.finish_reason is not None and self.explanations is not None:
                        self.explanations.end(output.id, output.finish_reason, output.num_output, time.monotonic())
                    mailbox.wake()
                else:
                    held.add(mailbox)
            except Exception:
                log.exception("request %s failed when its output was to be delivered", output.id)
                mailbox.fail(GenerationFailed("The server failed to deliver this answer; its log says why."))
        if held and self._round is None:
            wait_s = self._pacer.wait_s()
            if wait_s <= 0:
                self._wake_held()
            else:
                self._round = asyncio.get_running_loop().call_later(wait_s, self._wake_held)

    def _wake_held(self) -> None:
        """A round: whoever has text takes it."""
        if self._round is not None:
            self._round.cancel()
            self._round = None
        self._pacer.begin()
        for mailbox in self._held:
            mailbox.wake()
        self._held.clear()

    def open(self, orders: Sequence[Order], may_wait_s: float | None = None, trail: Trail | None = None) -> Mailbox:
        """Generate for all of these, or for none: raises a ``RequestError`` subclass when one is refused. Of requests that
        ``may_wait_s`` in the queue the mailbox fails when nothing came by then. One with a ``trail`` can be explained."""
        if trail is not None:
            trail.finish()
        requests: dict[str, GenerateRequest] = {}
        for order in orders:
            requests[order.id] = self._accept(order, requests, trail)
        mailbox = Mailbox(tuple(requests), self)
        try:
            if trail is not None and self.explanations is not None:
                self.explanations.open(trail.request_id or orders[0].id, tuple(requests.values()), trail)
            for order, request in zip(orders, requests.values(), strict=True):
                self._mailboxes[request.id] = mailbox
                self._outputs.add(request.id, request.prompt_ids, request.sampling, order.shown_ids)
                self._client.add(request)
        except BaseException:
            mailbox.__exit__()  # all or none
            raise
        if may_wait_s is not None:
            mailbox.begin_within(may_wait_s)
        return mailbox

    def refuse_late(self, mailbox: Mailbox, limit_s: float) -> None:
        """Nothing came for a mailbox in its time."""
        self.metrics.reject("queue_timeout")
        mailbox.fail(QueueTimeout(limit_s))

    def pause(self, ids: Sequence[str]) -> None:
        """Nobody reads what these say: they give their memory back until ``resume``."""
        if self.alive and ids:
            self._client.pause(ids)

    def resume(self, ids: Sequence[str]) -> None:
        """Let paused requests go on."""
        if self.alive and ids:
            self._client.resume(ids)

    def forget(self, ids: Sequence[str], running: Sequence[str]) -> None:
        """Nobody waits for these any more; ``running`` are those that the engine has not ended."""
        for request_id in ids:
            if (mailbox := self._mailboxes.pop(request_id, None)) is not None:
                self._held.discard(mailbox)
            self._outputs.drop(request_id)
        if self.explanations is not None:
            for request_id in running:
                self.explanations.end(request_id, "abort", None, time.monotonic())
        if running and self.alive:
            self._client.abort(running)

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
        if sampling.n != 1:
            raise InvalidRequest("generate gives one text; open several orders for n of them.", "n")
        with self.open([Order(request_id, prompt_ids, sampling, priority, cache_salt)]) as mailbox:
            while mailbox.more:
                await mailbox.wait()
                for _, output in mailbox.take():
                    yield output

    async def beam_search(self, searches: Sequence[tuple[Order, BeamSearchParams]]) -> list[list[RequestOutput]]:
        """The best texts of each search, best first. All go on in step, and each order's prompt is where its search begins.

        Cancelling ends what runs of them in the engine. Raises ``RequestError`` subclasses, as ``open`` and ``Mailbox`` do.
        """
        most = min(self.config.model.max_logprobs, self.info.vocab_size)
        for order, params in searches:
            params.check(len(order.prompt_ids), self.info.max_model_len, most)
        running = [BeamSearch(order.prompt_ids, params, self.info.eos_token_ids) for order, params in searches]
        cached: list[int] = []
        for turn in itertools.count():
            asked = [search.asks for search in running]
            orders = [
                replace(order, id=f"{order.id}-{turn}-{k}", prompt_ids=ids, sampling=params.step)
                for (order, params), every in zip(searches, asked, strict=True)
                for k, ids in enumerate(every)
            ]
            if not orders:
                break
            with self.open(orders, None if turn else self.config.server.queue_timeout_s) as mailbox:
                outputs = await mailbox.whole()
            cached = cached or [output.num_cached for output in outputs]  # at first, each search is one request
            told = iter(outputs)
            for search, every in zip(running, asked, strict=True):
                if every:
                    search.take([next(told).logprobs[0] for _ in every])
        return [
            search.outputs(order.id, self.tokenizer, found)
            for search, (order, _), found in zip(running, searches, cached, strict=True)
        ]

    def _accept(self, order: Order, others: dict[str, GenerateRequest], trail: Trail | None) -> GenerateRequest:
        """The request as the engine takes it, or the ``RequestError`` why not. ``others`` were accepted with it."""
        if not self.alive:
            raise EngineDead
        if order.id in self._mailboxes or order.id in others:
            raise InvalidRequest("A request with this id is running already; use another id.", "request_id")
        check_prompt(order.prompt_ids, self.info.vocab_size)
        num_prompt, most = len(order.prompt_ids), self.config.model.max_logprobs
        sampling = spell(order.sampling, self.tokenizer, self.info.vocab_size, most)
        return GenerateRequest(
            id=order.id,
            prompt_ids=tuple(order.prompt_ids),
            sampling=settle(sampling, num_prompt, self.info.max_model_len, self._seeds.getrandbits(63)),
            arrival_s=time.monotonic(),
            priority=order.priority,
            cache_salt=order.cache_salt,
            sample_index=order.sample_index,
            fork_of=order.fork_of,
            tenant="" if trail is None else trail.tenant,
            received_s=None if trail is None else trail.received_s,
        )

    async def close(self) -> None:
        """Stop the engine and the helpers, and end the recording."""
        self.helpers.close()
        if self._recorder is not None:
            await asyncio.to_thread(self._recorder.close)
        with contextlib.suppress(ConnectionError):
            await self._client.close()
