"""What a model's reply is made of: reasoning, plain content and calls of tools, told apart while the text still comes.

A model writes all of these into one text, with marks of its own between them (``<think>``, ``<tool_call>`` ...). A *parser*
follows one such way of writing. It is fed the text in parts that are cut anywhere, and answers with ``Piece``s. The same text
gives the same reply however it was cut: what may still become a mark is held back, nothing else is.

A stream cannot take back what it has sent, and nobody knows that a call is well formed before its end. So a call is announced
as soon as its name is sure, and its arguments are passed on while they come. When it turns out to be none (the JSON breaks
off, the text ends first), a "void" piece says so and all of its text follows as content: a whole reply then holds no such
call, and a stream has at least said everything. What calls a function that the request does not offer is no call at all.

Knows nothing of tokens and requests.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import msgspec

Kind = Literal["reasoning", "content", "call", "arguments", "void"]


class Piece(msgspec.Struct, frozen=True, gc=False):
    """The next piece of a reply. "call" begins a call and its text is the function's name; "arguments" go on with the JSON text
    of a call's arguments; "void" takes a call back."""

    kind: Kind
    text: str = ""
    call: int = 0  # of "call", "arguments" and "void": which of the reply's calls, counted from 0 in the order of their text


class ReplyParser(Protocol):
    """Cuts one text into pieces. Written by whoever reads the text; raises nothing, whatever the text is."""

    def feed(self, text: str) -> Sequence[Piece]:
        """Take the next part of the text."""
        ...

    def finish(self) -> Sequence[Piece]:
        """The text has ended."""
        ...


@dataclass(frozen=True)
class Function:
    """A function that a request offers to the model."""

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)  # JSON Schema of an object; {}: any object


class ToolParser(ReplyParser, Protocol):
    """Finds calls in the text behind the reasoning. Made for one reply as ``Parser(functions)``."""

    MARKS: ClassVar[tuple[str, ...]]  # what it looks for; where one is a special token, it must be shown in the text

    def __init__(self, functions: Sequence[Function]) -> None: ...

    @staticmethod
    def grammar(functions: Sequence[Function], parallel: bool, mark: Callable[[str], str]) -> str:
        """A grammar in llguidance's kind of Lark (its start rule is ``start``) of a text that calls one of the functions, or
        with ``parallel`` one or several, in the format that the parser reads. ``mark`` writes a mark as the grammar needs it: a
        quoted text, or the name of a special token."""
        ...


class ReasoningParser(ReplyParser, Protocol):
    """Finds the reasoning in a text. What follows it comes as content, for a ``ToolParser`` to look at."""

    MARKS: ClassVar[tuple[str, ...]]
    OPENER: ClassVar[str]  # the text that begins the reasoning, where the model may also leave it out
    END: ClassVar[str]  # the text that ends it: a grammar holds behind it

    def __init__(self, prompt: str) -> None:
        """``prompt``: the text before the reply, whose end says whether the reply begins inside the reasoning."""
        ...

    @property
    def reasons(self) -> Literal["yes", "maybe", "no"]:
        """Asked before the text comes: whether it begins with reasoning. "maybe": if it begins with ``OPENER``."""
        ...


@dataclass
class Call:
    """A call as a whole reply has it."""

    name: str
    arguments: str = ""


@dataclass
class Reply:
    """A whole reply, put together from pieces by ``add``. Written by whoever reads the text."""

    reasoning: str = ""
    content: str = ""
    calls: dict[int, Call] = field(default_factory=dict)

    def add(self, pieces: Sequence[Piece]) -> None:
        """Put pieces in their places."""
        for piece in pieces:
            if piece.kind == "content":
                self.content += piece.text
            elif piece.kind == "reasoning":
                self.reasoning += piece.text
            elif piece.kind == "call":
                self.calls[piece.call] = Call(piece.text)
            elif piece.kind == "arguments":
                self.calls[piece.call].arguments += piece.text
            else:
                del self.calls[piece.call]
