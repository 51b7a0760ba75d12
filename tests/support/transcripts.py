"""What the tests of parsers of calls share: texts with what they mean, every way of cutting them, and texts made at random."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from minivllm.text.grammar import matcher, vocabulary
from minivllm.text.reply import Function, Piece, Reply, ToolParser
from minivllm.text.tokenizer import load_tokenizer
from minivllm.types import Grammar

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "unit": {"enum": ["C", "F"]},
        "days": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
# One name begins with another, one is quoted in Python's and JSON's own way, one is not ASCII.
FUNCTIONS = (
    Function("get_weather", WEATHER),
    Function("get", NOTHING),
    Function("météo-2", NOTHING),
    Function("function", NOTHING),
)


@dataclass(frozen=True)
class Transcript:
    """A reply's text and what it says: content, and calls as (name, arguments)."""

    text: str
    content: str = ""
    calls: tuple[tuple[str, str], ...] = ()


def read(parser: type[ToolParser], parts: Sequence[str], functions: Sequence[Function] = FUNCTIONS) -> list[Piece]:
    """The pieces of a text that comes in parts, neighbours of one kind joined. Checks what holds for every text."""
    reader = parser(functions)
    pieces = [piece for part in parts for piece in reader.feed(part)]
    pieces += reader.finish()
    runs = groupby(pieces, key=lambda piece: (piece.kind, piece.call))
    joined = [Piece(kind, "".join(piece.text for piece in run), call) for (kind, call), run in runs]
    announced = [piece.call for piece in joined if piece.kind == "call"]
    assert announced == list(range(len(announced)))
    assert all(piece.text for piece in pieces if piece.kind != "void")
    return joined


def reply(pieces: Sequence[Piece]) -> Reply:
    """The whole reply."""
    made = Reply()
    made.add(pieces)
    return made


def check(parser: type[ToolParser], transcript: Transcript) -> None:
    """A text means what it should, in one part, cut in two anywhere, in single characters and in threes."""
    text = transcript.text
    whole = read(parser, [text])
    made = reply(whole)
    assert (made.content, tuple((c.name, c.arguments) for c in made.calls.values())) == (transcript.content, transcript.calls)
    for at in range(len(text) + 1):
        assert read(parser, [text[:at], text[at:]]) == whole, (text[:at], text[at:])
    assert read(parser, list(text)) == whole
    assert read(parser, [text[at : at + 3] for at in range(0, len(text), 3)]) == whole


def soup(parser: type[ToolParser], calls: Sequence[str]) -> st.SearchStrategy[str]:
    """Texts out of marks, parts of marks, calls, parts of calls, brackets, names and anything."""
    names = [function.name for function in FUNCTIONS]
    fragments = [
        *parser.MARKS,
        *calls,
        *names,
        *'{}[]",:;\\ \n',
        '"name": ',
        '"arguments": ',
        '"parameters": ',
        "{}",
        "```json\n",
    ]
    known = st.sampled_from([*parser.MARKS, *calls])
    beginning = st.tuples(known, st.integers(1, 80)).map(lambda c: c[0][: c[1]])
    end = st.tuples(known, st.integers(1, 80)).map(lambda c: c[0][c[1] :])
    anything = st.text(max_size=4)
    parts = st.one_of(st.sampled_from(calls), st.sampled_from(fragments), beginning, end, anything)
    return st.lists(parts, max_size=12).map("".join)


def check_any(parser: type[ToolParser], text: str) -> None:
    """What holds for every text: cuts do not matter, and all of it is accounted for."""
    pieces = read(parser, [text])
    assert read(parser, list(text)) == pieces
    made = reply(pieces)
    if not made.calls:
        assert made.content == text
    for call in made.calls.values():
        assert isinstance(json.loads(call.arguments), dict)
        assert call.arguments == "{}" or call.arguments in text
    voided = {piece.call for piece in pieces if piece.kind == "void"}
    said = [
        p.text for p in pieces if p.kind == "content" or (p.kind == "arguments" and p.call not in voided and p.text != "{}")
    ]
    rest = iter(text)
    assert all(char in rest for char in "".join(said))  # in the order of the text, and nothing twice


def check_stays_small(parser: type[ToolParser], text: str, bound: int = 64) -> None:
    """Fed in single characters, a long text leaves next to nothing to look at again, so that its cost is its length."""
    reader: Any = parser(FUNCTIONS)
    pieces: list[Piece] = []
    for char in text:
        pieces += reader.feed(char)
        assert len(reader._text._text) <= bound
    pieces += reader.finish()
    assert reply(pieces) == reply(read(parser, [text]))


class Sampler:
    """Texts drawn at random among those that a grammar allows, with the bundled model's tokenizer."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = load_tokenizer(folder)
        eos = self._tokenizer.eos_id
        assert eos is not None
        self._eos = eos
        self._words = vocabulary(self._tokenizer, self._tokenizer.vocab_size, [eos])

    def allows(self, source: str, text: str) -> bool:
        """True if the text is one of those that the grammar allows."""
        state = matcher(Grammar("lark", source), self._words)
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        return state.try_consume_tokens(ids) == len(ids) and state.is_accepting()

    def draw(self, source: str, seed: int, limit: int = 3000) -> str:
        """One text. It ends half of the times that it may."""
        rng = random.Random(seed)
        state = matcher(Grammar("lark", source), self._words)
        ids: list[int] = []
        while len(ids) < limit:
            mask = np.unpackbits(np.frombuffer(state.compute_bitmask(), np.uint8), bitorder="little")
            tokens = np.flatnonzero(mask)
            assert not state.is_error() and len(tokens) > 0
            if mask[self._eos] and (len(tokens) == 1 or rng.random() < 0.5):
                return self._tokenizer.decode(ids)
            token = int(rng.choice(tokens[tokens != self._eos]))
            assert state.consume_token(token)
            ids.append(token)
        raise AssertionError(f"no end within {limit} tokens")


def check_allowed(
    parser: type[ToolParser], sampler: Sampler, one: Sequence[str], several: Sequence[str], no: Sequence[str]
) -> None:
    """A grammar for one call and one for several allow what they should: texts of ``one`` call, of ``several``, of ``no``."""
    for parallel in (False, True):
        source = parser.grammar(FUNCTIONS, parallel, json.dumps)
        for texts, expected in ((one, True), (several, parallel), (no, False)):
            assert {text: sampler.allows(source, text) for text in texts} == dict.fromkeys(texts, expected)


def check_grammar(parser: type[ToolParser], sampler: Sampler, draws: int = 12) -> None:
    """What a parser's grammar allows is calls of the functions, with arguments as their schemas want them, and no content."""
    several = 0
    for seed in range(draws):
        for parallel in (False, True):
            text = sampler.draw(parser.grammar(FUNCTIONS, parallel, json.dumps), seed)
            made = reply(read(parser, [text]))
            assert made.content == "", text
            assert len(made.calls) >= 1 if parallel else len(made.calls) == 1, text
            several += len(made.calls) > 1
            for call in made.calls.values():
                arguments = json.loads(call.arguments)
                schema = next(function.parameters for function in FUNCTIONS if function.name == call.name)
                assert set(schema.get("required", ())) <= set(arguments) <= set(schema["properties"]), text
                assert arguments.get("unit", "C") in ("C", "F") and len(arguments.get("city", "")) <= 8, text
    assert several > 0
