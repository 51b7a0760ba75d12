"""Exercise 13: read a trace.

Write ``where(records, name)``: what became of one request, from the records of an engine's steps (``minivllm/records.py``),
as a dict:

    "queued"      steps from its arrival to the first in which it had a row, that one not counted
    "prefill"     steps in which it computed tokens that were known already
    "decode"      steps in which it computed its newest token
    "away"        steps between a preemption and its return
    "recomputed"  tokens that were computed more than once
    "why"         {code: steps}: for each step without a row, the first word of the reason, such as "rows" or "blocks"

A record without rows is no step: it says that something changed while nothing ran.
"""

from collections import Counter
from types import ModuleType
from typing import Any

import pytest

from minivllm.learn import scenes
from minivllm.learn.draw_steps import Life, lives
from minivllm.records import StepRecord


@pytest.fixture(scope="module")
def busy() -> list[StepRecord]:
    return scenes.busy()


def expected(life: Life) -> dict[str, Any]:
    """From what the pictures are drawn from."""
    kinds = Counter(row.kind for row in life.rows.values())
    computed = Counter(at for row in life.rows.values() for at in range(row.start, row.start + row.num_tokens))
    first = min(life.rows)
    gaps = sum(b - a for a, b in life.gaps)
    return {
        "queued": first - life.arrived,
        "prefill": kinds["prefill"],
        "decode": kinds["decode"],
        "away": gaps - (first - life.arrived),
        "recomputed": sum(n - 1 for n in computed.values()),
        "why": dict(Counter(life.why.values())),
    }


@pytest.mark.parametrize("name", ["A", "B", "C", "D", "E"])
def test_a_run_with_a_little_of_everything(solution: ModuleType, busy: list[StepRecord], name: str) -> None:
    life = next(life for life in lives(busy) if life.id == name)
    assert solution.where(busy, name) == expected(life)


def test_what_the_chapter_says_of_c(solution: ModuleType, busy: list[StepRecord]) -> None:
    told = solution.where(busy, "C")
    assert (told["away"], told["why"]) == (6, {"blocks": 6})
