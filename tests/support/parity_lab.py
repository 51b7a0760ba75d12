"""One engine, five ways to compute the same requests, and what each way gave.

Used by the parity tests: prompts alone, in one batch, in chunks, with preemptions, and from the prefix cache. The real sampler
is wrapped, so every row of logits that it was given can be compared to the last bit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from minivllm.config import make_config
from minivllm.engine.build import build_engine
from minivllm.records import StepRecord
from minivllm.sampling.sampler import Sampler
from minivllm.types import GenerateRequest, NewRow, SamplingParams

NUM_PROMPTS, NUM_NEW = 32, 64
CASES = (  # of tests/support/tiny_models.py: every family; GQA, MHA, MQA; tied, untied; biases; rope variants; windows
    "gpt2",
    "llama-gqa",
    "llama-mha-tied",
    "llama-mqa-biases",
    "llama3-scaling",
    "mistral-window",
    "qwen2",
    "qwen3",
    "qwen3-window",
)


@dataclass
class Run:
    """What one way of computing gave."""

    tokens: list[list[int]]
    logits: dict[tuple[int, int], torch.Tensor]  # (request, position) -> [vocab]
    records: list[StepRecord]

    def total(self, name: str) -> int:
        return sum(getattr(r, name) for r in self.records)

    @property
    def num_chunked(self) -> int:
        """Steps that computed a part of a prompt and did not finish it."""
        return sum(row.kind == "prefill" and row.start > 0 for r in self.records for row in r.rows)


@dataclass
class Tapped:
    """The real sampler, and every row of logits it was given. Written by the runner."""

    inner: Sampler
    uids: dict[int, int] = field(default_factory=dict)
    seen: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    def set_row(self, new: NewRow) -> None:
        self.uids[new.row] = new.uid
        self.inner.set_row(new)

    def free_row(self, row: int) -> None:
        self.inner.free_row(row)

    def sample(
        self, logits: torch.Tensor, rows: npt.NDArray[np.int64], positions: npt.NDArray[np.int64], tokens: torch.Tensor
    ) -> torch.Tensor:
        kept = logits.clone()
        for i, (row, position) in enumerate(zip(rows.tolist(), positions.tolist(), strict=True)):
            self.seen[self.uids[row], position] = kept[i]
        return self.inner.sample(logits, rows, positions, tokens)


class Lab:
    """An engine for one model folder and one set of options."""

    def __init__(self, folder: Path, num_new: int = NUM_NEW, **options: object) -> None:
        """``num_new``: tokens that every request asks for."""
        config = make_config(
            **{"model": str(folder), "dtype": "float32", "max_model_len": 192, "max_num_seqs": 32, "num_threads": 1, **options}
        )
        taps: list[Tapped] = []

        def make_sampler(max_num_seqs: int, vocab_size: int, eos_ids: tuple[int, ...]) -> Tapped:
            taps.append(Tapped(Sampler(max_num_seqs, vocab_size, eos_ids)))
            return taps[0]

        self.engine = build_engine(config, make_sampler)
        self.tap = taps[0]
        self.uid, self.num_new = 0, num_new

    def run(self, prompts: Sequence[Sequence[int]]) -> Run:
        """All prompts at once."""
        first = self.uid
        self.tap.seen.clear()
        for prompt in prompts:
            sampling = SamplingParams(temperature=0, max_tokens=self.num_new, seed=0, ignore_eos=True)
            self.engine.add(GenerateRequest(id=str(self.uid), prompt_ids=tuple(prompt), sampling=sampling, arrival_s=0.0))
            self.uid += 1
        tokens: dict[str, list[int]] = {str(first + i): [] for i in range(len(prompts))}
        records = []
        while self.engine.has_work:
            output = self.engine.step()
            if output is None:
                continue
            for event in output.events:
                assert event.error is None, event.error
                tokens[event.id] += event.token_ids
            if output.record is not None:
                records.append(output.record)
        self.engine.check()
        assert records[-1].blocks_referenced == 0
        logits = {(uid - first, position): row for (uid, position), row in self.tap.seen.items()}
        return Run(list(tokens.values()), logits, records)

    def run_alone(self, prompts: Sequence[Sequence[int]]) -> Run:
        """One prompt after the other."""
        runs = [self.run([p]) for p in prompts]
        logits = {(i, position): row for i, r in enumerate(runs) for (_, position), row in r.logits.items()}
        return Run([r.tokens[0] for r in runs], logits, [x for r in runs for x in r.records])


def make_prompts(vocab_size: int) -> list[list[int]]:
    """Mixed lengths; a third of them share a beginning, so that prefixes are shared inside a step too."""
    rng = np.random.default_rng(5)
    head = rng.integers(0, vocab_size, 40).tolist()
    prompts = []
    for i in range(NUM_PROMPTS):
        body = rng.integers(0, vocab_size, int(rng.integers(1, 80))).tolist()
        prompts.append(head + body if i % 3 == 0 else body)
    return prompts


def five_ways(
    folder: Path, prompts: list[list[int]], *, num_new: int = NUM_NEW, make: Callable[..., Lab] = Lab, **common: object
) -> dict[str, Run]:
    """The same requests, computed in five ways; the counts say that each way was really taken. ``make`` builds the labs."""
    common["num_new"] = num_new
    whole = make(folder, **common)
    longest = max(map(len, prompts)) + num_new
    runs = {
        "alone": make(folder, enable_prefix_caching=False, **common).run_alone(prompts),
        "batch": whole.run(prompts),
        "chunks": make(folder, max_num_batched_tokens=16, max_num_seqs=16, **common).run(prompts),
        "preempted": make(folder, num_gpu_blocks_override=2 + 2 * longest // 16, **common).run(prompts),
        "cached": whole.run(prompts),
    }
    assert runs["alone"].total("prefix_hits") == 0
    assert max(len(r.rows) for r in runs["alone"].records) == 1
    assert max(len(r.rows) for r in runs["batch"].records) == len(prompts)
    assert runs["chunks"].num_chunked >= len(prompts)
    assert max(sum(x.num_tokens for x in r.rows) for r in runs["chunks"].records) <= 16
    assert any(r.preempted for r in runs["preempted"].records)
    full_blocks = sum((len(p) - 1) // 16 * 16 for p in prompts)
    assert runs["cached"].total("prefix_hits") >= full_blocks
    return runs
