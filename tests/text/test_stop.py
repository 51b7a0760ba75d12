"""Stop strings are found in any cut of the text, and no more is held back than could become one."""

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minivllm.errors import InvalidRequest
from minivllm.text.stop import StopMatcher
from minivllm.types import MAX_STOP_CHARS, SamplingParams

ab = st.text(alphabet="ab", min_size=1, max_size=5)


def first_match(text: str, stops: Sequence[str], armed_from: int = 0) -> tuple[int, int, str] | None:
    """The plain definition: the match with the earliest end, of those the longest, as (begin, end, stop)."""
    for end in range(armed_from + 1, len(text) + 1):
        found = [s for s in stops if text[:end].endswith(s)]
        if found:
            best = max(found, key=len)
            return end - len(best), end, best
    return None


def cut(text: str, cuts: Sequence[int]) -> list[str]:
    edges = sorted({0, len(text), *(c % (len(text) + 1) for c in cuts)})
    return [text[a:b] for a, b in itertools.pairwise(edges)] or [""]


def could_become(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of the text that is a proper beginning of a stop string."""
    return max((n for s in stops for n in range(1, len(s)) if text.endswith(s[:n])), default=0)


@given(text=st.text(alphabet="ab", max_size=40), stops=st.lists(ab, min_size=1, max_size=4), cuts=st.lists(st.integers(0, 40)),
       include=st.booleans())
@example(text="aab", stops=["ab"], cuts=[1, 2], include=False)
@example(text="abcd", stops=["abcd", "bc"], cuts=[1, 2, 3], include=False)
def test_any_cut_gives_the_same_and_holds_back_the_least(text: str, stops: list[str], cuts: list[int], include: bool) -> None:
    matcher = StopMatcher(stops, include)
    expected = first_match(text, stops)
    shown, fed = "", ""
    for part in cut(text, cuts):
        shown += matcher.feed(part)
        fed += part
        if matcher.matched is not None:
            break
        assert len(fed) - len(shown) == could_become(fed, stops) < max(map(len, stops))
    if expected is None:
        assert matcher.matched is None
        assert shown + matcher.flush() == text
    else:
        begin, end, stop = expected
        assert matcher.matched == stop
        assert shown == text[: end if include else begin]


@given(
    parts=st.lists(st.tuples(st.text(alphabet="ab", max_size=6), st.booleans()), max_size=12),
    stops=st.lists(ab, min_size=1, max_size=3),
)
def test_a_match_must_end_in_armed_text(parts: list[tuple[str, bool]], stops: list[str]) -> None:
    """As with min_tokens: first unarmed parts, then armed ones."""
    parts = sorted(parts, key=lambda p: p[1])
    armed_from = sum(len(t) for t, armed in parts if not armed)
    text = "".join(t for t, _ in parts)
    matcher = StopMatcher(stops)
    shown, fed = "", ""
    for part, armed in parts:
        shown += matcher.feed(part, armed=armed)
        fed += part
        if matcher.matched is not None:
            break
        assert len(fed) - len(shown) == could_become(fed, stops) < max(map(len, stops))
    expected = first_match(text, stops, armed_from)
    assert matcher.matched == (expected and expected[2])
    if expected is None:
        assert shown + matcher.flush() == text
    else:
        # Of text shown while unarmed nothing can be taken back, but a match begins in held text or later.
        assert shown == text[: expected[0]]


def test_long_self_overlapping_stop_is_linear_in_memory_of_held_text() -> None:
    """Half a million near misses of a long stop string: quadratic matching would take hours."""
    matcher = StopMatcher(["a" * 5000 + "b"])
    text = "a" * 500_000
    shown = "".join(matcher.feed(text[i : i + 7]) for i in range(0, len(text), 7))
    assert len(shown) == len(text) - 5000
    assert shown + matcher.flush() == text


def test_stop_strings_have_a_bound() -> None:
    assert StopMatcher(SamplingParams(stop=("x" * MAX_STOP_CHARS,)).stop).feed("y") == "y"
    with pytest.raises(InvalidRequest, match="characters in all"):
        SamplingParams(stop=("x" * MAX_STOP_CHARS, "y"))
