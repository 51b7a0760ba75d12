"""Exercise 9: shortest first, and nobody starves.

Write a class ``ShortestFirst``, a scheduling policy (``minivllm/scheduler/policy.py``; inherit ``FirstComeFirstServed`` and
write ``claim``). Of two requests that arrive at about the same time the one that may generate fewer tokens
(``request.spec.sampling.max_tokens``) runs first. But at most 40 requests that arrived later may overtake one.
``request.uid`` counts arrivals; a claim is asked for once, when a request arrives, and the lower one goes first. It is
tried on the real scheduler.
"""

from types import ModuleType

import pytest

from minivllm.learn.draw_steps import lives
from minivllm.learn.scenes import Arrival, Session, prompt
from minivllm.scheduler import book
from minivllm.scheduler.policy import FirstComeFirstServed


def begun(asked: list[Arrival], policy: type[FirstComeFirstServed], monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The step in which each request began, one at a time."""
    monkeypatch.setattr(book, "POLICIES", {"fcfs": policy})
    records = Session(max_num_seqs=1).run(asked)
    return {life.id: min(life.rows) for life in lives(records)}


def requests(outputs: list[int]) -> list[Arrival]:
    return [Arrival(f"{i}", prompt(i, 5), output) for i, output in enumerate(outputs)]


def test_the_shorter_goes_first(solution: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    began = begun(requests([9, 2, 14, 5, 3]), solution.ShortestFirst, monkeypatch)
    assert sorted(began, key=lambda name: began[name]) == ["1", "4", "3", "0", "2"]


def test_the_mean_wait_is_shorter(solution: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = requests([12, 3, 9, 1, 14, 2, 6])
    own = sum(begun(asked, solution.ShortestFirst, monkeypatch).values())
    assert own < sum(begun(asked, FirstComeFirstServed, monkeypatch).values())


def test_equal_requests_keep_their_order(solution: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    began = begun(requests([4, 4, 4, 4]), solution.ShortestFirst, monkeypatch)
    assert sorted(began, key=lambda name: began[name]) == ["0", "1", "2", "3"]


def test_nobody_is_overtaken_by_more_than_forty(solution: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request for 300 tokens among many for one: how many that came after it run before it?"""
    asked = [Arrival("busy", prompt(0, 5), 3), Arrival("long", prompt(1, 5), 300)]
    asked += [Arrival(f"{i}", prompt(i + 2, 5), 1, at_step=i // 2) for i in range(120)]
    began = begun(asked, solution.ShortestFirst, monkeypatch)
    overtook = [name for name, step in began.items() if name not in ("busy", "long") and step < began["long"]]
    assert 20 <= len(overtook) <= 40
