"""Rungs 4 to 8: the engine itself, with its ideas switched on one by one.

Rung 4 computes with torch's kernels, as the programs below it do, so that its step shows what paging alone does. 4k exchanges
the kernels for the project's own, which read the cache's blocks where they lie; the rungs above keep them.

What a rung cost is read from the engine's StepRecords: which row computed which positions in which step.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from minivllm.config import Config, make_config
from minivllm.engine.build import build_engine
from minivllm.engine.engine import Engine
from minivllm.errors import GenerationFailed
from minivllm.learn.arithmetic import Cost, Sizes, step_cost
from minivllm.learn.desk import Desk, Request
from minivllm.records import StepRecord
from minivllm.types import GenerateRequest, SamplingParams

QUEUED_ROUNDS = 2  # requests at the engine, in batches: those that run, and as many that wait
TORCH_KERNELS: Mapping[str, Any] = MappingProxyType({"cpu_kernels": "torch", "gpu_kernels": "torch"})
OWN_KERNELS: Mapping[str, Any] = MappingProxyType({"cpu_kernels": "auto", "gpu_kernels": "auto"})


def engine_options(rung: str, batch_size: int, chunk_tokens: int) -> dict[str, Any]:
    """The options of an engine rung: those of the rung below it, and one idea more."""
    ladder: dict[str, Mapping[str, Any]] = {
        "4": {
            **TORCH_KERNELS,
            "enable_prefix_caching": False,
            "batching_policy": "separate",
            "enforce_eager": True,
            "async_scheduling": False,
            "max_num_seqs": batch_size,
        },
        "4k": OWN_KERNELS,
        "5": {"enable_prefix_caching": True},
        "6": {"batching_policy": "mixed", "max_num_batched_tokens": batch_size + chunk_tokens},
        "7": {"enforce_eager": False},
        "8": {"async_scheduling": True},
    }
    options: dict[str, Any] = {}
    for name, idea in ladder.items():
        options |= idea
        if name == rung:
            return options
    raise KeyError(rung)


@dataclass(frozen=True)
class EngineRun:
    """What an engine rung left behind."""

    costs: tuple[Cost, ...]  # of each step
    recomputed: int  # tokens that a row computed before (it was preempted)
    found: int  # prompt tokens that the prefix cache had
    notes: tuple[str, ...]


def start(base: Mapping[str, Any], options: Mapping[str, Any]) -> Engine:
    """An engine with these options. Raises ``StartupError``."""
    config: Config = make_config(**{**base, **options})
    return build_engine(config)


def serve(engine: Engine, desk: Desk, batch_size: int) -> list[StepRecord]:
    """Serve what the desk hands out; the records of the steps."""
    records: list[StepRecord] = []
    open_requests: dict[str, Request] = {}
    while engine.has_work or desk.open:
        room = QUEUED_ROUNDS * batch_size - len(open_requests)
        for request in desk.take(room, wait=not engine.has_work):
            open_requests[request.id] = request
            engine.add(_asked(request, desk.opened_s))
        message = engine.step()
        if message is None:
            continue
        for event in message.events:
            if event.error is not None:
                raise GenerationFailed(event.error)
            if (told := open_requests.get(event.id)) is None:
                continue  # cut short
            for token in event.token_ids:
                desk.tell(told, token)
            if told.cut:
                engine.abort([told.id])
            if told.done:
                del open_requests[told.id]
        if message.record is not None:
            records.append(message.record)
    return records


def measured(records: Sequence[StepRecord], sizes: Sizes, notes: tuple[str, ...]) -> EngineRun:
    """Costs from records."""
    reached: dict[str, int] = {}  # per request: positions computed so far
    recomputed = found = 0
    costs = []
    for record in records:
        if not record.rows:
            continue
        found += record.prefix_hits
        for row in record.rows:
            recomputed += max(0, min(reached.get(row.id, 0), row.start + row.num_tokens) - row.start)
            reached[row.id] = max(reached.get(row.id, 0), row.start + row.num_tokens)
        costs.append(step_cost(sizes, ((r.start, r.num_tokens) for r in record.rows), record.num_output_tokens))
    return EngineRun(tuple(costs), recomputed, found, notes)


def warm_up(engine: Engine, requests: Iterable[Request]) -> None:
    """Run requests whose figures nobody wants: threads start, kernels compile, memory is touched."""
    begin_s = time.monotonic()
    for request in requests:
        engine.add(_asked(request, begin_s))
    while engine.has_work:
        engine.step()


def _asked(request: Request, opened_s: float) -> GenerateRequest:
    sampling = SamplingParams(temperature=0, max_tokens=request.num_output, ignore_eos=True, seed=0)
    return GenerateRequest(
        id=request.id, prompt_ids=request.prompt, sampling=sampling, arrival_s=opened_s + request.arrival_s
    )
