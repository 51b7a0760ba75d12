"""What the text of a reply has turned out to be so far: the side of a parser that speaks.

Text that has been read is content unless a call is *open*. The text of an open call is kept until the call is *settled*: then
it is dropped, as its pieces have said what it means, or, where it was no call in the end, it is content as it stands.

Whitespace that touches a good call is the format's (the line break between two calls, the empty line before the first) and
belongs to nobody; so whitespace at the end of content waits until it is known what follows. All other text comes out.
"""

from collections.abc import Collection, Sequence
from itertools import groupby

from minivllm.text.reply import Piece
from minivllm.text.tools.marks import WHITESPACE, held


class CallLog:
    """Makes the pieces of one reply. Written by its ``CallText`` and by the parser that reads with it."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._pieces: list[Piece] = []
        self._count = 0  # calls announced so far; the number of one that was taken back is not used again
        self._gap: list[str] = []  # whitespace behind content
        self._behind_call = False  # nothing but whitespace since a good call
        self._raw: list[str] | None = None  # the text of the open call
        self._name: str | None = None
        self._early: list[str] | None = None  # its arguments, while the name is not known
        self._number: int | None = None  # of an open call that was announced

    def pieces(self) -> list[Piece]:
        """The pieces since the last time, neighbours of one kind joined."""
        if len(self._pieces) < 2:
            pieces, self._pieces = self._pieces, []
            return pieces
        runs = groupby(self._pieces, key=lambda piece: (piece.kind, piece.call))
        joined = [Piece(kind, "".join(piece.text for piece in run), call) for (kind, call), run in runs]
        self._pieces.clear()
        return joined

    def text(self, text: str) -> None:
        """Text was read that is not of a call's arguments."""
        if self._raw is None:
            self._content(text)
        else:
            self._raw.append(text)

    def arguments(self, text: str) -> None:
        """Text of a call's arguments was read."""
        self.text(text)
        if self._number is not None and text:
            self._pieces.append(Piece("arguments", text, self._number))
        elif self._early is not None:
            self._early.append(text)

    def begin(self) -> None:
        """Open a call: what comes now may be one."""
        self._raw = []

    def name(self, name: str) -> None:
        """The open call's name is known. One that is not offered, or a second one, says that it is no call."""
        if self._raw is None:
            return
        if name not in self._names or self._name is not None:
            self.refuse()
            return
        self._name = name
        if self._early is not None:
            self._announce(name, self._early)

    def begin_arguments(self) -> None:
        """The arguments of the open call begin, as an object. A second time says that it is no call."""
        if self._raw is None:
            return
        if self._early is not None:
            self.refuse()
            return
        self._early = []
        if self._name is not None:
            self._announce(self._name, self._early)

    def _announce(self, name: str, arguments: list[str]) -> None:
        self._number = self._count
        self._count += 1
        self._pieces.append(Piece("call", name, self._number))
        if arguments:
            self._pieces.append(Piece("arguments", "".join(arguments), self._number))

    def settle(self, good: bool) -> bool:
        """The open call has ended, well or not; True if it is a call. Without arguments it has an empty object of them."""
        if self._raw is None:
            return False
        if not good or self._name is None:
            self.refuse()
            return False
        if self._number is None:
            self._announce(self._name, ["{}"])
        self._gap.clear()
        self._behind_call = True
        self._close()
        return True

    def refuse(self) -> None:
        """The open call is none: its text so far is content, and so is what is read from now on."""
        raw = "".join(self._raw or ())
        if self._number is not None:
            self._pieces.append(Piece("void", call=self._number))
        self._close()
        self._content(raw)

    def take_back(self, marks: Sequence[str]) -> str:
        """Take from the text of the open call the end that may be the beginning of a mark."""
        raw = "".join(self._raw or ())
        kept = len(raw) - held(raw, marks)
        if kept < len(raw):
            self._raw = [raw[:kept]]
        return raw[kept:]

    def settle_mark(self) -> None:
        """What was opened is a mark of the format that may stand behind a good call; elsewhere it is content."""
        if self._behind_call:
            self._close()
        else:
            self.refuse()

    def finish(self) -> None:
        """The text has ended."""
        self._pieces.extend(Piece("content", gap) for gap in self._gap)
        self._gap.clear()

    def _close(self) -> None:
        self._raw = self._name = self._early = self._number = None

    def _content(self, text: str) -> None:
        if self._behind_call:
            text = text.lstrip(WHITESPACE)
        if not text:
            return
        self._behind_call = False
        words = text.rstrip(WHITESPACE)
        if words:
            self._pieces.extend(Piece("content", gap) for gap in self._gap)
            self._pieces.append(Piece("content", words))
            self._gap.clear()
        if len(words) < len(text):
            self._gap.append(text[len(words) :])
