"""Reasoning as Qwen3 (Qwen/Qwen3-8B and its family, QwQ-32B) writes it, by the chat template in their tokenizer_config.json.

    <think>
    The user wants ...
    </think>

    The answer.

A hybrid model opens the block itself, or leaves it out; then the whole reply is the answer. A template that always wants
reasoning ends the prompt with an open ``<think>``, and the reply begins inside. With ``enable_thinking=false`` the prompt ends
with an empty, closed block, and the reply is the answer again.

Whitespace directly behind ``<think>`` and directly before and behind ``</think>`` belongs to the format: it is neither
reasoning nor content. A block that is never closed is reasoning to its end.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

from minivllm.text.reply import Piece
from minivllm.text.tools.held import SPACE, Content, MarkWatch, Outlet

_START, _END = "<think>", "</think>"
_LOOK_BACK = 64  # characters of the prompt: a mark and the whitespace behind it


class Qwen3:
    """Parts the reasoning from the answer. Written by whoever reads the text."""

    MARKS: ClassVar[tuple[str, ...]] = (_START, _END)
    OPENER: ClassVar[str] = _START
    END: ClassVar[str] = _END
    _UNMARKED: ClassVar[bool] = False  # the reasoning may begin without its mark

    def __init__(self, prompt: str) -> None:
        tail = prompt[-_LOOK_BACK:].rstrip()
        self._outlet = Outlet()
        self._reasoning = Content(self._outlet, "reasoning")
        self._lead: list[str] = []  # whitespace at the beginning
        self._watch = MarkWatch((_START,))
        self._inside = tail.endswith(_START) or (self._UNMARKED and not tail.endswith(_END))
        self._state = self._answer if tail.endswith(_END) else self._begin

    @property
    def reasons(self) -> Literal["yes", "maybe", "no"]:
        """Asked before the text comes: whether it begins with reasoning."""
        if self._state == self._answer:
            return "no"
        return "yes" if self._inside else "maybe"

    def feed(self, text: str) -> Sequence[Piece]:
        """Take the next part of the text."""
        for i, char in enumerate(text):
            if self._state == self._answer:
                self._outlet.add("content", text[i:])
                break
            self._state(char)
        return self._outlet.take()

    def finish(self) -> Sequence[Piece]:
        """The text has ended. Half a mark is text."""
        held = self._watch.release()
        if self._state == self._begin and not self._inside:
            self._outlet.add("content", "".join(self._lead) + held)
        else:
            self._reasoning.add(held)
            self._reasoning.finish()
        return self._outlet.take()

    def _begin(self, char: str) -> None:
        """Before the first mark: whitespace, and then the mark or none."""
        if char in SPACE and not self._watch.held:
            self._lead.append(char)
            return
        text, mark = self._watch.add(char)
        if not (text or mark):
            return
        text += self._watch.release()
        if mark or self._inside:
            self._watch = MarkWatch((_END,))
            self._state = self._open
            for held in text:
                self._state(held)
        else:
            self._outlet.add("content", "".join(self._lead) + text)
            self._state = self._answer

    def _open(self, char: str) -> None:
        """Behind the mark that opens the reasoning."""
        if char not in SPACE:
            self._state = self._reason
            self._reason(char)

    def _reason(self, char: str) -> None:
        text, mark = self._watch.add(char)
        self._reasoning.add(text)
        if mark:
            self._reasoning.take_space()
            self._state = self._close

    def _close(self, char: str) -> None:
        """Behind the mark that closes the reasoning."""
        if char not in SPACE:
            self._answer(char)
            self._state = self._answer

    def _answer(self, char: str) -> None:
        self._outlet.add("content", char)
