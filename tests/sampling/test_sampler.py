"""The whole sampler: right distribution, and tokens that depend on nothing but their own row."""

import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from minivllm.sampling.sampler import Sampler
from minivllm.types import NewRow, SamplingParams

INF = float("inf")
VOCAB = 523  # no multiple of 4


def random_params(rng: random.Random) -> SamplingParams:
    """Any mixture of features, greedy and plain rows often."""
    kind = rng.random()
    if kind < 0.2:
        return SamplingParams(temperature=0.0, repetition_penalty=rng.choice([1.0, 1.2]))
    if kind < 0.4:
        return SamplingParams(temperature=rng.choice([1.0, 0.7]))
    return SamplingParams(
        temperature=rng.uniform(0.1, 2),
        top_k=rng.choice([0, 1, 5, 40, 500]),
        top_p=rng.choice([1.0, 0.9, 0.3]),
        min_p=rng.choice([0.0, 0.0, 0.05]),
        repetition_penalty=rng.choice([1.0, 1.3]),
        presence_penalty=rng.choice([0.0, 0.5]),
        frequency_penalty=rng.choice([0.0, 0.5]),
        min_tokens=rng.choice([0, 4]),
        stop_token_ids=(3, 4),
    )


def random_case(make_case: Any, rng: random.Random, vocab: int = VOCAB) -> Any:
    generator = torch.Generator().manual_seed(rng.randrange(2**32))
    logits = torch.randn(vocab, generator=generator) * rng.choice([0.3, 3.0, 9.0])
    if rng.random() < 0.3:
        logits = logits.bfloat16().float()  # ties
    return make_case(
        logits, random_params(rng), [rng.randrange(vocab) for _ in range(rng.randrange(1, 30))],
        [rng.randrange(vocab) for _ in range(rng.randrange(0, 30))], rng.randrange(-(2**63), 2**63), rng.randrange(3),
    )


@pytest.mark.parametrize("vocab", [VOCAB, 9000])
def test_alone_or_in_any_batch_the_same_token(make_case: Any, sample: Callable[..., list[int]], vocab: int) -> None:
    """The same logits row alone, and in batches of other settings, sizes, orders and rows."""
    torch.set_num_threads(2)  # so that batches of different sizes are cut differently
    rng = random.Random(vocab)
    pool = [random_case(make_case, rng, vocab) for _ in range(30)]
    alone = [sample([case], eos=(1,))[0] for case in pool]
    assert len(set(alone)) > 15
    for _ in range(12):
        chosen = rng.sample(range(len(pool)), rng.randrange(2, 30))
        rows = rng.sample(range(60), len(chosen))
        assert sample([pool[i] for i in chosen], eos=(1,), rows=rows) == [alone[i] for i in chosen]


@pytest.mark.parametrize("every", [1, 3])
def test_batches_over_one_part(make_case: Any, sample: Callable[..., list[int]], every: int) -> None:
    """70 x 9,000 logits are drawn from in three parts; with every third row alone drawing, in one out of many."""
    generator = torch.Generator().manual_seed(0)
    params = [SamplingParams(temperature=1.0 if i % every == 0 else 0.0, top_k=i % 4 * 9) for i in range(70)]
    cases = [make_case(torch.randn(9000, generator=generator), p, seed=i) for i, p in enumerate(params)]
    together = sample(cases)
    assert together == [sample([case])[0] for case in cases]
    greedy_rows = [i for i in range(70) if i % every]
    assert [together[i] for i in greedy_rows] == [int(cases[i].logits.argmax()) for i in greedy_rows]


def test_full_and_narrowed_draws_share_their_noise(make_case: Any, sample: Callable[..., list[int]]) -> None:
    """Without a filter all noise is computed, with one only the candidates'. A winner that a filter keeps wins there too."""
    rng = random.Random(5)
    agreed = 0
    for _ in range(300):
        case = random_case(make_case, rng)
        case.sampling = SamplingParams()
        (token,) = sample([case])
        rank = int((case.logits > case.logits[token]).sum())
        case.sampling = SamplingParams(top_k=rank + 1)
        assert sample([case]) == [token]
        agreed += rank + 1 < VOCAB // 8
    assert agreed > 50


def test_seed_index_and_position_matter(make_case: Any, sample: Callable[..., list[int]]) -> None:
    def token(seed: int, index: int, length: int) -> int:
        case = make_case(torch.zeros(VOCAB), SamplingParams(), [0] * length, [], seed, index)
        return sample([case])[0]

    combinations = [(0, 0, 1), (1, 0, 1), (2**32, 0, 1), (-1, 0, 1), (0, 1, 1), (0, 0, 2), (-(2**63), 0, 1)]
    tokens = [token(*c) for c in combinations]
    assert tokens == [token(*c) for c in combinations]
    assert len(set(tokens)) == len(tokens)


def test_the_token_is_pinned(make_case: Any, sample: Callable[..., list[int]]) -> None:
    """The definition, from integers up: a change of it would change every seeded answer ever given."""
    logits, seed, index, prompt = torch.linspace(-2, 2, 9), 0x0123456789ABCDEF, 2, [0] * 7
    best = (-INF, 0)
    for i, logit in enumerate(logits.tolist()):
        a, b, c, d = i // 4, len(prompt), index, 0
        k0, k1 = seed & 0xFFFFFFFF, seed >> 32
        for _ in range(10):
            p0, p1 = a * 0xD2511F53, c * 0xCD9E8D57
            a, b, c, d = (p1 >> 32) ^ b ^ k0, p1 % 2**32, (p0 >> 32) ^ d ^ k1, p0 % 2**32
            k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
        uniform = ((a, b, c, d)[i % 4] + 0.5) / 2**32
        best = max(best, (logit - math.log(-math.log(uniform)), i))
    assert sample([make_case(logits, SamplingParams(), prompt, [], seed, index)]) == [best[1]]


def draws(logits: torch.Tensor, sampling: SamplingParams, count: int) -> np.ndarray:
    """How often each token comes in many draws, over seeds, sample indices and positions."""
    n, counts = 2000, np.zeros(len(logits), dtype=np.int64)
    sampler = Sampler(n, len(logits), ())
    for row in range(n):
        sampler.set_row(NewRow(row, row, (0,), 1, sampling, row % 50 - 25, row // 50, 0, ((),), 0))
    for step in range(count // n):
        tokens = torch.zeros(n, 1, dtype=torch.int32)
        chosen = sampler.sample(logits.repeat(n, 1), np.arange(n), np.full(n, 1 + 7 * step), tokens)
        counts += np.bincount(chosen.numpy(), minlength=len(logits))
    return counts


@pytest.mark.parametrize(("sampling", "keep"), [
    (SamplingParams(), 40),
    (SamplingParams(temperature=0.5), 40),
    (SamplingParams(temperature=1.7, top_k=10), 10),
    (SamplingParams(top_k=3), 3),  # narrowed to candidates: 3 < 40 / 8
    (SamplingParams(top_p=0.6), None),
    (SamplingParams(temperature=0.8, min_p=0.2), None),
    (SamplingParams(temperature=1.3, min_p=0.05, top_k=20, top_p=0.8), None),
    (SamplingParams(logit_bias=((3, 1.5), (7, -2.0))), 40),
    (SamplingParams(temperature=0.9, allowed_token_ids=(1, 5, 9, 30), bad_word_ids=((5,),)), 3),
    (SamplingParams(temperature=1.2, min_p=0.01, top_k=15, top_p=0.95, logit_bias=((4, 9.0), (8, 1.0), (10, -1.0)),
                    allowed_token_ids=tuple(range(0, 40, 2)), bad_word_ids=((4,), (2,))), None),
])
def test_draws_follow_the_distribution(sampling: SamplingParams, keep: int | None) -> None:
    """Chi-square over 120,000 draws. Everything is seeded, so this either always passes or always fails."""
    logits = torch.linspace(-2.0, 2.0, 40)[torch.randperm(40, generator=torch.Generator().manual_seed(3))]
    shaped = logits.double().clone()
    for token, value in sampling.logit_bias:
        shaped[token] += value
    if sampling.allowed_token_ids is not None:
        shaped[[t for t in range(40) if t not in sampling.allowed_token_ids]] = -INF
    for (token,) in sampling.bad_word_ids:
        shaped[token] = -INF
    p = (shaped / sampling.temperature).softmax(-1).numpy()
    p[p < sampling.min_p * p.max() * (1 - 1e-6)] = 0.0
    if sampling.top_k:
        p[p < np.sort(p)[-sampling.top_k]] = 0.0
    p /= p.sum()
    if sampling.top_p < 1.0:
        order = np.argsort(-p)
        size = int(np.searchsorted(np.cumsum(p[order]), sampling.top_p)) + 1
        p[order[size:]] = 0.0
        p /= p.sum()
    kept = p > 0
    assert keep is None or kept.sum() == keep
    counts = draws(logits, sampling, 120_000)
    assert counts[~kept].sum() == 0
    expected = p[kept] * counts.sum()
    assert expected.min() > 5
    chi2, freedom = float(((counts[kept] - expected) ** 2 / expected).sum()), kept.sum() - 1
    # Wilson-Hilferty: the cube root of chi2 / freedom is nearly normal; |z| < 4 fails by chance once in 16,000.
    z = ((chi2 / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert abs(z) < 4


PROMPT, OUTPUT = (3, 8, 8), (8, 12, 12, 12, 20)  # what is known when a token is drawn
EVERYTHING = SamplingParams(
    temperature=1.2, top_k=22, top_p=0.97, min_p=0.01, repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.4,
    logit_bias=((4, 2.0), (8, 3.0), (10, -1.0)), allowed_token_ids=tuple(range(36)), bad_word_ids=((6,), (20, 30), (5, 31)),
    min_tokens=9, stop_token_ids=(7, 33), max_tokens=20,
)  # fmt: skip


def shaped(logits: np.ndarray, p: SamplingParams, eos: tuple[int, ...]) -> np.ndarray:
    """Probabilities [vocab] of the next token, feature by feature, each written as its definition says."""
    x, vocab = logits.astype(np.float64), len(logits)
    for token, value in p.logit_bias:  # first, as vLLM does: a penalty is of the logit that the bias made
        x[token] += value
    for token in {*PROMPT, *OUTPUT}:
        x[token] = x[token] / p.repetition_penalty if x[token] > 0 else x[token] * p.repetition_penalty
    for token in set(OUTPUT):
        x[token] -= p.frequency_penalty * OUTPUT.count(token) + p.presence_penalty
    banned = {t for t in range(vocab) if p.allowed_token_ids is not None and t not in p.allowed_token_ids}
    banned |= {last for *begin, last in p.bad_word_ids if not begin or OUTPUT[-len(begin) :] == tuple(begin)}
    banned |= {*eos, *p.stop_token_ids} if len(OUTPUT) < p.min_tokens else set()
    x[sorted(banned)] = -INF
    x /= p.temperature
    probabilities = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
    probabilities[probabilities < p.min_p * probabilities.max() * (1 - 1e-9)] = 0.0
    if p.top_k:
        probabilities[probabilities < np.sort(probabilities)[-p.top_k]] = 0.0
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities)
    probabilities[order[int(np.searchsorted(np.cumsum(probabilities[order]), p.top_p)) + 1 :]] = 0.0
    return probabilities / probabilities.sum()


@pytest.mark.parametrize("sampling", [
    SamplingParams(temperature=1.6), SamplingParams(top_k=6), SamplingParams(top_p=0.7), SamplingParams(min_p=0.15),
    SamplingParams(repetition_penalty=2.4), SamplingParams(presence_penalty=1.5), SamplingParams(frequency_penalty=-0.8),
    SamplingParams(logit_bias=((3, 1.5), (7, -2.0))), SamplingParams(allowed_token_ids=(1, 5, 8, 30)),
    SamplingParams(bad_word_ids=((6,), (20, 30), (5, 31))), SamplingParams(min_tokens=6, stop_token_ids=(7, 33), max_tokens=9),
    EVERYTHING,
])  # fmt: skip
def test_each_feature_alone_and_all_together(sampling: SamplingParams) -> None:
    """Chi-square over 120,000 draws after known tokens, over seeds and sample indices; seeded, so always the same."""
    n, vocab, known = 2000, 40, (*PROMPT, *OUTPUT)
    logits = torch.linspace(-2.0, 2.0, vocab)[torch.randperm(vocab, generator=torch.Generator().manual_seed(5))]
    counts = np.zeros(vocab, dtype=np.int64)
    tokens = torch.tensor(known, dtype=torch.int32).repeat(n, 1)
    sampler = Sampler(n, vocab, (2,))
    for turn in range(60):
        for row in range(n):
            new = NewRow(row, row, known, len(PROMPT), sampling, row % 50, 40 * turn + row // 50, 0, ((),), 0)
            (sampler if turn == 0 else sampler._draw).set_row(new)  # later turns have other random numbers alone
        chosen = sampler.sample(logits.repeat(n, 1), np.arange(n), np.full(n, len(known)), tokens)
        counts += np.bincount(chosen.numpy(), minlength=vocab)
    p = shaped(logits.numpy(), sampling, (2,))
    plain = shaped(logits.numpy(), SamplingParams(), (2,))
    kept = p > 0
    assert counts.sum() == 120_000 and counts[~kept].sum() == 0
    assert distance(counts[kept], p[kept]) < 4
    assert distance(counts, plain) > 20, "the test can tell it from what is drawn without it"


def distance(counts: np.ndarray, p: np.ndarray) -> float:
    """How far counts are from probabilities, in standard deviations: chi-square after Wilson and Hilferty."""
    expected = p * counts.sum()
    assert expected.min() > 5
    chi2, freedom = float(((counts - expected) ** 2 / expected).sum()), len(counts) - 1
    return abs(((chi2 / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom)))


def test_neighbouring_positions_are_independent() -> None:
    """Pairs of tokens of successive positions, seeds and sample indices fill the square evenly."""
    size, n = 8, 4000
    sampler = Sampler(n, size, ())
    for vary in ("position", "seed", "index"):
        for i in range(n):
            seed, index = i if vary == "seed" else 9, i if vary == "index" else 0
            sampler.set_row(NewRow(i, i, (0,), 1, SamplingParams(), seed, index, 0, ((),), 0))
        positions = np.arange(n) if vary == "position" else np.full(n, 4)
        chosen = sampler.sample(torch.zeros(n, size), np.arange(n), positions, torch.zeros(n, 1, dtype=torch.int32))
        pairs = np.zeros((size, size))
        for a, b in itertools.pairwise(chosen.tolist()):
            pairs[a, b] += 1
        expected = (n - 1) / size**2
        assert ((pairs - expected) ** 2 / expected).sum() < 63 + 4 * math.sqrt(2 * 63)


def test_greedy_takes_the_lowest_id_of_equals(make_case: Any, sample: Callable[..., list[int]]) -> None:
    logits = torch.zeros(VOCAB)
    logits[[100, 200, 300]] = 5.0
    assert sample([make_case(logits, SamplingParams(temperature=0.0))]) == [100]


def test_edges(make_case: Any, sample: Callable[..., list[int]]) -> None:
    flat = torch.zeros(VOCAB)
    one_left = torch.full((VOCAB,), -INF)
    one_left[77] = -3.0
    best = torch.zeros(VOCAB)
    best[50] = 0.001
    for seed in range(30):
        def token(logits: torch.Tensor, seed: int = seed, **options: Any) -> int:
            return sample([make_case(logits, SamplingParams(**options), seed=seed)], eos=(1,))[0]

        assert token(one_left) == token(one_left, top_k=5, top_p=0.5, min_p=0.5) == token(one_left, temperature=0.0) == 77
        assert token(best, top_p=1e-9) == token(best, min_p=1.0) == token(best, top_k=1) == 50
        assert token(flat, top_k=VOCAB) == token(flat, top_k=10**9) == token(flat, top_p=1.0) == token(flat)
        assert token(flat, top_p=1e-9) == token(flat)  # all equal to the first, so all kept
        assert token(flat, min_tokens=1) != 1


def test_rows_that_are_not_finite_do_not_raise_and_disturb_nobody(make_case: Any, sample: Callable[..., list[int]]) -> None:
    """The runner reports them; their neighbours go on."""
    rng = random.Random(8)
    good = random_case(make_case, rng)
    for value in (float("nan"), INF, -INF):
        for sampling in (SamplingParams(), SamplingParams(temperature=0.0), SamplingParams(top_k=5, top_p=0.5, min_p=0.1),
                         SamplingParams(top_p=0.5), SamplingParams(min_p=0.5), SamplingParams(repetition_penalty=2.0)):
            bad = make_case(torch.full((VOCAB,), value), sampling)
            partly = make_case(torch.where(torch.arange(VOCAB) == 9, value, torch.zeros(VOCAB)), sampling)
            tokens = sample([bad, good, partly])
            assert tokens[1:2] == sample([good])
            assert all(0 <= t < VOCAB for t in tokens)


def test_a_row_taken_again_forgets_the_sequence_before() -> None:
    heavy = SamplingParams(temperature=0.3, top_k=2, top_p=0.5, min_p=0.5, repetition_penalty=1.9, presence_penalty=2.0,
                           frequency_penalty=2.0, min_tokens=50, stop_token_ids=(5, 6))
    fresh, used = Sampler(2, VOCAB, (1,)), Sampler(2, VOCAB, (1,))
    used.set_row(NewRow(1, 1, (1, 2, 3), 2, heavy, 77, 3, 0, ((),), 0))
    used.free_row(1)
    tokens = torch.arange(20, dtype=torch.int32).reshape(2, 10)
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(1))
    for seed in range(20):
        again = NewRow(2, 1, (1,), 1, SamplingParams(), seed, 0, 0, ((),), 0)
        got = []
        for sampler in (fresh, used):
            sampler.set_row(again)
            got.append(int(sampler.sample(logits.clone(), np.array([1]), np.array([4]), tokens)))
        assert got[0] == got[1]
