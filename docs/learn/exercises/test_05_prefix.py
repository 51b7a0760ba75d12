"""Exercise 5: how much of a prompt is found?

Write ``hits(prompt, known, block_size)``: of how many tokens at the front of ``prompt`` the prefix cache has K and V, when
all texts in ``known`` were computed before and nothing was evicted. Only full blocks are kept; a block is found only behind
its own beginning; and at least one token is always computed, for its logits are wanted. The engine is asked whether you are
right.
"""

from types import ModuleType

import pytest

from minivllm.learn.scenes import Arrival, Session, prompt

COMMON = prompt(0, 48)
KNOWN = [COMMON + prompt(1, 10), prompt(2, 40), prompt(3, 15), COMMON[:16] + prompt(4, 32)]
ASKED = {
    "the same 48 tokens and others": COMMON + prompt(5, 7),
    "a text that is known to its end": KNOWN[0],
    "two full blocks, all of them known": COMMON[:32],
    "a little more than a block": COMMON[:20] + prompt(6, 9),
    "less than a block": COMMON[:15],
    "a known block that does not come first": prompt(7, 16) + COMMON[16:48],
    "the beginning of one text and the end of another": COMMON[:16] + KNOWN[1][16:32] + prompt(8, 5),
    "the second way to go on": COMMON[:16] + prompt(4, 20),
    "a text that fills no block": prompt(3, 15) + prompt(9, 20),
}


@pytest.fixture(scope="module")
def found() -> dict[str, int]:
    """What the engine found of each."""
    session = Session()
    session.run([Arrival(f"known {i}", tokens, 1) for i, tokens in enumerate(KNOWN)])
    before = len(session.records)
    for name, tokens in ASKED.items():
        session.run([Arrival(name, tokens, 1)])
    return {row.id: row.cached for record in session.records[before:] for row in record.rows}


@pytest.mark.parametrize("name", ASKED)
def test_as_the_engine_says(solution: ModuleType, found: dict[str, int], name: str) -> None:
    known = [*KNOWN, *list(ASKED.values())[: list(ASKED).index(name)]]
    assert solution.hits(ASKED[name], known, 16) == found[name]


def test_blocks_of_another_size(solution: ModuleType) -> None:
    assert solution.hits((1, 2, 3, 4, 5), [(1, 2, 3, 4, 9)], 2) == 4
    assert solution.hits((1, 2, 3, 4), [(1, 2, 3, 4)], 2) == 2
    assert solution.hits((1, 2, 3), [], 1) == 0
