"""Drives a Runner with hand-written plans, the way a scheduler would, and keeps the logits of every sampled token."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from minivllm.config import make_config
from minivllm.runner.build import build_runner
from minivllm.runner.runner import Runner
from minivllm.types import WANT_SAMPLE, CopyBlock, EngineInfo, NewRow, RowWork, SamplingParams, StepPlan, StepResult

GREEDY = SamplingParams(temperature=0.0, max_tokens=1000, seed=0)


class GreedyRecorder:
    """A sampler that takes the most likely token and keeps the logits of its last call by row."""

    def __init__(self, max_num_seqs: int, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self.logits: dict[int, torch.Tensor] = {}
        self.positions: dict[int, int] = {}
        self.rows: set[int] = set()

    def set_row(self, new: NewRow) -> None:
        self.rows.add(new.row)

    def free_row(self, row: int) -> None:
        self.rows.discard(row)

    def sample(self, logits: Any, rows: np.ndarray, positions: np.ndarray, tokens: Any) -> torch.Tensor:
        self.logits = {row: logits[i].clone() for i, row in enumerate(rows.tolist())}
        self.positions = dict(zip(rows.tolist(), positions.tolist(), strict=True))
        return logits.argmax(-1)


@dataclass
class Seq:
    """One sequence on the driver's side."""

    uid: int
    row: int
    tokens: list[int]
    num_prompt: int
    computed: int
    blocks: list[int]
    first_sampled: int  # tokens known when the row was taken
    is_new: bool = True
    logits: list[torch.Tensor] = field(default_factory=list)


class Driver:
    """Hands out blocks, writes plans, keeps what came back."""

    def __init__(self, runner: Runner, info: EngineInfo, shuffle: int | None = None) -> None:
        self.runner, self.info = runner, info
        self.free = list(range(1, info.num_blocks))
        if shuffle is not None:
            random.Random(shuffle).shuffle(self.free)
        self.rows = list(range(info.max_num_seqs))
        self.freed: list[int] = []
        self.copies: list[CopyBlock] = []
        self.steps = self.uids = 0

    def open(self, tokens: Sequence[int], num_prompt: int | None = None, shared: Sequence[int] = (), computed: int = 0) -> Seq:
        """A sequence takes a row; ``shared`` blocks hold its first ``computed`` tokens already."""
        self.uids += 1
        known = list(tokens)
        return Seq(self.uids, self.rows.pop(0), known, num_prompt or len(known), computed, list(shared), len(known))

    def close(self, seq: Seq, keep_blocks: bool = False) -> None:
        """The sequence leaves its row; its blocks go back unless somebody still wants them."""
        self.freed.append(seq.row)
        self.rows.append(seq.row)
        if not keep_blocks:
            self.free += seq.blocks

    def plan(self, work: Sequence[tuple[Seq, int]]) -> StepPlan:
        """Write the plan of one step: (sequence, number of tokens) each; samples where the last known token is reached."""
        news, items = [], []
        for seq, count in work:
            need = -(-(seq.computed + count) // self.info.block_size) - len(seq.blocks)
            more = tuple(self.free.pop(0) for _ in range(max(need, 0)))
            if seq.is_new:
                held = (tuple(seq.blocks) + more,)
                news.append(NewRow(seq.uid, seq.row, tuple(seq.tokens), seq.num_prompt, GREEDY, 0, 0, 0, held, seq.computed))
            wants = WANT_SAMPLE if seq.computed + count == len(seq.tokens) else 0
            new_blocks = (more,) if more and not seq.is_new else ()
            items.append(RowWork(seq.uid, seq.row, count, new_blocks, (), wants))
            seq.blocks += more
            seq.is_new = False
            seq.computed += count
        self.steps += 1
        plan = StepPlan(self.steps, tuple(items), tuple(news), tuple(self.freed), tuple(self.copies))
        self.freed, self.copies = [], []
        return plan

    def step(self, work: Sequence[tuple[Seq, int]]) -> StepResult:
        """Plan, run and take in one step."""
        pending = self.runner.launch(self.plan(work))
        pending.sample()
        result = pending.result()
        for (seq, _), tokens in zip(work, result.tokens, strict=True):
            if tokens:
                seq.logits.append(self.runner.sampler.logits[seq.row])
            seq.tokens += tokens
        return result

    def finish(self, seqs: Sequence[Seq], num_new: int, chunk: int = 10**9) -> None:
        """Run sequences side by side, prompts in chunks, until each has ``num_new`` tokens more than when it was opened."""
        while True:
            work = [(s, min(chunk, len(s.tokens) - s.computed)) for s in seqs if len(s.tokens) < s.first_sampled + num_new]
            if not work:
                return
            self.step(work)

    def generate(self, prompts: Sequence[Sequence[int]], num_new: int, chunk: int = 10**9, together: bool = True) -> list[Seq]:
        """Generate for every prompt, in one batch or one after another."""
        groups = [list(prompts)] if together else [[p] for p in prompts]
        done = []
        for group in groups:
            seqs = [self.open(p) for p in group]
            self.finish(seqs, num_new, chunk)
            for seq in seqs:
                self.close(seq)
            done += seqs
        return done


def make_driver(shuffle: int | None = None, **options: Any) -> Driver:
    """Build a runner with small defaults."""
    defaults: dict[str, Any] = {"dtype": "float32", "num_threads": 1, "max_num_seqs": 16, "max_num_batched_tokens": 512}
    if not options.keys() & {"kv_cache_memory_bytes", "gpu_memory_utilization", "num_gpu_blocks_override"}:
        defaults["num_gpu_blocks_override"] = 200
    runner, info = build_runner(make_config(**{**defaults, **options}), GreedyRecorder)
    return Driver(runner, info, shuffle)


MakeDriver = Callable[..., Driver]
