"""Small scenes on the real engine, each arranged so that one idea shows; what comes back are its StepRecords.

Prompts are arbitrary tokens and every text is generated to its given length, so the records say the same on every machine but
for their times: what the scheduler does depends on numbers of tokens, blocks and rows alone.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from minivllm.config import make_config
from minivllm.door import locate
from minivllm.engine.build import build_engine
from minivllm.engine.engine import Engine
from minivllm.llm import LLM
from minivllm.records import StepRecord
from minivllm.types import GenerateRequest, SamplingParams, TokenEvent

BLOCK: Final = 16


@dataclass(frozen=True)
class Arrival:
    """A request of a scene."""

    id: str
    prompt_ids: tuple[int, ...]
    num_output: int
    at_step: int = 0  # it comes when so many steps have been
    priority: int = 0


def prompt(seed: int, length: int) -> tuple[int, ...]:
    """Some tokens; those of different seeds have no beginning in common."""
    return tuple([10 + (seed * 389 + i * 31) % 4000 for i in range(length)])


def make_engine(**options: Any) -> Engine:
    """An engine of the bundled model on one thread, with little cache."""
    small = {"device": "cpu", "num_threads": 1, "num_gpu_blocks_override": 64, "max_num_seqs": 8, "block_size": BLOCK}
    config, _ = locate(make_config(**{**small, **options}))
    return build_engine(config)


def request_of(arrival: Arrival, arrival_s: float = 0.0) -> GenerateRequest:
    """As the engine takes it: greedy, and never ended by a token."""
    sampling = SamplingParams(temperature=0.0, max_tokens=arrival.num_output, ignore_eos=True, seed=0)
    return GenerateRequest(
        id=arrival.id, prompt_ids=arrival.prompt_ids, sampling=sampling, arrival_s=arrival_s, priority=arrival.priority
    )


class Session:
    """An engine that is led through a scene, and what it told. Written by who runs the scene."""

    def __init__(self, **options: Any) -> None:
        self.engine = make_engine(**options)
        self.records: list[StepRecord] = []
        self.events: list[TokenEvent] = []

    @property
    def num_steps(self) -> int:
        """Steps so far; records without one are not counted."""
        return sum(bool(record.rows) for record in self.records)

    def step(self) -> None:
        """One turn of the engine's loop."""
        output = self.engine.step()
        if output is not None:
            self.events += output.events
            if output.record is not None:
                self.records.append(output.record)

    def run(self, arrivals: Sequence[Arrival]) -> list[StepRecord]:
        """Let requests come at their steps, and run until all have ended."""
        left, begun = sorted(arrivals, key=lambda one: one.at_step), self.num_steps
        while left or self.engine.has_work:
            while left and (left[0].at_step <= self.num_steps - begun or not self.engine.has_work):
                self.engine.add(request_of(left.pop(0)))
            self.step()
        return self.records


def run(arrivals: Sequence[Arrival], **options: Any) -> list[StepRecord]:
    """The records of one engine that serves these requests."""
    return Session(**options).run(arrivals)


# ------------------------------------------------------------------------------------------------------- the scenes

OF_A_BATCH: Final = ((9, 5), (14, 17), (7, 9), (12, 3), (10, 8), (8, 13), (15, 4), (6, 10))  # (prompt, output) of each


def batch_of_eight() -> list[Arrival]:
    """Eight requests of different lengths that are there at once."""
    return [Arrival("ABCDEFGH"[i], prompt(i, p), o) for i, (p, o) in enumerate(OF_A_BATCH)]


def static_batch() -> list[StepRecord]:
    """Four at a time; the next four when the last of them is done."""
    session, arrivals = Session(max_num_seqs=4), batch_of_eight()
    session.run(arrivals[:4])
    return session.run(arrivals[4:])


def continuous_batch() -> list[StepRecord]:
    """Four at a time; the next whenever one is done."""
    return run(batch_of_eight(), max_num_seqs=4)


def without_cache(num_prompt: int, num_output: int) -> list[StepRecord]:
    """Every token from scratch: a request for one token, then one with that token in its prompt, and so on."""
    session, known = Session(enable_prefix_caching=False), prompt(0, num_prompt)
    for i in range(num_output):
        session.run([Arrival(f"A{i}", known, 1)])
        known += session.events[-1].token_ids
    return session.records


def with_cache(num_prompt: int, num_output: int) -> list[StepRecord]:
    """The same text, its K and V kept."""
    return run([Arrival("A", prompt(0, num_prompt), num_output)])


def long_prompt(most_tokens: int, batching_policy: str = "mixed") -> list[StepRecord]:
    """Three texts are being generated when a prompt of 180 tokens comes."""
    short = [Arrival("ABC"[i], prompt(i, 5 + i), 18 - 2 * i) for i in range(3)]
    options = {"max_num_batched_tokens": most_tokens, "batching_policy": batching_policy}
    return run([*short, Arrival("D", prompt(9, 180), 6, at_step=4)], **options)


def common_prefix() -> list[StepRecord]:
    """Three prompts begin with the same 64 tokens (A, B, D): the second while the first runs, the third when both are gone. C
    has nothing in common with them."""
    common = prompt(0, 4 * BLOCK)
    asked = (
        Arrival("A", common + prompt(51, 9), 12),
        Arrival("B", common + prompt(52, 6), 11, at_step=4),
        Arrival("C", prompt(53, 20), 20, at_step=6),
        Arrival("D", common + prompt(54, 13), 8, at_step=19),
    )
    return run(asked, num_gpu_blocks_override=13)


def paged() -> list[StepRecord]:
    """Requests of different lengths come, grow and go."""
    sizes = ((20, 30, 0), (37, 18, 0), (9, 42, 2), (50, 20, 6), (24, 22, 22))  # (prompt, output, step)
    arrivals = [Arrival("ABCDE"[i], prompt(i, p), o, at) for i, (p, o, at) in enumerate(sizes)]
    return run(arrivals, num_gpu_blocks_override=17, enable_prefix_caching=False)


def too_little_memory() -> list[StepRecord]:
    """Three texts that grow beyond what the cache holds together."""
    sizes = ((20, 44), (26, 40), (18, 36))
    return run([Arrival("ABC"[i], prompt(i, p), o) for i, (p, o) in enumerate(sizes)], num_gpu_blocks_override=10)


def memory_use() -> list[StepRecord]:
    """Waves of requests over a cache that keeps what they leave, until it has to forget."""
    sizes = ((40, 10, 0), (30, 12, 1), (36, 9, 8), (44, 8, 14), (40, 10, 22), (34, 9, 28))
    arrivals = [Arrival("ABCDEF"[i], prompt(i % 5, p), o, at) for i, (p, o, at) in enumerate(sizes)]
    return run(arrivals, num_gpu_blocks_override=14, max_num_seqs=2)


def queue_order(scheduling_policy: str) -> list[StepRecord]:
    """Two places, and a queue in which the last has the best priority (the lowest number)."""
    asked = (("A", 8, 0, 3), ("B", 12, 0, 3), ("C", 7, 1, 3), ("D", 5, 1, 3), ("E", 6, 3, 1), ("F", 4, 5, 2))
    arrivals = [Arrival(id, prompt(i, 8 + i), o, at, p) for i, (id, o, at, p) in enumerate(asked)]
    return run(arrivals, max_num_seqs=2, scheduling_policy=scheduling_policy)


def busy() -> list[StepRecord]:
    """Chunks, hits, waiting for a row and for blocks, a preemption: what a trace may show, in one short run."""
    common = prompt(0, 3 * BLOCK)
    asked = (
        Arrival("A", common + prompt(61, 5), 26),
        Arrival("B", prompt(62, 30), 30, at_step=2),
        Arrival("C", common + prompt(63, 8), 30, at_step=5),
        Arrival("D", prompt(64, 30), 6, at_step=8),
        Arrival("E", common + prompt(65, 3), 5, at_step=10),
    )
    return run(asked, num_gpu_blocks_override=11, max_num_seqs=3, max_num_batched_tokens=24)


# ------------------------------------------------------------------------------------------------------------- sampling

STORY: Final = "Lily wanted to eat a"


def next_token(prompt: str, num_draws: int, **sampling: Any) -> tuple[Counter[str], dict[str, float]]:
    """Draw the token after a prompt so often, each time with another seed: how often each came, and the likeliest with what the
    model gives them."""
    llm = LLM(device="cpu", num_threads=1)
    asked = [SamplingParams(max_tokens=1, seed=seed, logprobs=None if seed else 20, **sampling) for seed in range(num_draws)]
    found = llm.generate([prompt] * num_draws, asked)
    ids = Counter(completion.token_ids[0] for completion in found)
    told = found[0].logprobs[0]
    likeliest = zip(told.top_ids, told.top_logprobs, strict=True)

    def text(token: int) -> str:
        return llm.tokenizer.decode([token])

    return Counter({text(i): n for i, n in ids.most_common()}), {text(i): math.exp(logprob) for i, logprob in likeliest}
