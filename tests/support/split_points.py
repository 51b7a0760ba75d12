"""Reads a text with a parser, cut in every way that matters, and fails where the cut shows."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from minivllm.text.grammar import matcher
from minivllm.text.reply import Reply, ReplyParser
from minivllm.types import Grammar


def read(parser: ReplyParser, parts: Iterable[str]) -> Reply:
    """The reply of a text that comes in parts."""
    reply = Reply()
    for part in parts:
        reply.add(parser.feed(part))
    reply.add(parser.finish())
    return reply


def read_everywhere(make: Callable[[], ReplyParser], text: str) -> Reply:
    """The reply of a text, after it was cut at every single point, read by characters and in threes, and always the same."""
    whole = read(make(), [text])
    assert read(make(), text) == whole
    assert read(make(), [text[i : i + 3] for i in range(0, len(text), 3)]) == whole
    for cut in range(len(text) + 1):
        assert read(make(), [text[:cut], text[cut:]]) == whole, f"cut at {cut}: {text[:cut]!r}"
    return whole


def read_anyhow(make: Callable[[], ReplyParser], text: str, cuts: Sequence[int]) -> Reply:
    """The reply of a text, read whole, by characters and cut at some points: always the same."""
    whole = read(make(), [text])
    edges = sorted({0, len(text), *(c % (len(text) + 1) for c in cuts)})
    assert read(make(), text) == whole
    assert read(make(), [text[a:b] for a, b in itertools.pairwise(edges)]) == whole
    return whole


def calls_of(reply: Reply) -> list[tuple[str, str]]:
    """Name and JSON text of every call that stayed."""
    return [(call.name, call.arguments) for call in reply.calls.values()]


class Sampler:
    """Draws texts that a grammar allows: the next token is any of those that it lets through."""

    def __init__(self, words: Any, tokenizer: Any, end: int) -> None:
        self._words = words
        self._tokenizer = tokenizer
        self._end = end

    def draw(self, source: str, choose: Callable[[list[int]], int], at_most: int = 300) -> str | None:
        """A text, or None where it has not ended after ``at_most`` tokens."""
        walk = matcher(Grammar("lark", source), self._words)
        tokens: list[int] = []
        while len(tokens) < at_most:
            mask = walk.compute_bitmask()
            token = choose([i for i in range(len(mask) * 8) if mask[i // 8] >> (i % 8) & 1])
            if token == self._end:
                return str(self._tokenizer.decode(tokens, False))
            assert walk.consume_token(token), walk.get_error()
            tokens.append(token)
        return None

    def allows(self, source: str, text: str) -> bool:
        """Whether a grammar allows a text as a whole."""
        walk = matcher(Grammar("lark", source), self._words)
        tokens = self._tokenizer.encode(text)
        return walk.try_consume_tokens(tokens) == len(tokens) and bool(walk.is_accepting())
