"""Exercise 7: which sizes are worth a graph?

Write ``sizes(steps, most)``: up to ``most`` batch sizes to capture, rising. ``steps[n]`` is how many steps had n rows. A
step runs at the smallest captured size that holds it, and its further rows are computed in vain; every step must fit.
Choose the sizes for which the fewest rows are computed in vain.
"""

import random
from collections import Counter
from itertools import combinations
from types import ModuleType

import pytest

from minivllm.learn.scenes import continuous_batch


def wasted(steps: dict[int, int], captured: list[int]) -> int:
    """Rows computed in vain; every step must find a size."""
    return sum(count * (min(size for size in captured if size >= rows) - rows) for rows, count in steps.items())


def least(steps: dict[int, int], most: int) -> int:
    """By trying everything."""
    largest = max(steps)
    others = [rows for rows in steps if rows < largest]
    return min(wasted(steps, [*some, largest]) for k in range(most) for some in combinations(others, k))


def some_steps(seed: int) -> dict[int, int]:
    rng = random.Random(seed)
    return {rng.randint(1, 64): rng.randint(1, 200) for _ in range(11)}


@pytest.mark.parametrize("most", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_better(solution: ModuleType, seed: int, most: int) -> None:
    steps = some_steps(seed)
    chosen = list(solution.sizes(dict(steps), most))
    assert len(chosen) <= most and chosen == sorted(set(chosen))
    assert max(chosen) >= max(steps), "the largest step fits into no graph"
    assert wasted(steps, chosen) == least(steps, most)


def test_a_run_of_the_engine(solution: ModuleType) -> None:
    steps = Counter(len(record.rows) for record in continuous_batch() if record.rows)
    assert wasted(steps, list(solution.sizes(dict(steps), 2))) == least(steps, 2)


def test_enough_graphs_for_everything(solution: ModuleType) -> None:
    assert wasted({1: 5, 7: 1, 20: 2}, list(solution.sizes({1: 5, 7: 1, 20: 2}, 8))) == 0
