"""Answers of a chat, read while they come: reasoning, content and calls of tools, as the chat route tells them.

One ``Answer`` follows one text. Without a parser all of a text is content; that is the path of most answers, and the route
does not come here for it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from minivllm.server.replies import CalledFunction, ChatFinish, ChatMessage, Delta, DeltaCall, DeltaFunction, MessageCall
from minivllm.server.tools import new_call_id
from minivllm.text.reply import Piece, Reply, ReplyParser
from minivllm.types import FinishReason, RequestOutput


@dataclass(frozen=True)
class Reading:
    """How a request's answers are read."""

    parser: Callable[[], ReplyParser | None]  # makes one for each answer; None: an answer is content and nothing else
    named: bool = False  # one function was demanded by its name
    parallel: bool = True  # several calls may be told; else the first that is one
    short_call_ids: bool = False
    tells_reasoning: bool = True

    @property
    def plain(self) -> bool:
        """True when nobody has to look into answers."""
        return self.parser() is None


@dataclass
class Answer:
    """One answer as it comes. Written by the route that tells it."""

    reading: Reading
    _parser: ReplyParser | None = None
    _reply: Reply = field(default_factory=Reply)
    _only: int | None = None  # the call that is told, where there may be one alone

    def __post_init__(self) -> None:
        """Begin to read."""
        self._parser = self.reading.parser()

    def _read(self, output: RequestOutput) -> Sequence[Piece]:
        """The pieces that new output brings."""
        if self._parser is None:
            return (Piece("content", output.text),) if output.text else ()
        pieces = [*self._parser.feed(output.text)]
        if output.finish_reason is not None:
            pieces += self._parser.finish()
        if not self.reading.parallel:
            pieces = [piece for piece in pieces if self._is_told(piece)]
        self._reply.add(pieces)
        return pieces

    def _is_told(self, piece: Piece) -> bool:
        """Whether a piece is of the only call, or of none."""
        if piece.kind not in ("call", "arguments", "void"):
            return True
        self._only = piece.call if self._only is None else self._only
        told = piece.call == self._only
        if told and piece.kind == "void":
            self._only = None  # it was no call, so the next one may be told
        return told

    def deltas(self, output: RequestOutput) -> list[Delta]:
        """What new output adds, for a stream."""
        found = [self._delta(piece) for piece in self._read(output)]
        return [delta for delta in found if delta is not None]

    def _delta(self, piece: Piece) -> Delta | None:
        if piece.kind == "content":
            return Delta(None, piece.text)
        if piece.kind == "reasoning":
            return Delta(reasoning=piece.text, reasoning_content=piece.text) if self.reading.tells_reasoning else None
        if piece.kind == "call":
            function = DeltaFunction(piece.text, "")
            return Delta(tool_calls=(DeltaCall(piece.call, function, self._new_id(), "function"),))
        if piece.kind == "arguments":
            return Delta(tool_calls=(DeltaCall(piece.call, DeltaFunction(None, piece.text)),))
        return None  # "void": a stream cannot take a call back; its text follows as content, the finish reason knows better

    def message(self, output: RequestOutput) -> ChatMessage:
        """The whole answer, of output that is whole."""
        if self._parser is None:
            return ChatMessage(output.text)
        self._read(output)
        reply = self._reply
        calls = tuple(
            MessageCall(self._new_id(), CalledFunction(call.name, call.arguments)) for call in reply.calls.values()
        )
        reasoning = (reply.reasoning or None) if self.reading.tells_reasoning else None
        content = reply.content if reply.content or not (calls or reply.reasoning) else None
        return ChatMessage(content, tool_calls=calls, reasoning=reasoning, reasoning_content=reasoning)

    def finish_reason(self, reason: FinishReason | None) -> ChatFinish | None:
        """Why the answer ended, once it was read: calls of the model's choice have a reason of their own."""
        return "tool_calls" if reason == "stop" and self._reply.calls and not self.reading.named else reason

    def _new_id(self) -> str:
        return new_call_id(self.reading.short_call_ids)
