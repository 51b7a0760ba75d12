"""An engine process that may die: the requests go on in the next one.

The server outlives its engine. When the engine's socket closes (``kill -9``, a lost device, a fault of ours), or when it is
silent for longer than its work explains and is killed for that, another is forked from the zygote and every request that was
not finished is given to it again: prompt, tokens so far, seed (``journal.py``). Its stream pauses meanwhile.

What is promised. Always: no token that was told is lost, doubled or changed, since only what has reached this process counts,
and the new engine is told all of it. In batch-invariant mode: the whole text is the one that an engine that never died would
have given, because there logits do not depend on the batch, and recomputing K/V in one piece gives the same bits as token by
token. Without that mode, what comes after the pause may differ as it may between two batches.

Nobody else does this on one machine by default. Others end every request (vLLM's contract is fail-stop: vllm#27866), or move
requests to another worker that must be running already, and not those with a grammar or several texts (Dynamo).

Silence is measured in ticks of this process's own loop, so a loop that was itself stopped does not take it for the engine's.
The engine may be silent for ten seconds, or five times what it announced the step would take. It announces steps that are long
or that new requests join (``ipc.Launching``); what else takes long, it accompanies with beats.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from minivllm import errors
from minivllm.config import Config
from minivllm.engine.ipc import Abort, Add, Beat, Launching, Pause, Resume, ToEngine
from minivllm.engine.journal import TRIAL_TOKENS, Entry, Journal
from minivllm.engine.link import EngineLink, Nest
from minivllm.records import EngineOutput
from minivllm.types import EngineHealth, EngineInfo, GenerateRequest, TokenEvent

PROGRAM: Final = ("-m", "minivllm.engine.zygote")  # what Python runs in the zygote; the socket's number is appended
TICK_S: Final = 0.5
log = logging.getLogger("minivllm")


@dataclass(frozen=True)
class Patience:
    """What is borne with."""

    silence_s: float = 10.0  # of an engine with work
    steps: float = 5.0  # or so many times what a step was expected to take
    last_words_s: float = 3.0  # for an engine that is killed to be gone; then its zygote goes too
    max_restarts: int = 20  # within ``window_s``
    window_s: float = 600.0
    start_s: float = 60.0  # for another engine to be ready, or
    starts: float = 5.0  # so many times what the first one took


async def start_engine(config: Config, program: Sequence[str] = PROGRAM, patience: Patience | None = None) -> "Supervisor":
    """Start an engine process and wait until it is ready. Raises the ``StartupError`` that it met."""
    patience = patience or Patience(max_restarts=config.server.max_engine_restarts)
    supervisor = Supervisor(config, Nest(config, program), patience)
    try:
        await supervisor.start()
    except BaseException:
        await supervisor.close()
        raise
    return supervisor


class Supervisor:
    """An ``EngineClient`` whose engine is replaced when it dies. Written by the server's event loop."""

    def __init__(self, config: Config, nest: Nest, patience: Patience) -> None:
        self._config = config
        self._nest = nest
        self._patience = patience
        self._journal = Journal()
        self._link: EngineLink | None = None
        self._info: EngineInfo | None = None
        self._start_s = 0.0  # what the first engine took to be ready
        self._trials: deque[Entry] = deque()  # suspects that are to run alone before anybody else does; the first does now
        self._tried: list[Entry] = []  # suspects that have passed, and wait for the others
        self._restarts: deque[float] = deque()  # when, within the window
        self._num_restarts = 0
        self._died_s = self._ready_s = 0.0  # of the last death behind which an engine said something, and what came after
        self._in_vain = 0  # restarts in a row after which no token came
        self._failed: list[TokenEvent] = []  # to be told
        self._quiet_s = 0.0  # since a word of the engine, or since it has work, in ticks of the watch
        self._announced: deque[float] = deque((0.0, 0.0), maxlen=2)  # of the steps in flight, as far as they were announced
        self._watch: asyncio.Task[None] | None = None

    @property
    def info(self) -> EngineInfo:
        """What the engine settled on at start."""
        if self._info is None:
            raise RuntimeError("the engine is not ready yet")
        return self._info

    @property
    def health(self) -> EngineHealth:
        """Whether the engine gets on."""
        up = self._link is not None and self._quiet_s < self._patience_s
        return EngineHealth(up, self._num_restarts, self._died_s, self._ready_s)

    @property
    def _patience_s(self) -> float:
        """How long the engine may be silent now."""
        return max(self._patience.silence_s, self._patience.steps * max(self._announced))

    async def start(self) -> None:
        """Start the first engine. Raises the ``StartupError`` that it met."""
        began_s = time.monotonic()
        try:
            self._link = await self._nest.hatch(self._config)
            self._info = info = await self._link.ready()
        except errors.EngineDead as dead:
            raise errors.StartupError(
                "The engine process ended while it was starting; its last lines are above. If the machine ran out of memory, "
                "give it a smaller model or a smaller --kv-cache-memory-bytes."
            ) from dead
        self._start_s = time.monotonic() - began_s
        cache = replace(self._config.cache, num_gpu_blocks_override=info.num_blocks, kv_cache_memory_bytes=None)
        model = replace(self._config.model, max_model_len=info.max_model_len)
        self._config = replace(self._config, cache=cache, model=model)  # what was promised at start holds for later engines
        self._watch = asyncio.create_task(self._watch_engine())

    def add(self, request: GenerateRequest) -> None:
        """Hand over a request."""
        self._begin_to_listen()
        self._journal.add(request)
        if not self._trials:
            self._send(Add(request))

    def abort(self, ids: Sequence[str]) -> None:
        """End requests."""
        for request_id in ids:
            self._journal.drop(request_id)
        self._send(Abort(tuple(ids)))
        self._go_on_with_trials()

    def pause(self, ids: Sequence[str]) -> None:
        """Let requests rest: they keep their tokens, and nothing on the device."""
        self._set_paused(ids, paused=True)
        self._send(Pause(tuple(ids)))
        self._go_on_with_trials()

    def resume(self, ids: Sequence[str]) -> None:
        """Let paused requests go on."""
        self._begin_to_listen()
        self._set_paused(ids, paused=False)
        self._send(Resume(tuple(ids)))

    def _set_paused(self, ids: Sequence[str], *, paused: bool) -> None:
        for request_id in ids:
            if (entry := self._journal.get(request_id)) is not None:
                entry.paused = paused

    def _send(self, message: ToEngine) -> None:
        """While there is no engine nothing is sent: the next one is told of everything in the journal."""
        if self._link is not None:
            self._link.send(message)

    def _begin_to_listen(self) -> None:
        """An engine that had nothing to do was rightly silent."""
        if not self._has_work:
            self._quiet_s = 0.0

    @property
    def _has_work(self) -> bool:
        return any(not entry.paused for entry in self._journal)

    async def outputs(self) -> EngineOutput:
        """The engine's next message. Raises ``EngineDead`` when engines die faster than they are any use."""
        while True:
            if self._failed:
                events, self._failed = tuple(self._failed), []
                return EngineOutput(events)
            try:
                link = self._link or await self._revive()
                message = await link.next()
            except errors.EngineDead:
                if self._link is None:
                    raise
                self._bury()
                continue
            self._quiet_s = 0.0
            if isinstance(message, EngineOutput):
                return self._take(message)
            if isinstance(message, Launching):
                self._announced.append(message.expected_s)
                self._journal.joined(message.ids)
            elif not isinstance(message, Beat):
                raise RuntimeError("the engine said something else than outputs")

    def _take(self, output: EngineOutput) -> EngineOutput:
        """Take down what the engine says, as its readers are to see it."""
        self._announced.append(0.0)
        take = self._journal.take
        events = tuple([seen for event in output.events if (seen := take(event)) is not None])
        if events:
            self._in_vain = 0
            if self._trials:
                self._go_on_with_trials()
        return EngineOutput(events, output.record)

    def _bury(self) -> None:
        """The engine is dead."""
        if self._link is not None:
            self._link.close()
        if not self._in_vain:
            self._died_s = time.monotonic()
        self._link = None
        self._trials.clear()
        self._tried.clear()
        self._failed += self._journal.died()
        level = logging.ERROR if len(self._journal) else logging.WARNING
        log.log(level, "the engine process has ended; %d requests go on in the next one", len(self._journal))

    async def _revive(self) -> EngineLink:
        """Another engine, which goes on with every request. Raises ``EngineDead`` when there were too many."""
        limit_s = max(self._patience.start_s, self._patience.starts * self._start_s)
        while True:
            self._count_restart()
            began_s = time.monotonic()
            link = None
            try:
                async with asyncio.timeout(limit_s):
                    link = await self._nest.hatch(self._config)
                    await link.ready()
            except (errors.EngineDead, errors.StartupError, TimeoutError) as error:
                log.error("another engine could not be started: %s", error or "it took too long")
                if link is not None:
                    link.close()
                self._nest.kill()
                await asyncio.sleep(min(5.0, 0.1 * 2**self._in_vain))
                continue
            self._link = link
            self._quiet_s = 0.0
            self._announced.extend((0.0, 0.0))
            self._ready_s = time.monotonic()
            self._replay()
            log.warning("another engine was ready after %.2f s", time.monotonic() - began_s)
            return link

    def _count_restart(self) -> None:
        """Raise ``EngineDead`` when there were as many restarts as may be."""
        now_s = time.monotonic()
        while self._restarts and self._restarts[0] < now_s - self._patience.window_s:
            self._restarts.popleft()
        if len(self._restarts) >= self._patience.max_restarts:
            log.error(
                "the engine was restarted %d times within %g s; that is enough", len(self._restarts), self._patience.window_s
            )
            raise errors.EngineDead
        self._restarts.append(now_s)
        self._num_restarts += 1
        self._in_vain += 1

    def _replay(self) -> None:
        """Give the engine what it has to go on with: suspects one by one at first, everybody once there are none."""
        self._trials.extend(entry for entry in self._journal if entry.suspect and not entry.paused)
        if self._trials:
            log.warning("%d requests were in the batch at two deaths of the engine and are run alone first", len(self._trials))
            self._give(self._trials[0])
        else:
            for entry in self._journal:
                self._give(entry)

    def _give(self, entry: Entry) -> None:
        """Have the engine go on with a request."""
        self._send(Add(entry.again()))
        if entry.paused:
            self._send(Pause((entry.request.id,)))

    def _go_on_with_trials(self) -> None:
        """The suspect that runs alone may have got on or ended: then it is the next one's turn, and at last everybody's."""
        while self._trials:
            entry = self._trials[0]
            there = self._journal.get(entry.request.id) is entry
            if there and entry.fresh < TRIAL_TOKENS and not entry.paused:
                return
            self._trials.popleft()
            if there:
                self._tried.append(entry)
                self._send(Pause((entry.request.id,)))
            if self._trials:
                self._give(self._trials[0])
                continue
            tried = {entry.request.id for entry in self._tried}
            for other in self._journal:
                if other.request.id not in tried:
                    self._give(other)
            resumed = tuple([entry.request.id for entry in self._tried if not entry.paused])
            self._send(Resume(resumed))
            self._tried.clear()

    async def _watch_engine(self) -> None:
        """Kill the engine when it is silent for longer than its work explains; ``outputs`` then finds it dead."""
        while True:
            await asyncio.sleep(TICK_S)
            link = self._link
            if link is None or not self._has_work:
                continue
            self._quiet_s += TICK_S
            if self._quiet_s < self._patience_s:
                continue
            log.error(
                "the engine has said nothing for %.1f s; where it is stands below, and another takes its place", self._quiet_s
            )
            self._nest.kill_engine()
            await asyncio.sleep(self._patience.last_words_s)
            if self._link is link:
                self._nest.kill()

    async def close(self) -> None:
        """Stop the engine."""
        if self._watch is not None:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
        if self._link is not None:
            await self._link.stop()
            self._link.close()
            self._link = None
        await self._nest.close()
