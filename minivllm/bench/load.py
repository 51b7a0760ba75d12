"""The load generator of ``bench serve``: many streamed completions against a running server, at a chosen pace.

Arrivals do not wait for answers (an open loop) unless ``max_concurrency`` bounds them: a server that falls behind shows it as
waiting time instead of slowing its own clients down. Times are taken here, at the client: when an event's bytes came. What
the events hold is read when their stream has ended, since the generator often shares its cores with the server.
"""

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np

from minivllm.bench.client import RequestFailed, record_events
from minivllm.bench.workload import Item


@dataclass(frozen=True)
class Target:
    """Where requests go and what all of them carry."""

    url: str  # of the completions route
    model: str
    extra: Mapping[str, Any] = field(default_factory=dict)  # further body fields
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Pace:
    """When requests start.

    Gaps between arrivals follow a gamma distribution of mean ``1 / request_rate``; ``burstiness`` is its shape: 1 is a Poisson
    process, less comes in bursts, more is more even. An infinite rate starts all at once.
    """

    request_rate: float = math.inf  # requests per second
    burstiness: float = 1.0
    max_concurrency: int | None = None
    seed: int = 0

    def starts_s(self, num_items: int) -> list[float]:
        """Seconds from the beginning at which each request starts."""
        if math.isinf(self.request_rate):
            return [0.0] * num_items
        rng = np.random.default_rng(self.seed)
        gaps = rng.gamma(self.burstiness, 1.0 / (self.request_rate * self.burstiness), size=num_items)
        return [float(t) for t in np.cumsum(gaps) - gaps[0]]


@dataclass
class Outcome:
    """What one request met. Written by ``ask`` while it runs, read afterwards. Times in seconds of ``time.perf_counter``."""

    start_s: float = 0.0
    ttft_s: float = 0.0
    latency_s: float = 0.0
    itl_s: list[float] = field(default_factory=list)
    chunk_times_s: list[float] = field(default_factory=list)
    num_input: int = 0
    num_output: int = 0
    text: str = ""
    error: str = ""

    @property
    def ok(self) -> bool:
        """True when the answer came whole."""
        return not self.error

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None for answers of one token."""
        return (self.latency_s - self.ttft_s) / (self.num_output - 1) if self.num_output > 1 else None


class _Choice(msgspec.Struct, gc=False):
    """What is read of one."""

    text: str | None = None


class _Usage(msgspec.Struct, gc=False):
    """What is read of it."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Chunk(msgspec.Struct, gc=False):
    """What is read of a streamed event."""

    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: dict[str, Any] | str | None = None


async def ask(target: Target, item: Item) -> Outcome:
    """Send one request, read its stream to the end, and return what was measured. A failure is an outcome too."""
    outcome = Outcome(num_input=len(item.prompt) if isinstance(item.prompt, tuple) else 0)
    body = {
        "model": target.model,
        "prompt": item.prompt,
        "max_tokens": item.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        **target.extra,
    }
    outcome.start_s = time.perf_counter()
    events: list[tuple[float, bytes]] = []
    failure: RequestFailed | None = None
    try:
        await record_events(target.url, body, target.headers, events)
    except RequestFailed as broken:
        failure = broken
    outcome.error = _read(outcome, events, str(failure or "The stream ended without [DONE]."))
    return outcome


def _read(outcome: Outcome, events: Sequence[tuple[float, bytes]], failure: str) -> str:
    """Take times, text and counts from a stream's events; returns what went wrong: ``failure`` unless ``[DONE]`` came."""
    decode = msgspec.json.Decoder(_Chunk).decode
    texts: list[str] = []
    for came_s, event in events:
        if event == b"[DONE]":
            failure = "" if outcome.chunk_times_s else "The stream ended without a token."
            break
        try:
            chunk = decode(event)
        except msgspec.DecodeError:
            failure = f"The stream held an event that is not a chunk of JSON: {event[:80]!r}."
            break
        if chunk.error:
            failure = str(chunk.error.get("message", chunk.error) if isinstance(chunk.error, dict) else chunk.error)
            break
        if chunk.choices:
            texts.append(chunk.choices[0].text or "")
            outcome.chunk_times_s.append(came_s)
        if usage := chunk.usage:
            outcome.num_input = outcome.num_input if usage.prompt_tokens is None else usage.prompt_tokens
            outcome.num_output = outcome.num_output if usage.completion_tokens is None else usage.completion_tokens
    outcome.text = "".join(texts)
    if times_s := outcome.chunk_times_s:
        outcome.ttft_s = times_s[0] - outcome.start_s
        outcome.latency_s = times_s[-1] - outcome.start_s
        outcome.itl_s = [later - earlier for earlier, later in pairwise(times_s)]
        outcome.num_output = outcome.num_output or len(times_s)  # where no usage came
    return failure


async def run_load(
    target: Target, items: Sequence[Item], pace: Pace, on_done: Callable[[Outcome], None] | None = None
) -> tuple[list[Outcome], float]:
    """Run the whole workload; returns the outcomes in the order of ``items`` and the duration in seconds."""
    gate = asyncio.Semaphore(pace.max_concurrency or len(items) or 1)
    begin_s = time.perf_counter()

    async def one(item: Item, start_s: float) -> Outcome:
        await asyncio.sleep(max(0.0, begin_s + start_s - time.perf_counter()))
        async with gate:
            outcome = await ask(target, item)
        if on_done is not None:
            on_done(outcome)
        return outcome

    outcomes = await asyncio.gather(*(one(i, s) for i, s in zip(items, pace.starts_s(len(items)), strict=True)))
    return list(outcomes), time.perf_counter() - begin_s
