"""From token ids to text, one token at a time, exactly.

A token is a run of *bytes*, not of characters: byte-level vocabularies cut anywhere inside a character, and SentencePiece ones
fall back to single bytes. Decoding every token by itself would show replacement characters that are not in the text;
decoding the whole sequence again for every token would cost O(context) a token. So each vocabulary is read as a table id ->
bytes (``Pieces``) and the bytes run through an incremental UTF-8 decoder (``Detokenizer``): O(1) a token, and by construction

    concat of all add(id) + finish()  ==  the bytes of all ids, decoded once, errors replaced at the end.

Most tokens are whole characters, and then their text is looked up, not decoded: the bytes of valid UTF-8 mean the same wherever
they stand, unless a character is open before them.

For byte-level decoders this is what the tokenizers library gives. With byte fallback there is one difference, and only in
text that is not valid UTF-8: the library replaces *every* byte of a run of byte tokens once one of them is wrong, including
characters that a stream has long sent; here only the wrong bytes are replaced, as everywhere else in Unicode.

Knows nothing of requests, stop strings or models.
"""

import codecs
import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

from minivllm.errors import UnsupportedModel

_REMEDY = "serve a model whose tokenizer.json has a ByteLevel, Metaspace or Replace/ByteFallback/Fuse/Strip decoder"


def _byte_level_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE (GPT-2): printable Latin-1 stands for itself, other bytes are shifted to U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


class Pieces:
    """The bytes that each token stands for, read off a tokenizer's decoder. Filled by itself as ids are asked for.

    ``first_drops`` is a character that the very first token loses (Metaspace), ``strip_byte`` and ``strip_count`` say how much
    the beginning of the whole text loses (Strip). Raises ``UnsupportedModel`` for a decoder that does not map tokens to bytes.
    """

    def __init__(self, backend: Any, decoder: dict[str, Any] | None, special_ids: frozenset[int]) -> None:
        self.special_ids = special_ids
        self.first_drops = ""
        self.strip_byte = 0
        self.strip_count = 0
        self._backend = backend
        self.texts: dict[int, str] = {}  # of the tokens met so far that are whole characters
        self._cache: dict[int, bytes] = {}
        self._alphabet: dict[str, int] | None = None
        self._replace: list[tuple[str, str]] = []
        self._byte_fallback = False
        self._fused = False
        if decoder is None:
            raise UnsupportedModel(f"The tokenizer has no decoder; {_REMEDY}.")
        for step in decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]:
            self._read(step)

    def _read(self, step: dict[str, Any]) -> None:
        """Take one step of the decoder over, or refuse it. The order of steps is that of every SentencePiece conversion."""
        kind = step["type"]
        if kind == "ByteLevel":
            self._alphabet = _byte_level_alphabet()
        elif kind == "Replace" and "String" in step["pattern"] and not self._byte_fallback and not self._fused:
            self._replace.append((step["pattern"]["String"], step["content"]))
        elif kind == "Metaspace" and not self._byte_fallback and not self._fused:
            self._replace.append((step["replacement"], " "))
            if step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never") != "never":
                self.first_drops = step["replacement"]
        elif kind == "ByteFallback":
            self._byte_fallback = True
        elif kind == "Fuse":
            self._fused = True
        elif kind == "Strip" and self._fused and not step["stop"] and step["content"].isascii():
            self.strip_byte, self.strip_count = ord(step["content"]), step["start"]
        else:
            raise UnsupportedModel(f"The tokenizer's decoder step {kind} cannot be streamed here; {_REMEDY}.")

    def __getitem__(self, token_id: int) -> bytes:
        """The bytes of a token; b"" for an id that the vocabulary does not have (models pad theirs)."""
        piece = self._cache.get(token_id)
        if piece is None:
            token = self._backend.id_to_token(token_id)
            if token is None:
                return b""  # not kept: such ids have no bound
            piece = self._cache[token_id] = self._bytes_of(token)
            with contextlib.suppress(UnicodeDecodeError):
                self.texts[token_id] = piece.decode()
        return piece

    def first(self, token_id: int) -> bytes:
        """The bytes of a token that begins the text."""
        if not self.first_drops:
            return self[token_id]
        token = self._backend.id_to_token(token_id) or ""
        return self._bytes_of(token.replace(self.first_drops, ""))

    def _bytes_of(self, token: str) -> bytes:
        if self._alphabet is not None:
            values = [self._alphabet.get(char) for char in token]
            known = [v for v in values if v is not None]
            return bytes(known) if len(known) == len(values) else token.encode()  # an added token is plain text
        for old, new in self._replace:
            token = token.replace(old, new)
        if self._byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes((int(token[3:5], 16),))
            except ValueError:
                pass
        return token.encode()

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool) -> str:
        """The text of a whole sequence: all bytes joined, decoded once."""
        kept = [i for i in token_ids if not (skip_special_tokens and i in self.special_ids) and self[i]]
        joined = b"".join([self.first(i) for i in kept[:1]] + [self[i] for i in kept[1:]])
        lead = 0
        while lead < self.strip_count and joined[lead : lead + 1] == bytes((self.strip_byte,)):
            lead += 1
        return joined[lead:].decode("utf-8", "replace")


class Detokenizer:
    """The text of one sequence as it grows. Written only by the output processor that made it.

    The prompt is never emitted, but it counts: whether a leading space is dropped depends on whether text came before, and a
    prompt may end inside a character. What ``add`` and ``finish`` give is the text that the generated ids add: what follows
    the complete characters of the prompt. A character begun in the prompt and completed by a generated token is in it whole;
    if nothing is generated, nothing is.
    """

    def __init__(self, pieces: Pieces, prompt_ids: Sequence[int], skipped_ids: frozenset[int]) -> None:
        self._pieces = pieces
        self._skipped = skipped_ids
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = True  # no token has counted yet
        self._strip_left = pieces.strip_count
        self._added = False  # a generated byte went in
        self._texts = pieces.texts
        for token_id in prompt_ids:  # normally one or two rounds: until nothing at the beginning can be stripped any more
            if not (self._at_start or self._strip_left):
                break
            self._begin(token_id)
        tail = b""
        for token_id in reversed(prompt_ids):  # an incomplete character is at most three bytes long
            if len(tail) >= 3:
                break
            if token_id not in self._skipped:
                tail = pieces[token_id] + tail
        self._decoder.decode(tail[-3:])
        self._plain = self._is_plain()

    def _is_plain(self) -> bool:
        """True where a token's own text is all that it adds: behind the beginning, and not inside a character."""
        return not (self._at_start or self._strip_left or self._decoder.getstate()[0])

    def _begin(self, token_id: int) -> bytes:
        """The bytes of a token while the beginning of the text may still lose some."""
        if token_id in self._skipped:
            return b""
        piece = self._pieces.first(token_id) if self._at_start else self._pieces[token_id]
        # An id that the vocabulary does not have is no token, so the next one is still the first.
        self._at_start = self._at_start and not piece and not self._pieces[token_id]
        lead = 0
        while lead < min(self._strip_left, len(piece)) and piece[lead] == self._pieces.strip_byte:
            lead += 1
        if piece:
            self._strip_left = self._strip_left - lead if lead == len(piece) else 0
        return piece[lead:]

    def add(self, token_id: int) -> str:
        """The characters that this token completes; "" while it leaves one open."""
        if self._plain and (text := self._texts.get(token_id)) is not None:
            return "" if token_id in self._skipped else text
        if self._at_start or self._strip_left:
            piece = self._begin(token_id)
        elif token_id in self._skipped:
            return ""
        else:
            piece = self._pieces[token_id]
        if not piece:
            return ""
        self._added = True
        text = self._decoder.decode(piece)
        self._plain = self._is_plain()
        return text

    def finish(self) -> str:
        """What is left at the end of the stream: a replacement character for a character that never was completed."""
        return self._decoder.decode(b"", True) if self._added else ""
