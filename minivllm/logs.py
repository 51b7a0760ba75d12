"""Log records, one line each, whatever stands in them.

A client decides what its headers, paths and prompts hold: a line break that begins a line which looks like ours, an escape
sequence that a terminal obeys. So whatever could end a line, or be more than a letter to a terminal, is written as an escape.
Tracebacks too are one line; ``json`` keeps them in a field of their own. Prompts and outputs are not logged at all.
"""

import json
import logging
import sys
import traceback
from typing import Final, Literal

# Control characters, separators of lines, what changes the direction of writing, and halves of characters.
_ODD: Final = ((0, 0x1F), (0x7F, 0x9F), (0x200E, 0x200F), (0x2028, 0x202E), (0x2066, 0x2069), (0xD800, 0xDFFF))
_ESCAPES: Final = {code: f"\\u{code:04x}" for first, last in _ODD for code in range(first, last + 1)} | {10: "\\n", 13: "\\r"}


def set_up_logging(level: str, form: Literal["text", "json"], part: str) -> None:
    """Write records to stderr from now on. ``part``: of the program that this process is."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(part) if form == "json" else TextLines(part))
    logging.basicConfig(level=level.upper(), handlers=[handler])


class TextLines(logging.Formatter):
    """For eyes: ``time level message``."""

    def __init__(self, part: str) -> None:
        super().__init__("%(asctime)s %(levelname)s " + (f"{part}: " if part != "server" else "") + "%(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        return super().format(record).translate(_ESCAPES)


class JsonLines(logging.Formatter):
    """For machines: an object with time (Unix), level, part, logger, message, and the traceback of an exception."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self._part = part

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line of ASCII."""
        fields = {
            "time": round(record.created, 6),
            "level": record.levelname,
            "part": self._part,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["exception"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(fields)
