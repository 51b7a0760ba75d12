"""Marks in a text that comes in parts: where one is, and how much of an end may still become one."""

from collections.abc import Sequence
from typing import Final

WHITESPACE: Final = " \t\r\n"


def find_mark(text: str, marks: Sequence[str], start: int = 0) -> tuple[int, str]:
    """Where the first of the marks begins, and which it is; (-1, "") where there is none."""
    found = [(at, mark) for mark in marks if (at := text.find(mark, start)) >= 0]
    return min(found, default=(-1, ""))


def held(text: str, marks: Sequence[str]) -> int:
    """The length of the longest end of a text that a mark begins with, and is longer than: what has to be held back."""
    longest = 0
    for mark in marks:
        at = text.find(mark[0], max(0, len(text) - len(mark) + 1))
        while at >= 0 and not mark.startswith(text[at:]):
            at = text.find(mark[0], at + 1)
        if at >= 0:
            longest = max(longest, len(text) - at)
    return longest
