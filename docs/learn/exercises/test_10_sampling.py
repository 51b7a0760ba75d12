"""Exercise 10: from logits to a token.

Write two functions. ``keep(logits, min_p, top_k, top_p)``: the ids of the tokens that may be drawn, in any order; the
filters come in this order, each looking at what the ones before left (``minivllm/sampling/sampler.py`` has the order,
``top_p.py`` what a nucleus is). top_k 0, min_p 0 and top_p 1 keep everything. ``draw(logits, u)``: the token that the
Gumbel-max trick draws with one uniform number for each token. The engine's own filters are asked whether you are right.
"""

from types import ModuleType

import numpy as np
import pytest
import torch

from minivllm.sampling.batch import SampleBatch
from minivllm.sampling.min_p import MinP
from minivllm.sampling.top_k import TopK
from minivllm.sampling.top_p import TopP
from minivllm.types import NewRow, SamplingParams

VOCAB = 50


def engines(logits: np.ndarray, sampling: SamplingParams) -> set[int]:
    """What the engine's filters leave."""
    new = NewRow(0, 0, (1,), 1, sampling, 0, 0, 0, (), 0)
    batch = SampleBatch(np.zeros(1, np.int64), np.ones(1, np.int64), torch.zeros(1, 4, dtype=torch.int32))
    left = torch.from_numpy(logits.astype(np.float32))[None].clone()
    for feature in (MinP(1), TopK(1, VOCAB), TopP(1)):
        feature.set_row(new)
        if feature.active(batch):
            feature.apply(left, batch)
    return set(torch.isfinite(left[0]).nonzero()[:, 0].tolist())


SETTINGS = [
    {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.2}, {}, {"top_k": 8, "top_p": 0.9}, {"top_k": 3, "top_p": 0.99, "min_p": 0.05},
    {"top_k": 4, "top_p": 0.6}, {"min_p": 0.1, "top_p": 0.8}, {"top_p": 0.05},
]  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_the_same_tokens_are_kept(solution: ModuleType, setting: dict[str, float], seed: int) -> None:
    logits = np.random.default_rng(seed).normal(size=VOCAB) * 2
    asked = {"min_p": 0.0, "top_k": 0, "top_p": 1.0, **setting}
    assert set(map(int, solution.keep(logits, **asked))) == engines(logits, SamplingParams(**asked))


def test_draws_are_as_likely_as_they_should_be(solution: ModuleType) -> None:
    rng = np.random.default_rng(0)
    logits = np.array([2.0, 1.0, 0.0, -1.0])
    chances = np.exp(logits) / np.exp(logits).sum()
    drawn = np.bincount([int(solution.draw(logits, rng.uniform(size=4))) for _ in range(20_000)], minlength=4) / 20_000
    np.testing.assert_allclose(drawn, chances, atol=0.015)


def test_a_draw_is_a_function_of_its_noise(solution: ModuleType) -> None:
    logits, u = np.array([0.0, 0.0, 5.0]), np.array([0.1, 0.999999, 0.2])
    assert int(solution.draw(logits, u)) == 1
