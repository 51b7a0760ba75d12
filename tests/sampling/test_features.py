"""Each feature against a plain definition of it."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from minivllm.sampling.allowed import AllowedTokens
from minivllm.sampling.bad_words import BadWords
from minivllm.sampling.batch import Feature, SampleBatch
from minivllm.sampling.bias import LogitBias
from minivllm.sampling.min_p import MinP
from minivllm.sampling.min_tokens import MinTokens
from minivllm.sampling.penalties import Penalties
from minivllm.sampling.temperature import Temperature
from minivllm.sampling.top_k import TopK
from minivllm.sampling.top_p import TopP
from minivllm.types import NewRow, SamplingParams

VOCAB = 37
INF = float("inf")


def apply(
    feature: Feature, logits: torch.Tensor, params: list[SamplingParams], known: list[tuple[list[int], list[int]]]
) -> torch.Tensor:
    """The logits after the feature, for rows with these parameters and (prompt, output)."""
    rows = np.arange(len(params))[::-1].copy()  # not the order of the batch
    width = max(len(p) + len(o) for p, o in known) + 2
    table = torch.full((len(params), width), -7, dtype=torch.int32)
    for row, sampling, (prompt, output) in zip(rows, params, known, strict=True):
        ids = prompt + output
        table[row, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
        feature.set_row(NewRow(0, int(row), tuple(ids), len(prompt), sampling, 0, 0, 0, ((),), 0))
    batch = SampleBatch(rows, np.array([len(p) + len(o) for p, o in known]), table)
    out = logits.clone()
    if feature.active(batch):
        feature.apply(out, batch)
    return out


def cases(seed: int, **ranges: Callable[[np.random.Generator], Any]) -> Iterator[tuple[Any, ...]]:
    """Random batches; about half of the rows do not ask for the feature."""
    rng = np.random.default_rng(seed)
    for _ in range(60):
        n = int(rng.integers(1, 6))
        logits = torch.from_numpy(rng.normal(size=(n, VOCAB)).astype(np.float32) * 4)
        if rng.random() < 0.3:
            logits = logits.round()  # ties
        logits[torch.from_numpy(rng.random((n, VOCAB)) < 0.1)] = -INF
        logits[:, 5] = 1.0  # never all masked
        asks = rng.random(n) < 0.6
        params = [SamplingParams(**({k: f(rng) for k, f in ranges.items()} if ask else {})) for ask in asks]
        prompts = [rng.integers(0, VOCAB, rng.integers(1, 9)).tolist() for _ in range(n)]
        known = [(prompt, rng.integers(0, 6, rng.integers(0, 12)).tolist()) for prompt in prompts]
        yield logits, params, known


def test_penalties() -> None:
    ranges = {
        "repetition_penalty": lambda r: float(r.choice([1.0, 0.5, 1.3])),
        "presence_penalty": lambda r: float(r.choice([0.0, -2.0, 0.7])),
        "frequency_penalty": lambda r: float(r.choice([0.0, 1.5, -0.3])),
    }
    touched = 0
    for logits, params, known in cases(0, **ranges):
        got = apply(Penalties(len(params)), logits, params, known)
        expected = logits.numpy().copy()
        for i, (p, (prompt, output)) in enumerate(zip(params, known, strict=True)):
            for token in {*prompt, *output}:
                r = np.float32(p.repetition_penalty)
                expected[i, token] = expected[i, token] / r if expected[i, token] > 0 else expected[i, token] * r
            for token in set(output):
                expected[i, token] -= np.float32(p.frequency_penalty) * output.count(token)
                expected[i, token] -= np.float32(p.presence_penalty)
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-6)
        touched += not torch.equal(got, logits)
    assert touched > 30


def test_logit_bias() -> None:
    def pairs(r: np.random.Generator) -> tuple[tuple[int, float], ...]:
        return tuple((int(t), float(r.uniform(-100, 100))) for t in r.permutation(VOCAB)[: r.integers(0, 6)])

    touched = 0
    for logits, params, known in cases(7, logit_bias=pairs):
        got = apply(LogitBias(len(params)), logits, params, known)
        expected = logits.clone()
        for i, p in enumerate(params):
            for token, value in p.logit_bias:
                expected[i, token] += value
        assert torch.equal(got, expected)
        touched += not torch.equal(got, logits)
    assert touched > 30


def test_allowed_token_ids() -> None:
    def some(r: np.random.Generator) -> tuple[int, ...]:
        return tuple(r.integers(0, VOCAB, r.integers(1, 9)).tolist())  # a token may be named twice

    touched = 0
    for logits, params, known in cases(8, allowed_token_ids=some):
        got = apply(AllowedTokens(len(params)), logits, params, known)
        expected = logits.clone()
        for i, p in enumerate(params):
            if p.allowed_token_ids is not None:
                expected[i, [t for t in range(VOCAB) if t not in p.allowed_token_ids]] = -INF
        assert torch.equal(got, expected)
        touched += not torch.equal(got, logits)
    assert touched > 30


def test_bad_words() -> None:
    """Outputs are of tokens 0 to 5 (``cases``), so words of such tokens are begun often."""

    def words(r: np.random.Generator) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(r.integers(0, 6, r.integers(1, 4)).tolist()) for _ in range(r.integers(1, 8)))

    touched = 0
    for logits, params, known in cases(9, bad_word_ids=words):
        got = apply(BadWords(len(params)), logits, params, known)
        expected = logits.clone()
        for i, (p, (_, output)) in enumerate(zip(params, known, strict=True)):
            for *begin, last in p.bad_word_ids:
                if not begin or output[-len(begin) :] == begin:
                    expected[i, last] = -INF
        assert torch.equal(got, expected)
        touched += not torch.equal(got, logits)
    assert touched > 30


def test_min_tokens() -> None:
    ranges = {
        "min_tokens": lambda r: int(r.integers(0, 15)),
        "stop_token_ids": lambda r: tuple(r.integers(0, 50, 3).tolist()),  # some beyond the vocabulary
        "ignore_eos": lambda r: bool(r.integers(2)),
    }
    touched = 0
    for logits, params, known in cases(1, **ranges):
        got = apply(MinTokens(len(params), VOCAB, (2, 3, 99)), logits, params, known)
        expected = logits.clone()
        for i, (p, (_, output)) in enumerate(zip(params, known, strict=True)):
            if len(output) < p.min_tokens:
                expected[i, [t for t in (2, 3, *p.stop_token_ids) if t < VOCAB]] = -INF
        assert torch.equal(got, expected)
        touched += not torch.equal(got, logits)
    assert touched > 20


def test_min_tokens_ends_at_the_right_token() -> None:
    """With n outputs known, token n + 1 is sampled: the mask holds while n < min_tokens."""
    for num_output in range(4):
        logits = torch.zeros(1, VOCAB)
        got = apply(MinTokens(1, VOCAB, (2,)), logits, [SamplingParams(min_tokens=2)], [([1, 1, 1], [5] * num_output)])
        assert bool(got[0, 2] == -INF) == (num_output < 2)


def test_temperature() -> None:
    for logits, params, known in cases(2, temperature=lambda r: float(r.uniform(0.01, 2))):
        got = apply(Temperature(len(params)), logits, params, known)
        t = torch.tensor([p.temperature for p in params], dtype=torch.float32)
        assert torch.equal(got, logits / t[:, None])


def kept(got: torch.Tensor, logits: torch.Tensor) -> np.ndarray:
    """Which logits are left; those must be as they were."""
    left = (got > -INF).numpy()
    assert torch.equal(got[got > -INF], logits[got > -INF])
    return left


def test_min_p() -> None:
    for logits, params, known in cases(3, min_p=lambda r: float(r.choice([0.01, 0.3, 1.0]))):
        left = kept(apply(MinP(len(params)), logits, params, known), logits)
        p = logits.double().softmax(-1).numpy()
        for i, sampling in enumerate(params):
            floor = sampling.min_p * p[i].max()
            assert left[i][p[i] > floor * (1 + 1e-5)].all()
            assert not left[i][p[i] < floor * (1 - 1e-5)].any()
            if sampling.min_p == 1.0:
                assert set(np.flatnonzero(left[i])) == set(np.flatnonzero(p[i] == p[i].max()))


def test_top_k() -> None:
    for logits, params, known in cases(4, top_k=lambda r: int(r.choice([1, 2, 5, 36, 37, 38, 10**6]))):
        left = kept(apply(TopK(len(params), VOCAB), logits, params, known), logits)
        for i, sampling in enumerate(params):
            order = sorted(logits[i].tolist(), reverse=True)
            kth = order[min(sampling.top_k or VOCAB, VOCAB) - 1]
            assert (left[i] == ((logits[i] >= kth) & (logits[i] > -INF)).numpy()).all()


def nucleus(logits: torch.Tensor, p: float) -> set[int]:
    """The fewest most likely tokens with at least p together, and those equal to the last."""
    probabilities = logits.double().softmax(-1).tolist()
    order = sorted(range(len(probabilities)), key=lambda i: -probabilities[i])
    mass, last = 0.0, order[0]
    for i in order:
        last = i
        mass += probabilities[i]
        if mass >= p - 1e-9:
            break
    return {i for i in order if probabilities[i] >= probabilities[last] and probabilities[i] > 0.0}


def test_top_p() -> None:
    for logits, params, known in cases(5, top_p=lambda r: float(r.choice([1e-9, 0.1, 0.5, 0.9, 0.999]))):
        left = kept(apply(TopP(len(params)), logits, params, known), logits)
        for i, sampling in enumerate(params):
            expected = nucleus(logits[i], sampling.top_p) if sampling.top_p < 1 else set(np.flatnonzero(logits[i] > -INF))
            assert set(np.flatnonzero(left[i])) == expected


@pytest.mark.parametrize("spread", [0.0, 0.05, 2.0, 30.0])
def test_top_p_looks_as_far_as_it_must(spread: float) -> None:
    """Vocabularies larger than the first looks: flat distributions need everything, sharp ones one token."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5000, generator=generator) * spread
    params = [SamplingParams(top_p=p) for p in (0.01, 0.6, 0.97)]
    left = kept(apply(TopP(3), logits, params, [([1], [])] * 3), logits)
    for i, sampling in enumerate(params):
        expected = nucleus(logits[i], sampling.top_p)
        assert abs(left[i].sum() - len(expected)) <= 1  # float sums of the reference may be off by a token
        mass = float(logits[i].double().softmax(-1)[torch.from_numpy(left[i])].sum())
        assert mass >= sampling.top_p - 1e-9


def test_exact_nucleus_boundary() -> None:
    """Probabilities 1/2, 1/4, 1/8, 1/8: a mass that is met exactly needs no further token."""
    logits = torch.log(torch.tensor([[0.25, 0.5, 0.125, 0.125]])) * 1.0
    for p, expected in ((0.49, {1}), (0.51, {0, 1}), (0.74, {0, 1}), (0.76, {0, 1, 2, 3}), (1e-12, {1})):
        left = kept(apply(TopP(1), logits, [SamplingParams(top_p=p)], [([1], [])]), logits)
        assert set(np.flatnonzero(left[0])) == expected


def test_features_rest_when_unused() -> None:
    table = torch.zeros(4, 8, dtype=torch.int32)
    batch = SampleBatch(np.arange(4), np.full(4, 3), table)
    features: list[Feature] = [Penalties(4), MinTokens(4, VOCAB, (1,)), MinP(4), TopK(4, VOCAB), TopP(4), Temperature(4)]
    for feature in features:
        for row in range(4):
            feature.set_row(NewRow(row, row, (1,), 1, SamplingParams(), 0, 0, 0, ((),), 0))
        assert not feature.active(batch)
        feature.set_row(
            NewRow(0, 2, (1,), 1, SamplingParams(
                temperature=0.5, top_k=3, top_p=0.5, min_p=0.1, min_tokens=9, presence_penalty=1.0), 0, 0, 0, ((),), 0)
        )
        assert feature.active(batch)
        assert not feature.active(batch.take(np.array([0, 1, 3])))
    assert math.isfinite(float(table.sum()))
