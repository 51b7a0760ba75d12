"""The harmony format of gpt-oss (openai/gpt-oss-20b, openai/gpt-oss-120b), described in OpenAI's harmony response format guide.

A reply is a row of messages. Each has a header, which names a channel and for calls a recipient, and a body; the chat template
ends the prompt with ``<|start|>assistant``, so the first header is one half only.

    <|channel|>analysis<|message|>The user wants ...<|end|>
    <|start|>assistant<|channel|>commentary<|message|>I'll look it up.<|end|>
    <|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Berlin"}<|call|>

    <|start|>assistant<|channel|>final<|message|>It rains.<|return|>

(the line breaks are not part of it). The recipient may stand before the channel too, and models put calls into the analysis
channel as well. The analysis channel is reasoning, unless it calls an offered function; bodies of all other messages, also
those to a recipient that is no offered function, are content. Two messages of reasoning, or of content, are parted by a
newline. So without any functions this parser turns harmony into plain text, behind ``openai_gptoss.OpenAIGptOss`` or alone.

``<|call|>`` and ``<|return|>`` end the generation, and what ends it is normally not part of the text. So a call is complete
where its body is a whole JSON object, whether its mark follows or not: an object that broke off is never whole.

A body reaches to the next mark that ends a message, also inside a JSON string: the marks are special tokens, and a model that
writes about them spells them with other tokens, but the text of both is the same. The other marks may stand in a body.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar, Final, NamedTuple

from minivllm.text.reply import Function, Kind, Piece
from minivllm.text.tools.held import SPACE, Content, MarkWatch, Outlet, either, json_rule, json_text, read_json

_START, _CHANNEL, _CONSTRAIN, _MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>")
MARKS: Final = (_START, _CHANNEL, _CONSTRAIN, _MESSAGE, *_ENDS)
MAX_HEADER = 512  # characters: what is longer is no header


class Event(NamedTuple):
    """A part of a harmony text. The texts of all events together are the whole text."""

    kind: str  # "header" (complete), "body" (a part of one), "end" (of a message: its mark, or ""), "outside" (of any message)
    text: str
    channel: str = ""  # of a header
    recipient: str = ""  # of a header


class Messages:
    """Cuts a text into messages. Written by the parser that made it."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._header: list[str] = []
        self._length = 0  # of the header
        self._headers = MarkWatch(MARKS)
        self._bodies = MarkWatch((*_ENDS, _START))
        self._outside = MarkWatch((_START, _CHANNEL))
        self._watch = MarkWatch((_START, _CHANNEL, _MESSAGE, "to="))
        self._state = self._read_beginning

    def feed(self, text: str) -> list[Event]:
        """Take the next part of the text."""
        for char in text:
            self._state(char)
        return self._take()

    def finish(self) -> list[Event]:
        """The text has ended, and with it the message. Half a header is no header."""
        rest = self._watch.release()
        if self._state == self._read_body:
            self._add("body", rest)
            self._add("end", "")
        else:
            self._add("outside", "".join(self._header) + rest)
        return self._take()

    def _take(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _add(self, kind: str, text: str) -> None:
        if text or kind == "end":
            self._events.append(Event(kind, text))

    # ------------------------------------------------------------------------------------------------------------ states

    def _read_beginning(self, char: str) -> None:
        """The reply begins inside a header; a text that does not is plain."""
        if char in SPACE and not self._watch.held:
            self._header.append(char)
            return
        text, mark = self._watch.add(char)
        if mark:
            self._in_header(mark)
        elif text:
            self._leave(text)

    def _read_header(self, char: str) -> None:
        text, mark = self._watch.add(char)
        self._header.append(text)
        self._length += len(text)
        if mark in (_CHANNEL, _CONSTRAIN, _MESSAGE):
            self._in_header(mark)
        elif mark == _START:
            self._leave()
            self._in_header(mark)
        elif mark or self._length > MAX_HEADER:
            self._leave(mark)

    def _read_body(self, char: str) -> None:
        text, mark = self._watch.add(char)
        self._add("body", text)
        if mark:
            self._add("end", "" if mark == _START else mark)
            self._leave()
        if mark == _START:
            self._in_header(mark)

    def _read_outside(self, char: str) -> None:
        text, mark = self._watch.add(char)
        self._add("outside", text)
        if mark:
            self._length = 0
            self._in_header(mark)

    # ------------------------------------------------------------------------------------------------------------- moves

    def _in_header(self, mark: str) -> None:
        """Behind a mark that belongs to a header."""
        self._header.append(mark)
        self._length += len(mark)
        self._watch, self._state = self._headers, self._read_header
        if mark == _MESSAGE:
            header = "".join(self._header)
            self._header.clear()
            self._events.append(_read_names(header))
            self._watch, self._state = self._bodies, self._read_body

    def _leave(self, text: str = "") -> None:
        """Out of a message. A header that is not complete is plain text, and ``text`` is read again."""
        again = text + self._watch.release()
        self._add("outside", "".join(self._header))
        self._header.clear()
        self._length = 0
        self._watch, self._state = self._outside, self._read_outside
        for char in again:
            self._state(char)


def _read_names(header: str) -> Event:
    """What a complete header says."""
    channel = header.partition(_CHANNEL)[2].partition(_CONSTRAIN)[0].partition(_MESSAGE)[0]
    names = [word for word in channel.split() if not word.startswith("to=")]
    words = header
    for mark in MARKS:
        words = words.replace(mark, " ")
    recipients = [word.removeprefix("to=") for word in words.split() if word.startswith("to=")]
    return Event("header", header, "".join(names[:1]), "".join(recipients[:1]))


class OpenAI:
    """Finds calls in a reply, and takes the marks out of the rest. Written by whoever reads the text."""

    MARKS: ClassVar[tuple[str, ...]] = MARKS

    def __init__(self, functions: Sequence[Function]) -> None:
        self._names = frozenset(f.name for f in functions)
        self._messages = Messages()
        self._outlet = Outlet()
        self._outside = Content(self._outlet)
        self._kind: Kind = "content"  # of the message; "call" before its arguments begin, "void" once it is none
        self._said: set[Kind] = set()
        self._first = False  # the message has said nothing yet
        self._call = -1
        self._name = ""
        self._raw: list[str] = []  # of an open call: its header and the parts of its body
        self._space: list[str] = []  # the end of its body so far

    def feed(self, text: str) -> Sequence[Piece]:
        """Take the next part of the text."""
        self._read(self._messages.feed(text))
        return self._outlet.take()

    def finish(self) -> Sequence[Piece]:
        """The text has ended: a call whose arguments are complete is one, whether its mark came or not."""
        self._read(self._messages.finish())
        self._outside.finish()
        return self._outlet.take()

    def _read(self, events: Sequence[Event]) -> None:
        for event in events:
            if event.kind == "header":
                self._begin(event)
            elif event.kind == "body":
                self._go_on(event.text)
            elif event.kind == "end":
                self._end(event.text)
            else:
                self._outside.add(event.text)

    def _begin(self, header: Event) -> None:
        self._outside.take_space()
        self._first = True
        self._name = header.recipient.removeprefix("functions.")
        if self._name in self._names:
            self._kind = "call"
            self._raw = [header.text]
        else:
            self._kind = "reasoning" if header.channel == "analysis" else "content"

    def _go_on(self, text: str) -> None:
        if self._kind == "call":
            self._raw.append(text)
            start = text.lstrip(SPACE)
            if start.startswith("{"):
                self._kind = "arguments"
                self._call += 1
                self._outlet.add("call", self._name, self._call)
                self._write(start)
            elif start:
                self._no_call()
        elif self._kind == "arguments":
            self._raw.append(text)
            self._write(text)
        elif self._kind == "void":
            self._outlet.add("content", text)
        else:
            if self._first and self._kind in self._said:
                self._outlet.add(self._kind, "\n")
            self._first = False
            self._said.add(self._kind)
            self._outlet.add(self._kind, text)

    def _write(self, text: str) -> None:
        """Pass arguments on. Whitespace waits: at the end of the body it is not part of them."""
        body = text.rstrip(SPACE)
        if body:
            self._outlet.add("arguments", "".join(self._space) + body, self._call)
            self._space.clear()
        self._space.append(text[len(body) :])

    def _end(self, mark: str) -> None:
        if self._kind == "call" or (self._kind == "arguments" and not self._complete()):
            self._no_call()
        if self._kind == "void":
            self._outlet.add("content", mark)
        self._space.clear()
        self._raw.clear()
        self._outside.call_ended()

    def _complete(self) -> bool:
        try:
            return isinstance(read_json("".join(self._raw[1:]).strip(SPACE)), dict)
        except ValueError:
            return False

    def _no_call(self) -> None:
        """What was read of the message, marks and all, is content, and so is the rest of it."""
        if self._kind == "arguments":
            self._outlet.add("void", call=self._call)
        self._kind = "void"
        self._said.add("content")
        self._outlet.add("content", "".join(self._raw))
        self._raw.clear()

    @staticmethod
    def grammar(functions: Sequence[Function], parallel: bool, mark: Callable[[str], str]) -> str:
        """A grammar of calls in the commentary channel. The ``<|call|>`` behind the last one is left to the model's end of
        generation, which it is; between two calls stands ``<|end|>``, behind which the model may go on."""
        calls = [f"function_{i}" for i in range(len(functions))]
        between = f'{mark("<|end|>")} {mark(_START)} "assistant"'
        rules = [
            f"start: call ({between} call)*" if parallel else "start: call",
            f"call: {mark(_CHANNEL)} {either(calls)}",
        ]
        for name, function in zip(calls, functions, strict=True):
            header = json_text(f"commentary to=functions.{function.name} ")
            rules += [
                f'{name}: {header} {mark(_CONSTRAIN)} "json" {mark(_MESSAGE)} {name}_json',
                f"{name}_json: {json_rule({'type': 'object', **function.parameters})}",
            ]
        return "\n".join(rules) + "\n"
