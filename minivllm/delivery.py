"""Text on its way to its readers: mailboxes, and when they are looked into.

A mailbox holds one merged output a request, not a queue: a reader that lags gets more text in one piece. One that does not read
for a while (``Mailbox.outwait``) has its requests paused in the engine, so that what waits for it grows no further.

Waking a reader costs the same for one token as for ten (a task switch, a chunk of JSON, a write to a socket, and as much again
at the client), so when many streams run on few cores, tokens may travel together: ``Pacer`` says when. The first token of a
request and its end never wait.
"""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import msgspec

from minivllm.config import Config
from minivllm.errors import GenerationFailed, InvalidRequest, RequestError
from minivllm.types import REFUSED, RequestOutput

SHARE_OF_CORES = 0.05  # of the time of all cores that the model runs on: what deliveries may take before there are fewer
LARGEST_SHARE = 0.5  # of the one core that the event loop has
LONGEST_WAIT_S = 0.05  # of a token for its delivery; a reader does not see less
MOST_UNMERGED = 64  # outputs that wait for a reader; so one that never reads costs little more than its text and its tokens


def share_of(config: Config, device: str) -> float:
    """What deliveries may take of the event loop's core: little where the model's threads want every core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if device != "cpu" or (config.runner.num_threads or cores) < cores:
        return LARGEST_SHARE
    return min(LARGEST_SHARE, SHARE_OF_CORES * cores)


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


class Owner(Protocol):
    """Who fills mailboxes: ``AsyncLLM``."""

    @property
    def config(self) -> Config:
        """The options."""
        ...

    def refuse_late(self, mailbox: "Mailbox", limit_s: float) -> None:
        """Nothing came for a mailbox in its time."""
        ...

    def pause(self, ids: Sequence[str]) -> None:
        """Nobody reads what these say."""
        ...

    def resume(self, ids: Sequence[str]) -> None:
        """They are read again."""
        ...

    def forget(self, ids: Sequence[str], running: Sequence[str]) -> None:
        """Nobody waits for these any more; ``running`` have not ended."""
        ...


class Mailbox:
    """What came for one caller's requests and was not taken yet. Filled by ``AsyncLLM``, emptied by one task of the caller.

    A context manager: leaving it ends what still runs.
    """

    def __init__(self, ids: Sequence[str], owner: "Owner") -> None:
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
