"""Benchmarks without a server: how much a batch gives (throughput) and how long a small one takes (latency)."""

import time
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import numpy as np

from minivllm.bench.workload import Item
from minivllm.types import SamplingParams

PERCENTILES: Final = (10, 25, 50, 75, 90, 99)


class _Completion(Protocol):
    """What is read of a finished completion."""

    @property
    def prompt_ids(self) -> Sequence[int]:
        """The prompt as the model saw it."""

    @property
    def token_ids(self) -> Sequence[int]:
        """The tokens generated."""


class Engine(Protocol):
    """What is needed of ``minivllm.LLM``; a rival engine in this shape can be measured the same way."""

    def generate(
        self, prompts: Any, sampling: Any, progress: Callable[[int], None] | None = None
    ) -> Sequence[_Completion]:
        """Complete every prompt."""


def _split(items: Sequence[Item]) -> list[Any]:
    """The prompts as the engine takes them: texts, or lists of token ids."""
    return [item.prompt if isinstance(item.prompt, str) else list(item.prompt) for item in items]


def _sampling(items: Sequence[Item], fields: dict[str, Any]) -> list[SamplingParams]:
    """One sampling setting per item; outputs have exactly the length asked for."""
    return [SamplingParams(**{"ignore_eos": True, **fields, "max_tokens": item.max_tokens}) for item in items]


def throughput(
    llm: Engine, items: Sequence[Item], fields: dict[str, Any], progress: Callable[[int], None] | None = None
) -> tuple[dict[str, Any], int, int]:
    """Run all items at once; returns the result (keys as vLLM's), the prompt tokens and the output tokens."""
    begin = time.perf_counter()
    done = llm.generate(_split(items), _sampling(items, fields), progress)
    elapsed_s = time.perf_counter() - begin
    num_prompt = sum(len(c.prompt_ids) for c in done)
    num_output = sum(len(c.token_ids) for c in done)
    result = {
        "elapsed_time": elapsed_s,
        "num_requests": len(done),
        "total_num_tokens": num_prompt + num_output,
        "requests_per_second": len(done) / elapsed_s,
        "tokens_per_second": (num_prompt + num_output) / elapsed_s,
    }
    return result, num_prompt, num_output


def latency(
    llm: Engine, draw: Callable[[int], Sequence[Item]], fields: dict[str, Any], num_warmup: int, num_iters: int
) -> dict[str, Any]:
    """Time ``num_iters`` runs of one batch after ``num_warmup`` untimed ones.

    ``draw(i)`` gives run i's batch: fresh prompts each time, so that the prefix cache does not do the work that is measured.
    """
    latencies: list[float] = []
    for i in range(num_warmup + num_iters):
        items = draw(i)
        begin = time.perf_counter()
        llm.generate(_split(items), _sampling(items, fields))
        if i >= num_warmup:
            latencies.append(time.perf_counter() - begin)
    return {
        "avg_latency": float(np.mean(latencies)),
        "latencies": latencies,
        "percentiles": {str(p): float(np.percentile(latencies, p)) for p in PERCENTILES},
    }
