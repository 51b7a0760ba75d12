"""The text of a reply as a parser reads it: the side of a parser that listens.

A parser is written as a generator that reads as if the whole text lay before it (``until`` a mark, ``take`` a literal, a JSON
value). Where the text ends for now, the step that needs more of it yields, all the way up; ``feed`` brings more and goes on. So
there is no state to write down by hand, and none to get wrong, at each place where a text may be cut.

No step looks at a character again that it has taken, and one that waits keeps no more than a mark's or a name's length.
"""

import json
from collections.abc import Generator, Iterator, Sequence
from typing import Final, TypeVar

from minivllm.text.reply import Function, Piece
from minivllm.text.tools.call_log import CallLog
from minivllm.text.tools.json_scanner import JsonScanner
from minivllm.text.tools.marks import WHITESPACE, find_mark, held

PART: Final = 4096  # characters read at once, so that looking for a mark that is not there costs no more each time

T = TypeVar("T")
Steps = Generator[None, None, T]


class CallText:
    """One reply's text. Written by the parser that made it: by ``feed`` and ``finish``, and by the generator that it drives."""

    def __init__(self, functions: Sequence[Function]) -> None:
        self.log = CallLog(frozenset(function.name for function in functions))
        self._names = sorted({function.name for function in functions}, key=len)
        self._text = ""
        self._at = 0  # what lies before has been taken
        self._ended = False
        self._marks: tuple[str, ...] = ()  # that calls begin with

    def feed(self, text: str, steps: Iterator[None]) -> Sequence[Piece]:
        """Take the next part of the text and let the parser go on with it."""
        for start in range(0, len(text), PART):
            self._text = self._text[self._at :] + text[start : start + PART]
            self._at = 0
            next(steps, None)
        return self.log.pieces()

    def finish(self, steps: Iterator[None]) -> Sequence[Piece]:
        """Let the parser go on to the end of the text."""
        self._ended = True
        next(steps, None)
        self.log.finish()
        return self.log.pieces()

    def _taken(self, end: int) -> str:
        """Move on to ``end``; the text up to there."""
        text, self._at = self._text[self._at : end], end
        return text

    def until(self, *marks: str) -> Steps[str]:
        """Take content up to the first of the marks, then open a call and take the mark; which it was, "" at the end of the
        text."""
        self._marks = marks
        while True:
            at, mark = find_mark(self._text, marks, self._at)
            if mark:
                self.log.text(self._taken(at))
                self.log.begin()
                self.log.text(self._taken(at + len(mark)))
                return mark
            wait = 0 if self._ended else held(self._text[self._at :], marks)
            self.log.text(self._taken(len(self._text) - wait))
            if self._ended:
                return ""
            yield

    def rest(self) -> Steps[None]:
        """Take everything that is left."""
        while not self._ended:
            self.log.text(self._taken(len(self._text)))
            yield
        self.log.text(self._taken(len(self._text)))

    def following(self) -> Steps[str]:
        """The next character, which is not taken; "" at the end of the text."""
        while self._at == len(self._text) and not self._ended:
            yield
        return self._text[self._at : self._at + 1]

    def run_of(self, characters: str) -> Steps[None]:
        """Take all characters that come next and are among these."""
        while (yield from self.following()) in (*characters,):
            end = self._at
            while end < len(self._text) and self._text[end] in characters:
                end += 1
            self.log.text(self._taken(end))

    def space(self) -> Steps[None]:
        """Take the whitespace that comes next."""
        yield from self.run_of(WHITESPACE)

    def take(self, *literals: str) -> Steps[str]:
        """Take the literal that comes next, the shortest of several, and return it; "" and nothing taken if none does."""
        literals = tuple(sorted(literals, key=len))
        while True:
            for literal in literals:
                if self._text.startswith(literal, self._at):
                    self.log.text(self._taken(self._at + len(literal)))
                    return literal
            left = len(self._text) - self._at
            if self._ended or not any(len(i) > left and i.startswith(self._text[self._at :]) for i in literals):
                return ""
            yield

    def settle(self, good: bool) -> bool:
        """The open call has ended, well or not; True if it is a call. One that has broken off may have done so in the middle of
        the next one's mark, as "[" begins JSON too: that much is looked at again."""
        if not good and (again := self.log.take_back(self._marks)):
            self._text = again + self._text[self._at :]
            self._at = 0
        return self.log.settle(good)

    def skip(self, mark: str) -> Steps[bool]:
        """Take a mark of the format that comes next, maybe behind whitespace; behind a good call it is not content."""
        yield from self.space()
        self.log.begin()
        found = yield from self.take(mark)
        self.log.settle_mark()
        return found != ""

    def name(self, *ends: str) -> Steps[str]:
        """Take the name of an offered function and one of the ends behind it; which end it was, "" and nothing taken if no such
        thing comes next."""
        found = {name + end: (name, end) for name in self._names for end in ends}
        literal = yield from self.take(*found)
        if not literal:
            return ""
        name, end = found[literal]
        self.log.name(name)
        return end

    def arguments(self) -> Steps[bool]:
        """Take the arguments of the open call; False where no well-formed object comes."""
        if (yield from self.following()) != "{":
            return False
        self.log.begin_arguments()
        scanner = JsonScanner()
        while True:
            self.log.arguments(self._taken(scanner.scan(self._text, self._at)))
            if scanner.ended or scanner.failed or self._ended:
                return scanner.ended
            yield

    def value(self) -> Steps[str | None]:
        """Take a JSON value of any kind; its text, None where no well-formed one comes."""
        scanner = JsonScanner()
        parts: list[str] = []
        while True:
            parts.append(self._taken(scanner.scan(self._text, self._at)))
            self.log.text(parts[-1])
            if scanner.ended:
                return "".join(parts)
            if scanner.failed or self._ended:
                return None
            yield

    def string(self) -> Steps[str | None]:
        """Take a JSON string; what it says, None where no well-formed one comes."""
        if (yield from self.following()) != '"':
            return None
        value = yield from self.value()
        return None if value is None else str(json.loads(value))


class WholeTextParser:
    """What parsers have in common that read a text as if it were whole. Written by whoever reads the text."""

    def __init__(self, functions: Sequence[Function]) -> None:
        self._text = CallText(functions)
        self._steps = self._read(self._text)

    @staticmethod
    def _read(text: CallText) -> Steps[None]:
        """Read the text to its end; each parser has its own way."""
        raise NotImplementedError

    def feed(self, text: str) -> Sequence[Piece]:
        """Take the next part of the text."""
        return self._text.feed(text, self._steps)

    def finish(self) -> Sequence[Piece]:
        """The text has ended."""
        return self._text.finish(self._steps)
