"""``AsyncLLM``: what the server holds. Requests in, text out, for many callers in one event loop.

One task (``run``) reads the engine's messages, turns tokens into text and puts it into the callers' mailboxes. A mailbox holds
one merged output a request, not a queue: a reader that lags gets more text in one piece. One that does not read for a while
(``Mailbox.outwait``) has its requests paused in the engine, so that what waits for it grows no further.

Waking a reader costs the same for one token as for ten (a task switch, a chunk of JSON, a write to a socket, and as much again
at the client), so when many streams run on few cores, tokens may travel together: ``Pacer`` says when. The first token of a
request and its end never wait.
"""

import asyncio
import contextlib
import itertools
import logging
import os
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import msgspec

from minivllm.beams import BeamSearch, BeamSearchParams
from minivllm.config import Config
from minivllm.door import check_prompt, settle, spell
from minivllm.engine.client import EngineClient
from minivllm.errors import EngineDead, GenerationFailed, InvalidRequest, QueueTimeout, RequestError
from minivllm.observe.metrics import Metrics
from minivllm.text.helper import Helpers
from minivllm.text.outputs import OutputProcessor
from minivllm.text.tokenizer import Tokenizer
from minivllm.types import REFUSED, EngineHealth, EngineInfo, GenerateRequest, RequestOutput, SamplingParams

SHARE_OF_CORES = 0.05  # of the time of all cores that the model runs on: what deliveries may take before there are fewer
LARGEST_SHARE = 0.5  # of the one core that the event loop has
LONGEST_WAIT_S = 0.05  # of a token for its delivery; a reader does not see less
MOST_UNMERGED = 64  # outputs that wait for a reader; so one that never reads costs little more than its text and its tokens

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


class Pacer:
    """When text that can wait goes out. Written by ``AsyncLLM`` alone.

    A round of deliveries and all that the event loop does until the next one may take ``share`` of a core's time: after 1 ms of
    work at a share of 0.1 the next round begins 10 ms after the last one began, at most ``LONGEST_WAIT_S``. So few streams are
    never held up (their rounds cost less than a step of the model takes), and many streams get fewer, larger pieces instead
    of taking the cores away from the model. A loop that is behind gets behind no further.
    """

    def __init__(
        self, share: float, clock: Callable[[], float] = time.monotonic, cpu_clock: Callable[[], float] = time.thread_time
    ) -> None:
        self._share = share
        self._clock = clock
        self._cpu_clock = cpu_clock
        self._began_s = -LONGEST_WAIT_S
        self._cpu_s = 0.0  # the loop's CPU clock when the last round began

    def wait_s(self) -> float:
        """How long until the next round may begin; 0 or less: it may."""
        gap_s = (self._cpu_clock() - self._cpu_s) / self._share
        return self._began_s + min(gap_s, LONGEST_WAIT_S) - self._clock()

    def begin(self) -> None:
        """A round begins."""
        self._began_s, self._cpu_s = self._clock(), self._cpu_clock()


def merged(outputs: Sequence[RequestOutput]) -> RequestOutput:
    """Consecutive outputs of one request as one."""
    if len(outputs) == 1:
        return outputs[0]
    token_ids = tuple([token_id for output in outputs for token_id in output.token_ids])
    text, last = "".join([output.text for output in outputs]), outputs[-1]
    if not any(output.logprobs or output.prompt_logprobs for output in outputs):
        return msgspec.structs.replace(last, text=text, token_ids=token_ids)
    logprobs = tuple([found for output in outputs for found in output.logprobs])
    of_prompt = tuple([found for output in outputs for found in output.prompt_logprobs])
    return msgspec.structs.replace(last, text=text, token_ids=token_ids, logprobs=logprobs, prompt_logprobs=of_prompt)


class Mailbox:
    """What came for one caller's requests and was not taken yet. Filled by ``AsyncLLM``, emptied by one task of the caller.

    A context manager: leaving it ends what still runs.
    """

    def __init__(self, ids: Sequence[str], owner: "AsyncLLM") -> None:
        self.num_output = 0  # tokens that came
        self._ids = ids
        self._owner = owner
        self._running = {request_id: index for index, request_id in enumerate(ids)}
        self._ready: dict[int, list[RequestOutput]] = {}
        self._error: RequestError | None = None
        self._late: asyncio.TimerHandle | None = None  # when it will have waited too long for its first output
        self._patient = False  # the caller wants everything or nothing
        self._waiter: asyncio.Future[None] | None = None

    def __enter__(self) -> "Mailbox":
        """The mailbox."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let nothing more come."""
        self._begun()
        self._owner.forget(self._ids, list(self._running))

    @property
    def more(self) -> bool:
        """False when the end of every request was taken."""
        return bool(self._running or self._ready) or self._error is not None

    def put(self, output: RequestOutput) -> bool:
        """Add output of one of the requests. True: it should not wait, since it is the first or the last."""
        if self._late is not None:
            self._begun()
        self.num_output += len(output.token_ids)
        reason = output.finish_reason
        if reason is None:
            index = self._running[output.id]
        else:
            index = self._running.pop(output.id)
            if reason == "error":
                kind = InvalidRequest if output.stop_reason == REFUSED else GenerationFailed
                self._error = kind(output.error or "The engine could not compute this request; try it again.")
                return True
        unread = self._ready.get(index)
        if unread is None:
            self._ready[index] = [output]
        else:
            unread.append(output)
            if len(unread) >= MOST_UNMERGED:
                unread[:] = [merged(unread)]
        return reason is not None or output.num_output == len(output.token_ids)

    def begin_within(self, limit_s: float) -> None:
        """Fail with ``QueueTimeout`` if nothing came by then."""
        self._late = asyncio.get_running_loop().call_later(limit_s, self._owner.refuse_late, self, limit_s)

    def _begun(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    async def outwait(self, writable: Callable[[], Awaitable[None]]) -> None:
        """Wait for ``writable``: until somebody reads again. When that takes long the engine pauses what runs meanwhile."""
        paused: list[str] = []

        def pause() -> None:
            paused.extend(self._running)
            self._owner.pause(paused)

        timer = asyncio.get_running_loop().call_later(self._owner.config.server.slow_reader_pause_s, pause)
        try:
            await writable()
        finally:
            timer.cancel()
        if paused:
            self._owner.resume(paused)

    def fail(self, error: RequestError) -> None:
        """Nothing more will come."""
        self._error = self._error or error
        self.wake()

    def wake(self) -> None:
        """Let the reader take what there is, if it waits for that."""
        waiter = self._waiter
        if waiter is None or waiter.done():
            return
        if self._error is not None or (self._ready and not (self._patient and self._running)):
            waiter.set_result(None)

    async def wait(self) -> None:
        """Return when there is something to take."""
        if not self._ready and self._error is None:
            await self._woken()

    async def _woken(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def take(self) -> list[tuple[int, RequestOutput]]:
        """Everything that is there, merged to one output a request, each with its request's place in the order.

        Raises what went wrong once everything that came before was taken.
        """
        ready, self._ready = self._ready, {}
        if not ready and self._error is not None:
            raise self._error
        return [(index, merged(outputs)) for index, outputs in ready.items()]

    async def whole(self) -> list[RequestOutput]:
        """Wait until every request has ended: their outputs in the order of the requests. Raises what went wrong with one."""
        self._patient = True
        while self._running and self._error is None:
            await self._woken()
        if self._error is not None:
            raise self._error
        return [output for _, output in sorted(self.take(), key=lambda taken: taken[0])]


@contextlib.contextmanager
def _logged(what: str) -> Iterator[None]:
    """What fails here is nobody's end."""
    try:
        yield
    except Exception:
        log.exception(what)


def share_of(config: Config, device: str) -> float:
    """What deliveries may take of the event loop's core: little where the model's threads want every core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if device != "cpu" or (config.runner.num_threads or cores) < cores:
        return LARGEST_SHARE
    return min(LARGEST_SHARE, SHARE_OF_CORES * cores)


class AsyncLLM:
    """The engine for an event loop. Written by that loop alone; ``run`` must be running as a task."""

    def __init__(
        self, client: EngineClient, tokenizer: Tokenizer, config: Config, metrics: Metrics, pacer: Pacer | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.metrics = metrics
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

    def _deliver(self, outputs: Sequence[RequestOutput]) -> None:
        """Put outputs into their mailboxes, and wake the readers that are to take them now."""
        mailboxes, held = self._mailboxes, self._held
        for output in outputs:
            mailbox = mailboxes[output.id]
            try:
                if mailbox.put(output):
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

    def open(self, orders: Sequence[Order], may_wait_s: float | None = None) -> Mailbox:
        """Generate for all of these, or for none: raises a ``RequestError`` subclass when one is refused. Of requests that
        ``may_wait_s`` in the queue the mailbox fails when nothing came by then."""
        requests: dict[str, GenerateRequest] = {}
        for order in orders:
            requests[order.id] = self._accept(order, requests)
        mailbox = Mailbox(tuple(requests), self)
        try:
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

    def _accept(self, order: Order, others: dict[str, GenerateRequest]) -> GenerateRequest:
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
        )

    async def close(self) -> None:
        """Stop the engine and the helpers."""
        self.helpers.close()
        with contextlib.suppress(ConnectionError):
            await self._client.close()
