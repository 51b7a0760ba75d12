"""Exercise 0: count before you measure.

Write ``computed(num_prompt, num_output, keeps_cache)``: how many tokens pass through the model until a text of
``num_output`` tokens is there, with and without a KV cache. The engine is asked whether you are right. Mind the last token.
"""

from types import ModuleType

import pytest

from minivllm.learn import scenes
from minivllm.records import StepRecord

SIZES = [(6, 10), (1, 4), (20, 3), (5, 1)]


def counted(records: list[StepRecord]) -> int:
    return sum(row.num_tokens for record in records for row in record.rows)


@pytest.mark.parametrize(("num_prompt", "num_output"), SIZES)
def test_without_a_cache(solution: ModuleType, num_prompt: int, num_output: int) -> None:
    assert solution.computed(num_prompt, num_output, False) == counted(scenes.without_cache(num_prompt, num_output))


@pytest.mark.parametrize(("num_prompt", "num_output"), SIZES)
def test_with_a_cache(solution: ModuleType, num_prompt: int, num_output: int) -> None:
    assert solution.computed(num_prompt, num_output, True) == counted(scenes.with_cache(num_prompt, num_output))


def test_of_a_long_text(solution: ModuleType) -> None:
    assert solution.computed(1000, 500, False) == sum(range(1000, 1500))
