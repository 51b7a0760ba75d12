"""Reasoning as gpt-oss (openai/gpt-oss-20b, openai/gpt-oss-120b) writes it: the analysis channel of harmony.

    <|channel|>analysis<|message|>The user wants ...<|end|><|start|>assistant<|channel|>final<|message|>The answer.<|return|>

``tools/openai.py`` describes the format. Messages of the analysis channel are taken out with their marks, and two of them are
parted by a newline. Everything else goes on as it is, marks included, for ``tools.openai.OpenAI`` to read: it is that parser
which makes plain text of it, so it belongs behind this one also where a request offers no functions. A message of the analysis
channel that has a recipient is a call, not a thought, and goes on too.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

from minivllm.text.reply import Piece
from minivllm.text.tools.held import Outlet
from minivllm.text.tools.openai import MARKS, Event, Messages

_OPEN = "<|channel|>analysis<|message|>"


class OpenAIGptOss:
    """Takes the reasoning out of a harmony text. Written by whoever reads the text."""

    MARKS: ClassVar[tuple[str, ...]] = MARKS
    OPENER: ClassVar[str] = ""  # its header says what a message is
    END: ClassVar[str] = "<|channel|>final<|message|>"

    def __init__(self, prompt: str) -> None:
        self._messages = Messages()
        self._outlet = Outlet()
        self._reasons = False  # the message is reasoning
        self._first = False  # it has said nothing yet
        self._said = False  # an earlier one has
        if prompt[-len(_OPEN) :] == _OPEN:  # the reply begins inside the reasoning
            self._read(self._messages.feed(_OPEN))

    @property
    def reasons(self) -> Literal["yes"]:
        """Asked before the text comes: something always stands before the answer, be it a header alone."""
        return "yes"

    def feed(self, text: str) -> Sequence[Piece]:
        """Take the next part of the text."""
        self._read(self._messages.feed(text))
        return self._outlet.take()

    def finish(self) -> Sequence[Piece]:
        """The text has ended."""
        self._read(self._messages.finish())
        return self._outlet.take()

    def _read(self, events: Sequence[Event]) -> None:
        for event in events:
            if event.kind == "header":
                self._reasons = self._first = event.channel == "analysis" and not event.recipient
            if not self._reasons or event.kind == "outside":
                self._outlet.add("content", event.text)
            elif event.kind == "body":
                if self._first and self._said:
                    self._outlet.add("reasoning", "\n")
                self._first, self._said = False, True
                self._outlet.add("reasoning", event.text)
