"""Where one JSON value ends in a text that comes in parts.

A parser of the library needs the whole text, and looking at the whole text again for every part would cost its square. This is
the grammar of RFC 8259 as an automaton: a state, and a stack of the brackets that are open. Each character costs O(1) and is
looked at once. It is strict, so it says at the first wrong character that the text is no JSON, and that character is not
taken; what it takes to the end, ``json.loads`` reads. It makes no values.
"""

from typing import Final

from minivllm.text.tools.marks import WHITESPACE

MAX_DEPTH: Final = 200  # of brackets in brackets; readers of JSON that call themselves give up at about a thousand

_DIGITS: Final = "0123456789"
_HEX: Final = "0123456789abcdefABCDEF"
_WORDS: Final = ("true", "false", "null")
# State inside a number -> the state behind a next character. With any other character the number has ended, or is broken off.
_NUMBER: dict[str, dict[str, str]] = {
    "minus": {"0": "zero"} | dict.fromkeys("123456789", "integer"),
    "zero": {".": "point", "e": "e", "E": "e"},
    "integer": {".": "point", "e": "e", "E": "e"} | dict.fromkeys(_DIGITS, "integer"),
    "point": dict.fromkeys(_DIGITS, "fraction"),
    "fraction": {"e": "e", "E": "e"} | dict.fromkeys(_DIGITS, "fraction"),
    "e": {"+": "sign", "-": "sign"} | dict.fromkeys(_DIGITS, "exponent"),
    "sign": dict.fromkeys(_DIGITS, "exponent"),
    "exponent": dict.fromkeys(_DIGITS, "exponent"),
}
_COMPLETE: Final = ("zero", "integer", "fraction", "exponent")


class JsonScanner:
    """Follows one value. Written by whoever reads the text, through ``scan``."""

    def __init__(self) -> None:
        self.ended = False  # the value is complete; of a number, only a character behind it tells
        self.failed = False
        self._state = "value"
        self._open: list[str] = []  # the characters that close the open brackets
        self._in_key = False  # the string that is open is the name of a member
        self._missing = ""  # of a word (true), or of the four digits of an escape

    def scan(self, text: str, start: int = 0) -> int:
        """Go on with a text from ``start``; where it stopped: behind the last character that belongs to the value."""
        at = start
        while at < len(text) and not (self.ended or self.failed):
            if self._state == "string":
                at = self._string(text, at)
            elif self._step(text[at]):
                at += 1
        return at

    def _string(self, text: str, at: int) -> int:
        """Go on inside a string, to its end or to an escape."""
        while at < len(text):
            char = text[at]
            if char < " ":  # control characters have to be escaped
                self.failed = True
                return at
            at += 1
            if char == '"':
                if self._in_key:
                    self._state = "colon"
                else:
                    self._complete()
                return at
            if char == "\\":
                self._state = "escape"
                return at
        return at

    def _step(self, char: str) -> bool:
        """Take one character outside of strings. False where it is wrong, or where it only ended a number."""
        if self._state in _NUMBER:
            following = _NUMBER[self._state].get(char)
            if following is not None:
                self._state = following
            elif self._state in _COMPLETE:
                self._complete()
            else:
                self.failed = True
            return following is not None
        if self._state == "escape":
            self._missing = "0000" if char == "u" else ""
            self._state = "hex" if char == "u" else "string"
            self.failed = char not in 'u"\\/bfnrt'
        elif self._state == "hex":
            self._missing = self._missing[1:]
            self._state = "hex" if self._missing else "string"
            self.failed = char not in _HEX
        elif self._state == "word":
            self.failed = char != self._missing[0]
            self._missing = self._missing[1:]
            if not self._missing and not self.failed:
                self._complete()
        elif char not in WHITESPACE:
            self._between(char)
        return not self.failed

    def _between(self, char: str) -> None:
        """Take a character that begins a value, or stands between values."""
        state = self._state
        if char == '"' and state in ("value", "first value", "key", "first key"):
            self._in_key = state in ("key", "first key")
            self._state = "string"
        elif state == "colon" and char == ":":
            self._state = "value"
        elif state == "next" and char == ",":
            self._state = "key" if self._open[-1] == "}" else "value"
        elif state in ("next", "first value", "first key") and char == self._open[-1]:
            self._open.pop()
            self._complete()
        elif state in ("value", "first value"):
            self._begin(char)
        else:
            self.failed = True

    def _begin(self, char: str) -> None:
        """Take the first character of a value that is no string."""
        if char in "{[":
            self._open.append("}" if char == "{" else "]")
            self._state = "first key" if char == "{" else "first value"
            self.failed = len(self._open) > MAX_DEPTH
        elif char in _DIGITS or char == "-":
            self._state = {"-": "minus", "0": "zero"}.get(char, "integer")
        else:
            self._missing = next((word[1:] for word in _WORDS if word[0] == char), "")
            self._state = "word"
            self.failed = not self._missing

    def _complete(self) -> None:
        self._state = "next"
        self.ended = not self._open
