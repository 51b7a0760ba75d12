"""Which parsers a server reads replies with: chosen once at start, made anew for each reply, one behind the other.

The reasoning parser has the text first; what it calls content goes to the tool parser, if the request offers tools. gpt-oss
writes everything, plain answers too, as messages with headers; there both read every reply.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from minivllm.errors import InvalidOption
from minivllm.text.reasoning import registry as reasoning
from minivllm.text.reply import Function, Piece, ReasoningParser, ReplyParser, ToolParser
from minivllm.text.tools import registry as tools

AUTO = "auto"
HARMONY = ("openai", "openai_gptoss")  # the two names of gpt-oss' way of writing, of tools and of reasoning


@dataclass(frozen=True)
class Parsers:
    """What a server's replies are read with. Never changes."""

    tools: type[ToolParser] | None = None  # None: the model is not known to call tools
    reasoning: type[ReasoningParser] | None = None  # None: what it thinks is part of what it says
    harmony: bool = False
    trigger: str | None = None  # what every first call begins with, if there is such a thing
    short_call_ids: bool = False

    def reader(self, functions: Sequence[Function], reasoner: ReasoningParser | None) -> ReplyParser | None:
        """Who reads a reply that may call ``functions``; None: all of it is content."""
        caller = self.tools(functions) if self.tools is not None and (functions or self.harmony) else None
        if reasoner is None or caller is None:
            return reasoner or caller
        return _InTurn(reasoner, caller)

    def marks(self, functions: Sequence[Function]) -> tuple[str, ...]:
        """What a reader looks for: these must be in the text, special tokens or not."""
        calls = self.tools.MARKS if self.tools is not None and (functions or self.harmony) else ()
        return (*calls, *(self.reasoning.MARKS if self.reasoning is not None else ()))


class _InTurn:
    """Two parsers as one. Written by whoever reads the text."""

    def __init__(self, first: ReplyParser, second: ReplyParser) -> None:
        self._first = first
        self._second = second

    def feed(self, text: str) -> Sequence[Piece]:
        """Take the next part of the text."""
        return self._through(self._first.feed(text))

    def finish(self) -> Sequence[Piece]:
        """The text has ended."""
        return [*self._through(self._first.finish()), *self._second.finish()]

    def _through(self, pieces: Sequence[Piece]) -> list[Piece]:
        found: list[Piece] = []
        for piece in pieces:
            found += self._second.feed(piece.text) if piece.kind == "content" else (piece,)
        return found


def parsers_of(tool_name: str, reasoning_name: str, template: str | None) -> Parsers:
    """The parsers with these names (``AUTO``: what the chat template writes). Raises ``InvalidOption`` for a name that is not
    known."""
    if tool_name == AUTO:
        tool_name = (None if template is None else tools.detect(template)) or ""
    for option, name, known in (
        ("--tool-call-parser", tool_name, tools.PARSERS),
        ("--reasoning-parser", reasoning_name, reasoning.PARSERS),
    ):
        if name and name not in known:
            raise InvalidOption(f"{option} knows {', '.join(known)}, but not {name!r}.")
    harmony = bool({tool_name, reasoning_name} & set(HARMONY))
    if harmony:
        tool_name, reasoning_name = HARMONY
    return Parsers(
        tools.load_parser(tool_name) if tool_name else None,
        reasoning.reasoning_parser(reasoning_name) if reasoning_name else None,
        harmony,
        tools.TRIGGERS.get(tool_name),
        tool_name in tools.SHORT_CALL_IDS,
    )
