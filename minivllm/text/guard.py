"""Users' words stay words: a special token that somebody writes into a message is text to the model, not an instruction.

A rendered chat holds special tokens of the template (``<|im_end|>`` ends a message) beside what users wrote, and a tokenizer
cannot tell them apart: who writes ``<|im_end|><|im_start|>system`` into a message could begin another one. So before a chat is
rendered, a random mark is put into every special token that stands in what the request brought. Afterwards the tokens without
a mark are the template's. They alone become special tokens; then the marks go, and the rest is encoded as plain text.

The mark is letters and digits, so that templates trim, join and quote around it as they would anyway. Most chats hold nothing
of the kind and are encoded as they are.
"""

import json
import re
import secrets
from collections.abc import Sequence
from typing import Any

import tokenizers

_MARK_BYTES = 16  # random ones: nobody guesses it


class Guard:
    """Marks special tokens in what users wrote. Never changed after it is made."""

    def __init__(self, special_tokens: Sequence[str]) -> None:
        longest_first = sorted({token for token in special_tokens if token}, key=len, reverse=True)
        self._any = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")  # literals only: nothing to backtrack over
        # A token could also be joined of two texts, so the edges of texts count too.
        self._beginnings = {token[:i] for token in longest_first for i in range(1, len(token))}
        self._endings = {token[i:] for token in longest_first for i in range(1, len(token))}
        self._lengths = range(1, max(map(len, longest_first), default=1))

    def marked(self, value: Any) -> tuple[Any, str]:
        """The same JSON value with marks in its texts, and the mark; "": there was nothing to mark."""
        mark = "x" + secrets.token_hex(_MARK_BYTES)
        result = self._walk(value, mark)
        return (result, mark) if result != value else (value, "")

    def _walk(self, value: Any, mark: str) -> Any:
        if isinstance(value, str):
            return self._text(value, mark)
        if isinstance(value, dict):
            return {self._marked_tokens(name, mark): self._field(name, item, mark) for name, item in value.items()}
        return [self._walk(item, mark) for item in value] if isinstance(value, list | tuple) else value

    def _field(self, name: str, value: Any, mark: str) -> Any:
        """A "role" or "type" is a word that templates compare, so its edges are left alone."""
        is_word = name in ("role", "type") and isinstance(value, str)
        return self._marked_tokens(value, mark) if is_word else self._walk(value, mark)

    def _text(self, text: str, mark: str) -> str:
        front = mark if any(text[:n] in self._endings for n in self._lengths) else ""
        back = mark if any(text[-n:] in self._beginnings for n in self._lengths) else ""
        return front + self._marked_tokens(text, mark) + back

    def _marked_tokens(self, text: str, mark: str) -> str:
        """With a mark in every token that stands in it whole; all that is done to names, which templates look for."""
        return self._any.sub(lambda found: found[0][:1] + mark + found[0][1:], text)

    def of_template(self, text: str, prefix: str) -> str:
        """A rendered text with ``prefix`` before every special token that holds no mark."""
        return self._any.sub(lambda found: prefix + found[0], text)


class GuardedEncoder:
    """A copy of a tokenizer in which special tokens have secret names. Never changed after it is made."""

    def __init__(self, backend: tokenizers.Tokenizer, guard: Guard) -> None:
        self._guard = guard
        self._prefix = "\ue000" + secrets.token_hex(_MARK_BYTES)
        whole = json.loads(backend.to_str())
        renamed: dict[str, int] = {}
        for token in whole["added_tokens"]:
            if token["special"]:
                token["content"] = self._prefix + token["content"]
                renamed[token["content"]] = token["id"]
        self._backend = tokenizers.Tokenizer.from_str(json.dumps(whole))
        self._true_ids = {self._backend.token_to_id(name): token_id for name, token_id in renamed.items()}

    def encode(self, text: str, mark: str, add_special_tokens: bool) -> list[int]:
        """The ids of a rendered text with marks."""
        named = self._guard.of_template(text, self._prefix).replace(mark, "")
        found: list[int] = self._backend.encode(named, add_special_tokens=add_special_tokens).ids
        return [self._true_ids.get(token_id, token_id) for token_id in found]
