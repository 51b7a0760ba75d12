"""Finding marks in a text that comes in parts, and the steps that parsers are made of."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minivllm.text.reply import Function, Piece
from minivllm.text.tools.call_text import PART, CallText, Steps
from minivllm.text.tools.marks import find_mark, held


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", 0), ("abc", 0), ("<", 1), ("a<a", 2), ("<ab", 0), ("<ab<", 1), ("<a<a", 2), ("[", 1), ("[x", 2), ("a[[", 1)],
)
def test_what_may_still_become_a_mark_is_held(text: str, expected: int) -> None:
    assert held(text, ("<ab", "[xy")) == expected


@given(st.text("ab", max_size=8), st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3))
def test_the_longest_end_is_held(text: str, marks: list[str]) -> None:
    lengths = [n for n in range(1, len(text) + 1) if any(m != text[-n:] and m.startswith(text[-n:]) for m in marks)]
    assert held(text, marks) == max(lengths, default=0)


def test_the_first_mark_is_found() -> None:
    assert find_mark("..b.a", ("a", "b")) == (2, "b")
    assert find_mark("..b.a", ("a", "b"), 3) == (4, "a")
    assert find_mark("..b.a", ("x",)) == (-1, "")


def _marks(text: CallText) -> Steps[None]:
    while (yield from text.until("<b>", "<a>")):
        text.log.settle(False)


def _name(text: CallText) -> Steps[None]:
    text.log.begin()
    end = yield from text.name("!")
    text.log.settle(end == "!" and (yield from text.arguments()))
    yield from text.rest()


@pytest.mark.parametrize("cut", range(PART - 4, PART + 5))
def test_long_parts_are_read_in_pieces(cut: int) -> None:
    text = CallText([])
    steps = _marks(text)
    source = "x" * cut + "<a>" + "y" * PART
    assert [*text.feed(source, steps), *text.finish(steps)] == [Piece("content", source)]


@pytest.mark.parametrize("source", ["get!{}", "get_more!{}", "get!more!{}", "get!m", "got!{}"])
def test_a_name_that_another_begins_with_is_told_from_it_however_it_is_cut(source: str) -> None:
    functions = [Function("get!more"), Function("get_more"), Function("get")]
    found = []
    for cut in range(len(source)):
        text = CallText(functions)
        steps = _name(text)
        pieces = [*text.feed(source[:cut], steps), *text.feed(source[cut:], steps), *text.finish(steps)]
        found.append([piece.text for piece in pieces if piece.kind == "call"])
    assert found == [[source[:-3]] if source in ("get!{}", "get_more!{}") else []] * len(source)


def _literals(text: CallText) -> Steps[None]:
    while literal := (yield from text.take("ab!", "ab", "!c")):
        text.log.begin()
        text.log.name(literal)
        text.log.settle(True)
    yield from text.rest()


def test_the_shortest_literal_is_taken_however_the_text_is_cut() -> None:
    for cut in range(5):
        text = CallText([Function(name) for name in ("ab!", "ab", "!c")])
        steps = _literals(text)
        pieces = [*text.feed("ab!c"[:cut], steps), *text.feed("ab!c"[cut:], steps), *text.finish(steps)]
        assert [piece.text for piece in pieces if piece.kind == "call"] == ["ab", "!c"]
