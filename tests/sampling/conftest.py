"""Helpers of the sampling tests."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from minivllm.sampling.sampler import Sampler
from minivllm.types import NewRow, SamplingParams


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from more, and the tests of other files keep what they had."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Case:
    """One row of one step: everything its token may depend on."""

    logits: torch.Tensor  # [vocab] float32
    sampling: SamplingParams
    prompt: list[int] = field(default_factory=lambda: [0])
    output: list[int] = field(default_factory=list)
    seed: int = 0
    sample_index: int = 0


def sample_cases(cases: list[Case], eos: tuple[int, ...] = (), rows: list[int] | None = None) -> list[int]:
    """The tokens of cases that run as one batch, in the given rows."""
    rows = list(range(len(cases))) if rows is None else rows
    sampler = Sampler(max(rows) + 1, len(cases[0].logits), eos)
    known = [c.prompt + c.output for c in cases]
    table = torch.full((max(rows) + 1, max(map(len, known)) + 3), -7, dtype=torch.int32)  # what is not known is never read
    for row, case, ids in zip(rows, cases, known, strict=True):
        table[row, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
        blocks: tuple[tuple[int, ...], ...] = ((),)
        sampler.set_row(
            NewRow(row, row, tuple(ids), len(case.prompt), case.sampling, case.seed, case.sample_index, 0, blocks, 0)
        )
    logits = torch.stack([c.logits for c in cases])
    positions = np.array([len(ids) for ids in known])
    return [int(t) for t in sampler.sample(logits, np.array(rows), positions, table)]


@pytest.fixture
def make_case() -> type[Case]:
    """The class, for tests (which import nothing of each other)."""
    return Case


@pytest.fixture
def sample() -> Callable[..., list[int]]:
    """Run cases as one batch."""
    return sample_cases
