"""The load generator of ``bench serve``: many streamed completions against a running server, at a chosen pace.

Arrivals do not wait for answers (an open loop) unless ``max_concurrency`` bounds them: a server that falls behind shows it as
waiting time instead of slowing its own clients down. Times are taken here, at the client.
"""

import asyncio
import json
import math
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minivllm.bench.client import RequestFailed, stream_events
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
    try:
        async with aclosing(_chunks(target, body)) as chunks:
            async for chunk in chunks:
                _take(outcome, chunk, time.perf_counter())
        if not outcome.chunk_times_s:
            outcome.error = "The stream ended without a token."
    except RequestFailed as failure:
        outcome.error = str(failure)
    return outcome


async def _chunks(target: Target, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
    """The JSON chunks of one stream, up to ``[DONE]``. Raises ``RequestFailed`` when the stream ends without it."""
    async with aclosing(stream_events(target.url, body, target.headers)) as events:
        async for event in events:
            if event == "[DONE]":
                return
            try:
                chunk = json.loads(event)
            except ValueError:
                raise RequestFailed(f"The stream held an event that is not JSON: {event[:80]!r}.") from None
            if error := chunk.get("error"):
                raise RequestFailed(str(error.get("message", error) if isinstance(error, dict) else error))
            yield chunk
    raise RequestFailed("The stream ended without [DONE].")


def _take(outcome: Outcome, chunk: Mapping[str, Any], now_s: float) -> None:
    """Add one chunk's time and text; usage, which comes last, holds the exact token counts."""
    if choices := chunk.get("choices"):
        if outcome.chunk_times_s:
            outcome.itl_s.append(now_s - outcome.chunk_times_s[-1])
        else:
            outcome.ttft_s = now_s - outcome.start_s
        outcome.chunk_times_s.append(now_s)
        outcome.latency_s = now_s - outcome.start_s
        outcome.text += choices[0].get("text") or ""
        outcome.num_output = len(outcome.chunk_times_s)  # until usage says better
    if usage := chunk.get("usage"):
        outcome.num_input = usage.get("prompt_tokens", outcome.num_input)
        outcome.num_output = usage.get("completion_tokens", outcome.num_output)


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
