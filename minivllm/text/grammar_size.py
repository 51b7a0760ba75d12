"""How long a text a grammar can force, before anybody has tried it.

A matcher follows text that is certain byte by byte, however long it is, within one call. ``(a{1000}){1000}`` is short and
forces a million bytes, which takes it a second; no limit of its own covers that. So repetitions are multiplied out beforehand,
and what writes more than ``MAX_FORCED`` characters in one piece is refused: 20,000 take about 30 ms.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from minivllm.errors import InvalidRequest

MAX_FORCED: Final = 20_000


def check_pattern(source: str) -> None:
    """Raise ``InvalidRequest`` for a regular expression, or a line of a grammar, with repetitions that are too long."""
    if _written(source) > MAX_FORCED:
        raise InvalidRequest(
            f"A pattern of the grammar repeats up to more than {MAX_FORCED} characters; lower the numbers in its braces."
        )


def check_forced(schema: Any) -> None:
    """The same for what a JSON Schema may force: patterns, constants and names. Raises ``InvalidRequest``."""
    for keyword, text in _forcing(schema):
        if keyword in ("pattern", "patternProperties"):
            check_pattern(text)
        elif len(text) > MAX_FORCED:
            raise InvalidRequest(f"A {keyword} of the JSON Schema is longer than {MAX_FORCED} characters; shorten it.")


def _forcing(root: Any) -> Iterator[tuple[str, str]]:
    """Every text in a schema that may have to be written as it stands, with the keyword that it is of."""
    waiting = [root]  # not by recursion: a stranger says how deep it is
    while waiting:
        schema = waiting.pop()
        if isinstance(schema, Mapping):
            for keyword, value in schema.items():
                if keyword == "pattern" and isinstance(value, str):
                    yield keyword, value
                elif keyword == "patternProperties" and isinstance(value, Mapping):
                    yield from ((keyword, name) for name in value)
                elif keyword in ("const", "enum"):
                    yield from ((keyword, text) for text in _texts(value))
                elif len(keyword) > MAX_FORCED:
                    yield "property's name", keyword
                waiting.append(value)
        elif isinstance(schema, Sequence) and not isinstance(schema, str):
            waiting.extend(schema)


def _texts(root: Any) -> Iterator[str]:
    """Every text in a JSON value."""
    waiting = [root]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            waiting.extend((*value.keys(), *value.values()))
        elif isinstance(value, Sequence):
            waiting.extend(value)


def _written(source: str) -> int:
    """About how many characters a regular expression writes when all of it is repeated as often as it must be."""
    sums, last, at = [0], [0], 0  # of each open group: characters so far, and those of its last item
    while at < len(source):
        char = source[at]
        item = 1
        if char == "\\":
            at += 1
        elif char == "[":
            at = _end_of_class(source, at)
        elif char == "(":
            sums.append(0)
            last.append(0)
            item = 0
        elif char == ")" and len(sums) > 1:
            item = sums.pop()
            last.pop()
        elif char == "{" and (repeated := _repetition(source, at)) is not None:
            times, at = repeated
            item = last[-1] * max(times - 1, 0)
        if char != "(":
            sums[-1] += item
            last[-1] = item if char != "{" else last[-1] + item
        at += 1
    return sum(sums)


def _end_of_class(source: str, at: int) -> int:
    """Where the character class that begins at ``at`` ends."""
    at += 2 if source[at + 1 : at + 2] == "^" else 1
    at += source[at : at + 1] == "]"  # at the beginning it is one of the characters
    while at < len(source) and source[at] != "]":
        at += 2 if source[at] == "\\" else 1
    return at


def _repetition(source: str, at: int) -> tuple[int, int] | None:
    """The larger number of a ``{m,n}`` at ``at``, and where it ends; None: it is no repetition."""
    end = source.find("}", at, at + 32)
    numbers = [part.strip() for part in source[at + 1 : end].split(",")] if end > 0 else []
    if not numbers or len(numbers) > 2 or not all(part == "" or (part.isascii() and part.isdigit()) for part in numbers):
        return None
    counts = [int(part) for part in numbers if part]
    return (max(counts), end) if counts else None
