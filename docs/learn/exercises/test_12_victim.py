"""Exercise 12: who gives way?

Write ``victim(candidates)``: which of these requests gives its blocks back. They are sorted by claim, the strongest first;
``computed`` says how many tokens of K and V each would lose. Choose the one that loses the fewest; of equal ones, the one
with the weakest claim. But never the strongest of several, so that somebody always gets on. It is tried on the real
scheduler: the texts must come out as without preemption, and fewer tokens must be computed than with the engine's own
choice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import pytest

from minivllm.learn.scenes import Arrival, Session, prompt
from minivllm.scheduler import book
from minivllm.scheduler.policy import FirstComeFirstServed
from minivllm.scheduler.request import Request

ASKED = [Arrival("ABCD"[i], prompt(i, p), o) for i, (p, o) in enumerate(((40, 60), (30, 60), (20, 60), (100, 50)))]


@dataclass(frozen=True)
class Candidate:
    """What is to be known of one."""

    computed: int


@pytest.mark.parametrize(
    ("computed", "expected"), [((5, 30, 12), 2), ((40, 7, 9), 1), ((3,), 0), ((1, 8, 8, 9), 2), ((0, 5), 1)]
)
def test_by_hand(solution: ModuleType, computed: tuple[int, ...], expected: int) -> None:
    candidates = [Candidate(n) for n in computed]
    assert solution.victim(candidates) is candidates[expected]


def served(
    choose: type[FirstComeFirstServed], blocks: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, list[int]], int]:
    """The texts, and how many tokens were computed for them."""
    monkeypatch.setattr(book, "POLICIES", {"fcfs": choose})
    session = Session(num_gpu_blocks_override=blocks, enable_prefix_caching=False, batch_invariant=True)
    session.run(ASKED)
    texts: dict[str, list[int]] = {}
    for event in session.events:
        texts.setdefault(event.id, []).extend(event.token_ids)
    return texts, sum(row.num_tokens for record in session.records for row in record.rows)


def test_less_is_computed_twice(solution: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(FirstComeFirstServed):
        def victim(self, candidates: Sequence[Request]) -> Request:
            chosen = solution.victim(candidates)
            assert isinstance(chosen, Request)
            return chosen

    wanted, least = served(FirstComeFirstServed, 64, monkeypatch)
    _, engines = served(FirstComeFirstServed, 24, monkeypatch)
    texts, own = served(Own, 24, monkeypatch)
    assert texts == wanted
    assert least < own < engines
