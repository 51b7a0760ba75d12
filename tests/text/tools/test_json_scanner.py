"""The JSON scanner against the library's parser, however the text is cut."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm.text.tools.json_scanner import MAX_DEPTH, JsonScanner

GOOD = [
    '{"a": [1, -0.5e+3, true, false, null, "\\u00e9\\n\\"}{"]}',
    "[]",
    "{}",
    '""',
    "[[], {}]",
    ' {"a" :\t{ } ,\r\n"a":0}',
    '"\U0001f600"',
]
BAD = [
    "{,}",
    '{"a" 1}',
    '{"a":}',
    "{1: 2}",
    "[1,]",
    '{"a":1,}',
    "[01]",
    "[1.]",
    "[.5]",
    "[+1]",
    "[-]",
    "[1e]",
    "[NaN]",
    "[Infinity]",
    "[-Infinity]",
    '["\\x"]',
    '["\\u12g4"]',
    '["a\nb"]',
    "[trux]",
    "[nul]",
    "{]",
    "[}",
    "['a']",
    "[1 2]",
    ":",
    "}",
    "[1}",
    "[1.5.5]",
    "٣",
]


def scanned(text: str, size: int) -> tuple[int, bool, bool]:
    """Where the scanner stops in a text that comes in parts of one size, and how."""
    scanner = JsonScanner()
    at = 0
    while at < len(text) and not (scanner.ended or scanner.failed):
        part = text[at : at + size]
        taken = scanner.scan(part)
        at += taken
        assert taken == len(part) or scanner.ended or scanner.failed
    return at, scanner.ended, scanner.failed


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
@pytest.mark.parametrize("text", GOOD)
def test_a_value_ends_at_its_last_character(text: str, size: int) -> None:
    json.loads(text)
    assert scanned(text, size) == (len(text), True, False)
    assert scanned(text + '} "', size) == (len(text), True, False)
    for end in range(len(text)):
        assert scanned(text[:end], size) == (end, False, False)


@pytest.mark.parametrize("size", [1, 2, 1000])
@pytest.mark.parametrize("text", BAD)
def test_what_is_no_json_fails_at_its_first_wrong_character(text: str, size: int) -> None:
    at, ended, failed = scanned(text, size)
    assert (ended, failed) == (False, True)
    assert at < len(text)


@pytest.mark.parametrize("text", ["0", "-1", "12.5", "1e5", "2E-7"])
def test_a_number_ends_at_what_follows_it(text: str) -> None:
    assert scanned(text, 1) == (len(text), False, False)
    assert scanned(text + ",", 1) == scanned(text + ",", 9) == (len(text), True, False)


@pytest.mark.parametrize("pair", ["[]", ("{}")])
def test_depth_has_a_bound_that_the_library_reads(pair: str) -> None:
    opening = "[" if pair == "[]" else '{"a":'
    inner = "0" if pair == "{}" else ""
    deepest = opening * MAX_DEPTH + inner + pair[1] * MAX_DEPTH
    json.loads(deepest)
    assert scanned(deepest, 7) == (len(deepest), True, False)
    assert scanned(opening * 100_000, 4096)[2]


def is_json(text: str) -> bool:
    """True for what the library reads, which takes three words more than JSON has."""

    def refuse(word: str) -> Any:
        raise ValueError(word)

    try:
        json.loads(text, parse_constant=refuse)
    except ValueError:
        return False
    return True


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([*'{}[],:"\\ u0aé-+.eE1\n', "true", "null", '"a"', '{"a":', "\\u00e9", "NaN"]), max_size=14))
def test_it_agrees_with_the_library(parts: list[str]) -> None:
    text = "[" + "".join(parts) + "]"
    at, ended, _ = scanned(text, 1)
    assert scanned(text, len(text))[:2] == (at, ended)
    assert (ended and at == len(text)) == is_json(text)
    if ended:
        assert is_json(text[:at])


@settings(max_examples=100, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=10,
    ),
    st.booleans(),
    st.integers(1, 9),
)
def test_whatever_the_library_writes_is_read(value: Any, ascii_only: bool, size: int) -> None:
    text = "[" + json.dumps(value, ensure_ascii=ascii_only) + "]"
    assert scanned(text + "x", size) == (len(text), True, False)
