"""Exercise 3: write the continuous batcher.

Write ``schedule(requests, num_rows)``. Each request is a pair (step at which it arrives, number of tokens it wants), in the
order of arrival; each step in which a request has a row gives it one token. Return for each request the steps in which it
has one. First come, first served; a row that a request leaves after step n is another's in step n + 1. Your plan must be
the engine's.
"""

import random
from types import ModuleType

import pytest

from minivllm.learn.draw_steps import lives
from minivllm.learn.scenes import Arrival, Session, prompt

ROWS = 3


@pytest.fixture(scope="module")
def session() -> Session:
    return Session(max_num_seqs=ROWS)


def arrivals(seed: int) -> list[tuple[int, int]]:
    """Some that are there at once, and others that come while these run."""
    rng = random.Random(seed)
    at_once = [(0, rng.randint(2, 12)) for _ in range(ROWS + 1)]
    later = sorted((rng.randint(1, 10), rng.randint(1, 12)) for _ in range(5))
    return [(0, 14), *at_once, *later]


@pytest.mark.parametrize("seed", range(6))
def test_your_plan_is_the_engines(solution: ModuleType, session: Session, seed: int) -> None:
    asked = arrivals(seed)
    before = len(session.records)
    session.run([Arrival(f"{seed}-{i}", prompt(i, 4 + i), wants, at) for i, (at, wants) in enumerate(asked)])
    engine = [sorted(life.rows) for life in lives(session.records[before:])]
    assert [list(steps) for steps in solution.schedule(asked, ROWS)] == engine


def test_one_row(solution: ModuleType) -> None:
    assert [list(steps) for steps in solution.schedule([(0, 2), (0, 1), (1, 3)], 1)] == [[0, 1], [2], [3, 4, 5]]
