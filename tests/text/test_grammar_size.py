"""Repetitions are multiplied out before anybody follows them."""

import re

import pytest

from minivllm.errors import InvalidRequest
from minivllm.text.grammar_size import MAX_FORCED, _written, check_forced, check_pattern


@pytest.mark.parametrize(
    ("pattern", "writes"),
    [
        ("abc", 3), ("a{7}", 7), ("a{2,9}", 9), ("a{3,}", 3), ("a{,4}", 4), ("(ab){3}c", 7), ("((a{2}){3}b){4}", 28),
        ("a{2}{3}", 6), ("[abc]{5}", 5), ("[]a]{5}", 5), ("[^]{9}]{2}", 2), (r"\{9}", 3), (r"[\]{9}]{2}", 2), ("x{a}", 4),
        ("", 0), ("(((", 0), (")))a{2}", 5), ("{5}", 0), ("a{5", 3), ("a{1,2,3}", 8),
    ],
)  # fmt: skip
def test_what_a_pattern_writes(pattern: str, writes: int) -> None:
    assert _written(pattern) == writes


def test_it_is_never_less_than_what_python_matches() -> None:
    """For patterns without alternatives, whose only text is known."""
    for pattern, text in (("(ab{3}){4}c", "abbb" * 4 + "c"), ("a{2}{5}", "a" * 10), ("((x){2}y){3}", "xxy" * 3)):
        python = pattern.replace("}{", "}){").replace("a{2})", "(a{2})")
        assert re.fullmatch(python, text) and _written(pattern) >= len(text)


def test_what_is_too_long() -> None:
    check_pattern(f"a{{{MAX_FORCED}}}")
    long = "a" * (MAX_FORCED + 1)
    for pattern in (f"a{{{len(long)}}}", "a{1000}{1000}", "((a{100}){100}){100}", long, "a{9}{9}{9}{9}{9}"):
        with pytest.raises(InvalidRequest, match="lower the numbers"):
            check_pattern(pattern)
    check_forced({"type": "string", "pattern": "^[a-z]{1000}$", "description": "x" * 50_000, "maxLength": 10**6})
    for schema in (
        {"const": long}, {"enum": [1, {"a": [long]}]}, {"properties": {long: {}}}, {"$defs": {"a": [{"const": {long: 1}}]}},
        {"properties": {"a": {"items": {"pattern": "(a{1000}){1000}"}}}}, {"patternProperties": {"(a{1000}){1000}": True}},
    ):  # fmt: skip
        with pytest.raises(InvalidRequest):
            check_forced(schema)


def test_depth_is_no_danger() -> None:
    deep: object = {"const": "x"}
    for _ in range(50_000):
        deep = {"items": deep}
    check_forced(deep)
    assert _written("(" * 100_000 + "a" + ")" * 100_000) == 1
    assert _written("a{2}" * 20_000) == 40_000
