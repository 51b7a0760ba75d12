"""An engine over the token runner, for tests of what the scheduler promises."""

import itertools

import numpy as np
from record_watch import RecordWatch
from token_runner import TokenRunner, expected_tokens

from minivllm.engine.engine import Engine
from minivllm.kv.allocator import Allocator
from minivllm.records import StepRecord
from minivllm.scheduler.book import Limits
from minivllm.scheduler.scheduler import Scheduler
from minivllm.types import EngineInfo, GenerateRequest, SamplingParams, TokenEvent

VOCAB = 97


class Bench:
    """An engine over the token runner, with everything it said."""

    def __init__(self, num_blocks: int = 65, overlap: int = 0, prefix_caching: bool = True, **limits: object) -> None:
        values = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 256, "record_tokens": True, **limits}
        self.limits = Limits(**values)  # type: ignore[arg-type]
        self.kv = Allocator((num_blocks,), 4, prefix_caching)
        self.scheduler = Scheduler(self.limits, self.kv)
        self.watch = RecordWatch(self.scheduler, self.kv)
        accept = np.random.default_rng(7) if self.limits.num_draft_tokens else None
        self.runner = TokenRunner(4, num_blocks, self.limits.max_num_seqs, VOCAB, accept)
        self.now = itertools.count()
        info = EngineInfo(256, 8, 64, 4, num_blocks, VOCAB, self.limits.eos_token_ids, "test", "none", 0, 0, 0)
        self.engine = Engine(self.scheduler, self.runner, info, lambda: float(next(self.now)), overlap)
        self.events: list[TokenEvent] = []
        self.records: list[StepRecord] = []
        self.requests: dict[str, GenerateRequest] = {}

    def add(self, name: str, prompt: tuple[int, ...], max_tokens: int = 8, **more: object) -> None:
        sampling = {"max_tokens": max_tokens, "seed": 0, "ignore_eos": True, **more.pop("sampling", {})}  # type: ignore[dict-item]
        request = GenerateRequest(
            id=name, prompt_ids=prompt, sampling=SamplingParams(**sampling), arrival_s=float(next(self.now)), **more
        )
        self.engine.add(request)
        self.requests[name] = request

    def step(self) -> None:
        output = self.engine.step()
        self.engine.check()
        if output is not None:
            self.events += output.events
            if output.record:
                self.records.append(output.record)

    def run(self, max_steps: int = 3000) -> None:
        for _ in range(max_steps):
            if not self.engine.has_work:
                return
            self.step()
        raise AssertionError("the engine does not come to an end")

    def text(self, name: str) -> list[int]:
        return [t for e in self.events if e.id == name for t in e.token_ids]

    def expect_all(self) -> None:
        for name, r in self.requests.items():
            stop = frozenset(r.sampling.stop_token_ids)
            expected = expected_tokens(r.prompt_ids, r.sampling.max_tokens or 0, VOCAB, r.sampling.seed or 0, stop)
            assert self.text(name) == expected, name

    def assert_idle(self) -> None:
        assert self.kv.counts().referenced == 0
        assert not self.engine.has_work
