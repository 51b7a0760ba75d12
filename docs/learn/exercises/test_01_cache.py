"""Exercise 1: one head of attention that remembers.

Write a class ``Head`` with a method ``step(q, k, v)``. It gets the query, key and value of one new token, float64 arrays
[head_dim], keeps what it needs, and returns that token's output [head_dim]: the same numbers as attention over the whole
text gives for its last token.
"""

from types import ModuleType

import numpy as np
import pytest


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Causal attention of one head over a whole text. All are [tokens, head_dim]."""
    scores = q @ k.T / np.sqrt(q.shape[1])
    scores = np.where(np.tril(np.ones_like(scores)) > 0, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    out: np.ndarray = weights / weights.sum(axis=1, keepdims=True) @ v
    return out


@pytest.mark.parametrize(("tokens", "head_dim"), [(1, 4), (7, 8), (40, 16)])
def test_token_by_token_is_the_same(solution: ModuleType, tokens: int, head_dim: int) -> None:
    q, k, v = np.random.default_rng(tokens).normal(size=(3, tokens, head_dim))
    head = solution.Head()
    told = np.array([head.step(q[i], k[i], v[i]) for i in range(tokens)])
    np.testing.assert_allclose(told, attention(q, k, v), rtol=1e-10)


def test_large_scores_are_no_trouble(solution: ModuleType) -> None:
    q, k, v = np.random.default_rng(0).normal(size=(3, 5, 4)) * 200
    head = solution.Head()
    told = np.array([head.step(q[i], k[i], v[i]) for i in range(5)])
    np.testing.assert_allclose(told, attention(q, k, v), rtol=1e-10)


def test_two_texts_do_not_mix(solution: ModuleType) -> None:
    one, other = solution.Head(), solution.Head()
    x = np.ones(4)
    one.step(x, x, x)
    np.testing.assert_allclose(other.step(x, x, 3 * x), 3 * x)
