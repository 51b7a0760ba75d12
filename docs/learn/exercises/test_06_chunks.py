"""Exercise 6: fill a step.

Write ``plan(num_decodes, prompts_left, budget)``: how many tokens of each prompt a step computes, when ``num_decodes``
texts are being generated, prompts of which ``prompts_left`` tokens are not computed yet wait in this order, and a step has
at most ``budget`` tokens. Decodes come first (one token each), then the prompts, in order, as much of each as fits. Every
step of four runs of the engine is compared with yours.
"""

from types import ModuleType

import pytest

from minivllm.learn.draw_steps import lives
from minivllm.learn.scenes import Arrival, prompt, run
from minivllm.records import StepRecord


def arrivals() -> list[Arrival]:
    sizes = ((5, 30, 0), (70, 8, 2), (9, 6, 3), (90, 4, 4), (33, 5, 12))  # (prompt, output, step)
    return [Arrival("ABCDE"[i], prompt(i, p), o, at) for i, (p, o, at) in enumerate(sizes)]


def before_each_step(records: list[StepRecord]) -> list[tuple[int, dict[str, int], dict[str, int]]]:
    """Of each step: decodes; tokens left of each prompt that is there; tokens of each that it computed."""
    steps = []
    everyone = lives(records)
    for step in range(sum(bool(record.rows) for record in records)):
        left, done = {}, {}
        for life in everyone:
            computed = sum(row.num_tokens for at, row in life.rows.items() if at < step and row.kind == "prefill")
            if life.arrived <= step and computed < life.num_prompt:
                left[life.id] = life.num_prompt - computed
                done[life.id] = life.rows[step].num_tokens if step in life.rows else 0
        decodes = sum(life.rows[step].kind == "decode" for life in everyone if step in life.rows)
        steps.append((decodes, left, done))
    return steps


@pytest.mark.parametrize("budget", [8, 24, 50, 256])
def test_every_step_is_the_engines(solution: ModuleType, budget: int) -> None:
    records = run(arrivals(), max_num_batched_tokens=budget)
    for decodes, left, done in before_each_step(records):
        assert list(solution.plan(decodes, list(left.values()), budget)) == list(done.values())


def test_nothing_fits(solution: ModuleType) -> None:
    assert list(solution.plan(4, [10, 3], 4)) == [0, 0]
